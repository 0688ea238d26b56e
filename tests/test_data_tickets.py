"""The example data: reproducible, answerable, and its test rows share nothing with training but the rules."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nomoat.data.readers import read_examples

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "tickets"
INTENTS = {
    "refund",
    "exchange",
    "cancel_order",
    "track_delivery",
    "damaged_item",
    "wrong_item",
    "change_address",
    "get_invoice",
}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tickets", FOLDER / "make_tickets.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def phrases() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "phrases.toml").read_text(encoding="utf-8"))


def tickets(split: str) -> list[tuple[str, dict[str, Any]]]:
    """(message, answer) of each row."""
    made = []
    for row in read_examples(FOLDER / f"{split}.jsonl"):
        assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
        made.append((row.messages[1]["content"], json.loads(row.messages[2]["content"])))
    return made


def sentences(value: Any) -> list[str]:
    """All strings of a phrase table."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [text for item in items for text in sentences(item)]


def test_the_files_are_what_the_generator_writes(generator: ModuleType, tmp_path: Path) -> None:
    generator.make(tmp_path)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_counts() -> None:
    table = phrases()
    assert len(tickets("train")) >= 1_200 and len(tickets("test")) == 200
    assert len(set(sentences(table["train"]["intents"]))) >= 120
    assert len(set(sentences(table["test"]["intents"]))) >= 40
    for split in ("train", "test"):
        messages = [message for message, _ in tickets(split)]
        assert len(set(messages)) == len(messages)
        counts = [sum(answer["intent"] == intent for _, answer in tickets(split)) for intent in INTENTS]
        assert max(counts) - min(counts) <= 1


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text).casefold().strip()


def test_nothing_of_the_test_occurs_in_training() -> None:
    table = phrases()
    for group in ("intents", "frames", "greetings"):
        train, test = ({normal(text) for text in sentences(table[split][group])} for split in ("train", "test"))
        assert not train & test
    train_words = {w for text in sentences(table["train"]["words"]) for w in normal(text).split()}
    test_words = {w for text in sentences(table["test"]["words"]) for w in normal(text).split()}
    assert not train_words & test_words
    seen = " \n".join(message for message, _ in tickets("train"))
    for message, answer in tickets("test"):
        assert message not in seen
        assert answer["product"] not in seen
        assert answer["order_number"] is None or answer["order_number"] not in seen
    names = set(table["test"]["words"]["name"])
    assert not any(re.search(rf"\b{name}\b", seen) for name in names)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_follows_from_the_message(split: str) -> None:
    cues = phrases()["cues"]
    high = [cue for key in cues if key.startswith("high") for cue in cues[key]]
    low = [cue for key in cues if key.startswith("low") for cue in cues[key]]
    for message, answer in tickets(split):
        assert list(answer) == ["intent", "product", "order_number", "urgency"] and answer["intent"] in INTENTS
        assert message.count(answer["product"]) == 1
        if answer["order_number"] is None:
            assert not re.search(r"\d{4}", message), message
        else:
            assert re.search(rf"(?<![\w#-]){re.escape(answer['order_number'])}(?![\w-])", message), message
        found_low = any(cue in message for cue in low)
        found_high = any(re.search(rf"(?<!not )(?<!not that )\b{cue}\b", message) for cue in high)
        expected = {(True, False): "low", (False, True): "high", (False, False): "normal"}[found_low, found_high]
        assert answer["urgency"] == expected, message


def test_rows_are_short(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared_data / "smollm_tokenizer" / "tokenizer.json"))
    lengths = [
        sum(len(tokenizer.encode(message["content"]).ids) + 5 for message in row.messages)
        for row in read_examples(FOLDER / "train.jsonl")
    ]
    assert sum(lengths) < 125_000, "the demo trains on these within minutes"
    assert max(lengths) <= 130
