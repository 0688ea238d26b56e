"""The demo asks about what nobody has trained on, and turns every event of training into readable lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from examples import demo


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_the_fresh_questions_are_in_neither_file() -> None:
    messages = [row["messages"] for split in ("train", "test") for row in demo.rows(split)]
    asked = [turns[1]["content"] for turns in messages]
    products = {json.loads(turns[2]["content"])["product"] for turns in messages}
    known = set().union(*map(words, products))
    for question, product in zip(demo.QUESTIONS, ("Thimble Ukulele", "Juniper Footrest"), strict=True):
        assert product in question
        assert not words(product) & known
        sentences = [s for s in re.split(r"[.?!\n]+\s*", question) if len(s.split()) > 3]
        assert sentences
        assert not any(sentence in text for sentence in sentences for text in asked)


def test_events_become_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen = demo.Screen()
    events = demo.Events(screen)
    scored = {"score": 0.125, "low": 0.086, "high": 0.178, "n": 200, "partial": 0.5}
    for event in (
        {"event": "inspected", "text": "not shown"},
        {"event": "plan", "text": "not shown"},
        {"event": "scoring", "when": "before", "done": 200, "total": 200},
        {"event": "before", "text": "", **scored},
        {
            "event": "step",
            "step": 1,
            "steps": 2,
            "loss": 1.5,
            "tokens_per_second": 1234.5,
            "memory_mb": 400.0,
            "eta_seconds": 61.0,
        },
        {"event": "validation", "step": 2, "steps": 2, "loss": 0.25},
        {"event": "after", "text": "", **scored},
    ):
        events(event)
    shown = capsys.readouterr().out
    assert "12.5 % of 200 answers are exactly right (95 % interval 8.6 to 17.8); 50.0 % of the fields" in shown
    assert "loss on rows held back: 0.250" in shown
    assert "not shown" not in shown
    assert [shown.index(f"{n}/5") for n in (2, 3, 4)] == sorted(shown.index(f"{n}/5") for n in (2, 3, 4))
    assert "\x1b" not in shown


def test_the_demo_shows_a_row_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_data(demo.Screen())
    shown = capsys.readouterr().out
    assert "1,200 messages to learn from; 200 for the test" in shown
    assert '-> {"intent":' in shown


def test_the_recipe_is_one_that_training_takes() -> None:
    from nomoat.train.plan import TrainOptions

    assert TrainOptions(**demo.RECIPE).batch_sequences == demo.RECIPE["batch_sequences"]
    assert (Path(demo.__file__).parent / "tickets" / "train.jsonl").is_file()
