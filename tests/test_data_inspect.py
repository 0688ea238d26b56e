"""The report before training: counts, duplicates, leakage, secrets, lengths and the preview of what is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nomoat.data.inspect import Inspection, inspect_data, marked
from nomoat.errors import DataError
from nomoat.files.gguf import open_gguf
from nomoat.text.template import ChatTemplate, template_for
from nomoat.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def text(smollm2: Path) -> Iterator[tuple[Tokenizer, ChatTemplate | None]]:
    with open_gguf(smollm2) as file:
        tokenizer = Tokenizer.from_gguf(file)
        yield tokenizer, template_for(file, tokenizer)


def chat(question: str, answer: str, **weight: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **weight}]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def look(text: Any, path: Path, **options: Any) -> Inspection:
    return inspect_data(path, *text, **({"max_tokens": 512} | options))


def test_counts_and_reasons(text: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        chat("a?", "one"),
        "{broken",
        chat("b?", "word " * 600),
        chat("c?", "hidden", weight=0),
        chat("d?", "two"),
    )
    report = look(text, path, skip_bad=True)
    assert (len(report.examples), report.positions) == (2, [0, 3])
    assert report.dropped == {"longer than the limit": 1, "no token to learn": 1}
    assert (report.log.skipped_rows, report.log.rows, report.truncated) == (1, 4, 0)
    assert report.learned_tokens == 4 and report.tokens > 20
    shown = report.render()
    assert "messages format, 5 rows, 2 used" in shown
    assert "left out 1: longer than the limit (line 3" in shown and "left out 1: no token to learn (line 4" in shown
    assert f"{path}:2: not valid JSON" in shown
    assert "[[one<|im_end|>]]" in shown and "[[two" not in shown
    assert look(text, path, skip_bad=True, truncate=True).truncated == 1


def test_the_histogram_counts_every_example(text: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *(chat("a?", "word " * n) for n in (1, 2, 3, 200, 210)))
    histogram = look(text, path).histogram()
    assert sum(count for _, count in histogram) == 5
    assert [bound for bound, _ in histogram] == [64, 128, 256] and [count for _, count in histogram] == [3, 0, 2]


def test_duplicates_and_leakage(text: Any, tmp_path: Path) -> None:
    """D13."""
    train = write(tmp_path / "train.jsonl", *[chat("What is it?", "x")] * 9, chat("Another", "y"))
    test = write(tmp_path / "test.jsonl", chat("  what IS\n it", "other"), chat("new", "z"))
    report = look(text, train, test=test)
    assert (report.duplicates, report.leaked, report.test_rows) == (8, 1, 2)
    notes = " ".join(report.warnings())
    assert "8 of 10 rows (80%) repeat" in notes and "1 of 2 test prompts (50%)" in notes
    same = look(text, train, test=train)
    assert (same.leaked, same.test_rows) == (10, 10)
    clean = look(text, write(tmp_path / "clean.jsonl", chat("p", "q"), chat("r", "s")), test=test)
    assert (clean.duplicates, clean.leaked) == (0, 0) and clean.warnings() == []


def test_secrets_are_counted_and_not_printed(text: Any, tmp_path: Path) -> None:
    """D14."""
    secrets = ["sk-" + "a1B2" * 8, "AKIA" + "Z" * 16, "ghp_" + "x" * 36, "-----BEGIN RSA PRIVATE KEY-----", "jo@example.com"]
    path = write(tmp_path / "rows.jsonl", chat("hello", "there"), *(chat(f"my key is {s}", "ok") for s in secrets))
    report = look(text, path)
    assert report.secrets == {"API keys": 3, "private keys": 1, "e-mail addresses": 1}
    shown = report.render()
    assert "3 rows hold API keys" in shown and not any(secret in shown for secret in secrets)


@pytest.mark.parametrize("value", ["a" * 100_000 + "@", "eyJ" * 30_000, "@a." * 30_000, "sk-" * 30_000, "-----BEGIN " * 9_000])
def test_secret_patterns_take_linear_time(value: str) -> None:
    import time

    from nomoat.data.inspect import SECRETS

    began = time.process_time()
    for pattern in SECRETS.values():
        pattern.search(value)
    assert time.process_time() - began < 2


def test_misspelt_fields_show(text: Any, tmp_path: Path) -> None:
    rows = [chat("a", "b"), chat("c", "d")]
    rows[0]["messages"][1]["wieght"] = 0
    assert any("messages[].wieght" in note for note in look(text, write(tmp_path / "rows.jsonl", *rows)).warnings())


@pytest.mark.parametrize(
    "rows",
    [[chat("a", "b")], [chat("a", "b"), chat("c", "d", weight=0)], [chat("a", "word " * 600)] * 5],
    ids=["one example", "one usable", "all too long"],
)
def test_too_little_to_train_on_is_refused(text: Any, tmp_path: Path, rows: list[Any]) -> None:
    """D01, D06, D07."""
    with pytest.raises(DataError, match="training needs at least 2") as fault:
        look(text, write(tmp_path / "rows.jsonl", *rows))
    assert (fault.value.code, fault.value.exit_code) == ("E_EMPTY", 2)


def test_control_characters_of_the_data_are_made_visible() -> None:
    shown = marked([("a\x1b[2J\nb", False), ("c\x07\n\nd", True)], color=False)
    assert shown == "    | a\\x1b[2J\n    | b[[c\\x07]]\n    | \n    | [[d]]"
    assert marked([("x", True)], color=True) == "    | \x1b[32mx\x1b[0m"


def test_the_example_data_is_clean(text: Any) -> None:
    folder = Path(__file__).resolve().parent.parent / "examples" / "tickets"
    report = look(text, folder / "train.jsonl", test=folder / "test.jsonl")
    assert len(report.examples) == 1_200 and report.warnings() == [] and not report.dropped
    assert report.tokens < 125_000
