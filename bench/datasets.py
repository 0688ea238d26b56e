"""Real tasks as rows of messages, with the metric that grades each.

    python bench/datasets.py NAME --out FOLDER [--shared ../shared/data] [--train N] [--test N] [--seed N]

writes train.jsonl and test.jsonl and prints their counts. Splits are the source's own where it has them; otherwise, and
for samples, they are drawn with a seed that names the set. The files themselves are not part of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nomoat.evals.metrics import rule_of

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Dataset:
    """`metric` is a name of `nomoat eval --metric`."""

    name: str
    train: list[Row]
    test: list[Row]
    metric: str
    licence: str

    def constant_score(self) -> float:
        """Score of the commonest answer, given to every test row: what any model must beat."""
        answers = [row["messages"][-1]["content"] for row in self.test]
        (constant, count), *_ = Counter(answers).most_common(1)
        grade = rule_of(self.metric).grade
        return count / len(answers) if grade is None else sum(grade(constant, answer) for answer in answers) / len(answers)


def ask(prompt: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def sample(items: Iterable[T], count: int | None, label: str, seed: int) -> list[T]:
    """`count` of the items (all if None or if there are fewer) in an order that depends on `label` and `seed` only."""
    dice = random.Random(f"{label} {seed}")
    order = sorted((dice.random(), at, item) for at, item in enumerate(items))
    return [item for _, _, item in order[:count]]


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def clinc150(shared: Path, train_rows: int | None, test_rows: int | None, seed: int) -> Dataset:
    """Intents: as many training rows of each of the 150 (20 = 3,000 in all), a sample of the official test rows."""
    data = json.loads((shared / "clinc150/data_full.json").read_text(encoding="utf-8"))
    by_intent: dict[str, list[str]] = defaultdict(list)
    for text, intent in data["train"]:
        by_intent[intent].append(text)
    each = (3_000 if train_rows is None else train_rows) // len(by_intent)
    chosen = [(text, intent) for intent, texts in by_intent.items() for text in sample(texts, each, intent, seed)]

    def row(pair: Sequence[str]) -> Row:
        return ask(f"Classify the intent of this message: {pair[0]}", pair[1])

    train = [row(pair) for pair in sample(chosen, None, "clinc150 train", seed)]
    test = [row(pair) for pair in sample(data["test"], test_rows or 600, "clinc150 test", seed)]
    return Dataset("clinc150", train, test, "exact", "CC BY 3.0")


def wnut17(shared: Path, train_rows: int | None, test_rows: int | None, seed: int) -> Dataset:
    """Entities of a sentence as JSON, by type. Training keeps one sentence without entities for every two with some."""

    def row(sentence: tuple[str, dict[str, list[str]]]) -> Row:
        return ask(f"List the named entities in this text as JSON: {sentence[0]}", compact(sentence[1]))

    sentences = _conll(shared / "wnut17/wnut17train.conll")
    some, none = [s for s in sentences if s[1]], [s for s in sentences if not s[1]]
    mixed = some + sample(none, len(some) // 2, "wnut17 none", seed)
    train = [row(sentence) for sentence in sample(mixed, train_rows, "wnut17 train", seed)]
    official = _conll(shared / "wnut17/emerging.test.annotated")
    test = [row(sentence) for sentence in sample(official, test_rows or 400, "wnut17 test", seed)]
    return Dataset("wnut17", train, test, "json", "CC BY 4.0")


def _conll(path: Path) -> list[tuple[str, dict[str, list[str]]]]:
    """(sentence, {type: [entity, ...]}) of a file with one token and its B-/I-/O label a line."""
    made = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        pairs = [line.split("\t")[:2] for line in block.splitlines() if "\t" in line and line.strip()]
        if not pairs:
            continue
        found: dict[str, list[str]] = defaultdict(list)
        for token, label in pairs:
            kind = label.strip()[2:]
            if label.startswith("B-") or (label.startswith("I-") and not found[kind]):
                found[kind].append(token)
            elif label.startswith("I-"):
                found[kind][-1] += f" {token}"
        made.append((" ".join(token for token, _ in pairs), dict(sorted(found.items()))))
    return made


def wikisql(shared: Path, train_rows: int | None, test_rows: int | None, seed: int) -> Dataset:
    """Question about one table -> SQL. The files' own training rows; their 100 validation and 100 test rows are the test."""

    def rows(*names: str) -> list[Row]:
        made = []
        for name in names:
            for line in (shared / "wikisql_mlx" / name).read_text(encoding="utf-8").splitlines():
                prompt, answer = json.loads(line)["text"].rsplit("\nA: ", 1)
                made.append(ask(prompt, answer.strip()))
        return made

    train = sample_rows(rows("train.jsonl"), train_rows, "wikisql train", seed)
    test = sample_rows(rows("valid.jsonl", "test.jsonl"), test_rows, "wikisql test", seed)
    return Dataset("wikisql", train, test, "exact", "MIT, BSD-3-Clause")


