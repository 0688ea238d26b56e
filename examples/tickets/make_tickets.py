"""Writes train.jsonl and test.jsonl: messages of customers, and the JSON that a ticket system wants from each.

    python examples/tickets/make_tickets.py [FOLDER]

The rows are made from phrases.toml by a seeded generator: the same bytes on every machine and Python version. The test
rows use no sentence, person or product word of the training rows (tests/test_data_tickets.py checks it).
"""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEED = 20_240_607
TRAIN_ROWS = 1_200
TEST_ROWS = 200
SYSTEM = "Extract intent, product, order_number and urgency (low, normal, high) as JSON."
HERE = Path(__file__).resolve().parent

_SLOT = re.compile(r"(\{\w+\})")
_WORD = re.compile(r"[a-z]{5,}")


class Dice:
    """random.Random whose only source is random(): its other methods may change between Python versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def below(self, limit: int) -> int:
        return int(self._random.random() * limit)

    def pick(self, items: Sequence[str]) -> str:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        return [item for _, _, item in sorted((self._random.random(), at, item) for at, item in enumerate(items))]


def order_number(dice: Dice) -> str:
    """Six shapes; what a customer writes is what the answer holds."""
    shape = dice.below(6)
    digits = f"{10_000 + dice.below(90_000)}"
    if shape == 0:
        return f"{dice.pick('ABCDEFGHKM')}-{digits}"
    if shape == 1:
        return f"#{digits}{dice.below(10)}"
    if shape == 2:
        return f"ORD-{2021 + dice.below(5)}-{digits[:4]}"
    if shape == 3:
        return f"{dice.pick('KTWX')}{dice.pick('PRSXZ')}{digits}"
    if shape == 4:
        return f"{digits[:3]}-{dice.below(10)}{digits[1:4]}"
    return digits + digits[2]


def product(words: dict[str, list[str]], shared: dict[str, list[str]], dice: Dice) -> str:
    name = f"{dice.pick(words['product_first'])} {dice.pick(words['product_last'])}"
    return f"{name} {dice.pick(shared['model'])}" if dice.chance(0.25) else name


def urgency_sentence(phrases: dict[str, Any], split: str, level: str, dice: Dice) -> str:
    """A sentence with a cue phrase of that level; for `normal` one without, or none at all."""
    frames = phrases[split]["frames"]
    if level == "normal":
        return dice.pick(frames["neutral"]) if dice.chance(0.6) else ""
    kind = dice.pick([key for key in phrases["cues"] if key.startswith(level)])
    # as a slot of its own name, so that style and typos leave the cue alone
    return dice.pick(frames[kind]).replace("{cue}", "{cue_" + dice.pick(phrases["cues"][kind]).replace(" ", "_") + "}")


def with_typo(text: str, dice: Dice) -> str:
    """One slip in one longer word: two letters swapped, one lost, or one doubled."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    word = words[dice.below(len(words))]
    at = word.start() + 1 + dice.below(len(word[0]) - 2)
    slips = (text[at + 1] + text[at], text[at + 1], text[at] + text[at] + text[at + 1])
    return text[:at] + slips[dice.below(3)] + text[at + 2 :]


def styled(sentences: list[str], style: str, typo: bool, dice: Dice) -> str:
    """Joined in the customer's manner. Only the words around the slots change, never what goes into a slot."""
    text = ("\n" if style == "letter" else " ").join(sentences)
    parts = _SLOT.split(text)
    plain = [at for at in range(0, len(parts), 2) if _WORD.search(parts[at])]
    if typo and plain:
        at = plain[dice.below(len(plain))]
        parts[at] = with_typo(parts[at], dice)
    for at in range(0, len(parts), 2):
        if style == "chat":
            parts[at] = parts[at].lower()
        elif style == "angry":
            parts[at] = re.sub(r"\.(?= |$)", "!", parts[at])
    return "".join(parts)


def filled(text: str, values: dict[str, str]) -> str:
    def value(slot: re.Match[str]) -> str:
        name = slot[0][1:-1]
        return name.removeprefix("cue_").replace("_", " ") if name.startswith("cue_") else values[name]

    return _SLOT.sub(value, text)


def message_of(phrases: dict[str, Any], split: str, core: str, order: str | None, level: str, dice: Dice) -> tuple[str, str]:
    """(the customer's message, the product in it)."""
    own, shared = phrases[split], phrases["shared"]
    style = ("plain", "plain", "plain", "letter", "chat", "chat", "angry")[dice.below(7)]
    named = dice.chance(0.2)
    body = [core]
    if order is not None and "{order}" not in core:
        body.insert(dice.below(2), dice.pick(own["frames"]["order"]))
    if cue := urgency_sentence(phrases, split, level, dice):
        body.insert(0 if level != "normal" and dice.chance(0.2) else len(body), cue)
    if style == "letter":
        body = [" ".join(body)]
    sentences = list(body)
    if named:
        sentences.insert(0, dice.pick(own["greetings"]["named"]))
    elif dice.chance(0.5) or style == "letter":
        sentences.insert(0, dice.pick(own["greetings"]["plain"]))
    if not named and (style == "letter" or dice.chance(0.15)):
        sentences.append(dice.pick(own["frames"]["sign_off"]))
    text = styled(sentences, style, dice.chance(0.2), dice)
    what = product(own["words"], shared, dice)
    values = {
        "product": what,
        "order": order or "",
        "name": dice.pick(own["words"]["name"]),
        "when": dice.pick(shared["when"]),
        "price": f"${10 + dice.below(180)}.{('00', '50', '90', '95', '99')[dice.below(5)]}",
    }
    return filled(text, values), what


def rows(phrases: dict[str, Any], split: str, count: int, dice: Dice, taken: set[str]) -> list[dict[str, Any]]:
    """`count` distinct rows; intents and, within each, sentences take turns, so each is used about equally often.

    Order numbers in `taken` are not used; the new ones are added to it.
    """
    intents = phrases[split]["intents"]
    waiting: dict[str, list[str]] = {intent: [] for intent in intents}
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(made) < count:
        intent = list(intents)[len(made) % len(intents)]
        if not waiting[intent]:
            waiting[intent] = dice.shuffled(intents[intent])
        core = waiting[intent].pop()
        order = order_number(dice) if "{order}" in core or dice.chance(0.5) else None
        while order is not None and order in taken:
            order = order_number(dice)
        level = ("low", "normal", "high")[dice.below(3)]
        text, what = message_of(phrases, split, core, order, level, dice)
        if text in seen:
            continue
        seen.add(text)
        taken.update([order] if order else [])
        answer = {"intent": intent, "product": what, "order_number": order, "urgency": level}
        made.append(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
                ]
            }
        )
    return dice.shuffled(made)


def make(folder: Path) -> None:
    """Writes the two files into `folder`."""
    phrases = tomllib.loads((HERE / "phrases.toml").read_text(encoding="utf-8"))
    orders: set[str] = set()
    for split, count, seed in (("train", TRAIN_ROWS, SEED), ("test", TEST_ROWS, SEED + 1)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(phrases, split, count, Dice(seed), orders))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
