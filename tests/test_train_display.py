"""What a person and a program see of a run."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from nomoat.train.display import JsonLines, Lines, duration, progress_line, sentence


def step(number: int, **changes: Any) -> dict[str, Any]:
    event = {"event": "step", "step": number, "steps": 40, "loss": 0.8123, "tokens_per_second": 1204.4}
    return event | {"eta_seconds": 112.0, "memory_mb": 480.2} | changes


def test_progress_line() -> None:
    line = progress_line(step(4), 0.79)
    assert line == "step 4/40  loss 0.812  validation 0.790  1,204 tokens/s  1:52 left  480 MB"
    assert "loss not finite" in progress_line(step(4, loss=None), None)


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "0:07"), (750, "12:30"), (3723, "1:02:03"), (-1, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_come_every_ten_seconds_and_at_both_ends() -> None:
    now = [0.0]
    stream = io.StringIO()
    display = Lines(stream, live=False, clock=lambda: now[0])
    for number in range(1, 41):
        now[0] += 3.0
        display(step(number))
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown[0] == 1
    assert shown[-1] == 40
    assert shown[1:4] == [5, 9, 13]


def test_live_line_shows_the_newest_state_and_leaves_the_terminal_whole() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = Lines(stream, live=True)
    display({"event": "scoring", "when": "before", "done": 3, "total": 9})
    for number in range(1, 41):
        display(step(number))
    display({"event": "note", "text": "a note"})
    display.close()
    assert display.live is None
    assert "step 40/40" in stream.getvalue()
    assert stream.getvalue().endswith("a note\n")


def test_json_lines_are_one_object_each_and_refuse_nan() -> None:
    stream = io.StringIO()
    display = JsonLines(stream)
    display(step(1))
    display({"event": "note", "text": "two\nlines"})
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["step", "note"]
    with pytest.raises(ValueError):
        display(step(1, loss=float("nan")))


def test_sentences() -> None:
    assert sentence({"event": "checkpoint", "step": 3}) is None
    assert sentence({"event": "skipped", "step": 3, "loss": None, "gradient_norm": 2.5}) == (
        "step 3: not applied, its loss (not finite) or gradient (2.500) is not finite or far too large"
    )
    failed = sentence({"event": "checkpoint_failed", "step": 3, "error": "no \x1b[31m space"})
    assert failed is not None
    assert "\x1b" not in failed
    assert "--resume" in (sentence({"event": "interrupted", "step": 3, "steps": 9}) or "")