def nl2bash(shared: Path, train_rows: int | None, test_rows: int | None, seed: int) -> Dataset:
    """English -> one bash command. Split by command, 90/10, so that no command of the test occurs in training."""
    english = (shared / "nl2bash/all.nl").read_text(encoding="utf-8").splitlines()
    commands = (shared / "nl2bash/all.cm").read_text(encoding="utf-8").splitlines()
    by_command: dict[str, list[str]] = defaultdict(list)
    for text, command in zip(english, commands, strict=True):
        by_command[" ".join(command.split())].append(text.strip())
    order = sample(by_command, None, "nl2bash split", seed)
    held_out = len(order) // 10

    def made(text: str, command: str) -> Row:
        return ask(f"Write a bash command: {text}", command)

    test = [made(by_command[command][0], command) for command in order[:held_out]][: test_rows or 300]
    asked = {row["messages"][0]["content"] for row in test}
    rest = [made(text, command) for command in order[held_out:] for text in by_command[command]]
    rest = [row for row in rest if row["messages"][0]["content"] not in asked]  # one request may have several commands
    return Dataset("nl2bash", sample_rows(rest, train_rows, "nl2bash train", seed), test, "rouge", "MIT")


def bfcl(shared: Path, train_rows: int | None, test_rows: int | None, seed: int) -> Dataset:
    """One question and the tools at hand -> one call as JSON. Train: live_simple and multiple; test: simple_python.

    The test keeps the rows whose reference allows one call only, so that equality of JSON is the whole truth.
    """
    folder = shared / "bfcl"
    train = _bfcl_rows(folder, "live_simple", only_one=False) + _bfcl_rows(folder, "multiple", only_one=False)
    test = _bfcl_rows(folder, "simple_python", only_one=True)
    return Dataset(
        "bfcl",
        sample_rows(train, train_rows, "bfcl train", seed),
        sample_rows(test, test_rows, "bfcl test", seed),
        "json",
        "Apache-2.0",
    )


def _bfcl_rows(folder: Path, part: str, *, only_one: bool) -> list[Row]:
    """Of several allowed values the first is the answer; an argument that may be left out ("" is allowed) is left out."""
    questions = (folder / f"question/BFCL_v4_{part}.json").read_text(encoding="utf-8").splitlines()
    answers = (folder / f"possible_answer/BFCL_v4_{part}.json").read_text(encoding="utf-8").splitlines()
    truth = {item["id"]: item["ground_truth"] for item in map(json.loads, answers)}
    made = []
    for item in map(json.loads, questions):
        ((name, allowed),) = truth[item["id"]][0].items()
        asked = [message["content"] for message in item["question"][0] if message["role"] == "user"]
        plain = all(values and not any(isinstance(value, dict) for value in values) for values in allowed.values())
        if len(asked) != 1 or not plain or (only_one and any(len(values) != 1 for values in allowed.values())):
            continue  # nested references list alternatives at every level
        call = {"name": name, "arguments": {key: values[0] for key, values in allowed.items() if "" not in values}}
        tools = "\n".join(compact(tool) for tool in item["function"])
        made.append(ask(f"Tools:\n{tools}\n\nAnswer with one call as JSON.\n{asked[0]}", compact(call)))
    return made


def sms_spam(shared: Path, train_rows: int | None, test_rows: int | None, seed: int) -> Dataset:
    """Message -> spam or ham, 80/20 of the distinct messages."""
    lines = (shared / "sms_spam/sms.tsv").read_text(encoding="utf-8").splitlines()
    distinct = {text: label for label, text in (line.split("\t", 1) for line in lines)}
    pairs = sample(distinct.items(), None, "sms_spam split", seed)
    rows = [ask(f"Is this message spam or ham? {text}", label) for text, label in pairs]
    cut = len(rows) * 4 // 5
    return Dataset("sms_spam", rows[:cut][: train_rows or 1_000], rows[cut:][: test_rows or 500], "exact", "CC BY 4.0")


def gsm8k(shared: Path, train_rows: int | None, test_rows: int | None, seed: int) -> Dataset:
    """School maths with its working; graded by the last number. Calculator notes (<<2*3=6>>) are taken out."""

    def rows(name: str) -> list[Row]:
        lines = (shared / "gsm8k" / name).read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        return [ask(item["question"], re.sub(r"<<.*?>>", "", item["answer"])) for item in items]

    train = sample_rows(rows("train.jsonl"), train_rows or 2_000, "gsm8k train", seed)
    return Dataset("gsm8k", train, sample_rows(rows("test.jsonl"), test_rows or 300, "gsm8k test", seed), "numeric", "MIT")


def sample_rows(rows: list[Row], count: int | None, label: str, seed: int) -> list[Row]:
    return [rows[at] for at in sample(range(len(rows)), count, label, seed)]


DATASETS: dict[str, Callable[[Path, int | None, int | None, int], Dataset]] = {
    "clinc150": clinc150,
    "wnut17": wnut17,
    "wikisql": wikisql,
    "nl2bash": nl2bash,
    "bfcl": bfcl,
    "sms_spam": sms_spam,
    "gsm8k": gsm8k,
}


def load(name: str, shared: Path, *, train_rows: int | None = None, test_rows: int | None = None, seed: int = 0) -> Dataset:
    """One of DATASETS out of the folder `shared`; None takes the set's own number of rows."""
    return DATASETS[name](shared, train_rows, test_rows, seed)


def main() -> None:
    default = os.environ.get("NOMOAT_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(DATASETS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path(default))
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = load(given.name, given.shared, train_rows=given.train, test_rows=given.test, seed=given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", made.train), ("test", made.test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    counts = {"train": len(made.train), "test": len(made.test), "metric": made.metric, "licence": made.licence}
    print(json.dumps({"name": made.name, **counts, "constant_score": round(made.constant_score(), 4)}))


if __name__ == "__main__":
    main()
