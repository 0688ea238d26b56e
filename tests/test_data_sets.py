"""bench/datasets.py makes usable rows of the real data: counts, splits without overlap, reproducible, readable."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nomoat.data.readers import read_examples

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "datasets.py"

# name -> (training rows, test rows, metric)
EXPECTED = {
    "clinc150": (3_000, 600, "exact"),
    "wnut17": (1_842, 400, "json"),
    "wikisql": (1_000, 200, "exact"),
    "nl2bash": (11_275, 300, "rouge"),
    "bfcl": (437, 136, "json"),
    "sms_spam": (1_000, 500, "exact"),
    "gsm8k": (2_000, 300, "numeric"),
}


@pytest.fixture(scope="module")
def datasets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_datasets", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prompts(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def test_every_set_is_expected_here(datasets: ModuleType) -> None:
    assert datasets.DATASETS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_rows(name: str, datasets: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    made = datasets.load(name, shared_data)
    assert (len(made.train), len(made.test), made.metric) == EXPECTED[name]
    assert made.licence and made.constant_score() < 1
    assert not prompts(made.train) & prompts(made.test)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made.train + made.test), encoding="utf-8")
    rows = read_examples(path)
    assert len(rows) == len(made.train) + len(made.test)
    assert all(row.messages[-1]["role"] == "assistant" and row.messages[-1]["content"] for row in rows)
    if made.metric == "json":
        assert all(isinstance(json.loads(row.messages[-1]["content"]), dict) for row in rows)
    assert datasets.load(name, shared_data).train == made.train
    assert datasets.load(name, shared_data, seed=1).test != made.test or name in ("wikisql", "bfcl")
    assert len(datasets.load(name, shared_data, train_rows=150, test_rows=10).train) == 150


def test_clinc150_has_20_rows_of_each_intent(datasets: ModuleType, shared_data: Path) -> None:
    made = datasets.load("clinc150", shared_data)
    labels = [row["messages"][1]["content"] for row in made.train]
    assert {labels.count(label) for label in set(labels)} == {20} and len(set(labels)) == 150
    assert made.train[0]["messages"][0]["content"].startswith("Classify the intent of this message: ")


def test_nl2bash_is_split_by_command(datasets: ModuleType, shared_data: Path) -> None:
    made = datasets.load("nl2bash", shared_data, train_rows=100_000)
    train, test = ({row["messages"][1]["content"] for row in rows} for rows in (made.train, made.test))
    assert len(made.train) > 10_000 and not train & test


def test_wnut17_joins_the_tokens_of_an_entity(datasets: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    lines = [
        "Tom\tB-person",
        "Baker\tI-person",
        "met\tO",
        "Ann\tB-person",
        "in\tO",
        "Rome\tI-location",
        "",
        "no\tO",
        "\t",
        "!\tO",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert datasets._conll(path) == [
        ("Tom Baker met Ann in Rome", {"location": ["Rome"], "person": ["Tom Baker", "Ann"]}),
        ("no", {}),
        ("!", {}),
    ]


def test_the_command_writes_both_files(shared_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "wikisql", "--out", str(tmp_path / "out"), "--shared", str(shared_data)]
    done = subprocess.run([*command, "--train", "5", "--test", "3"], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert (said["train"], said["test"], said["metric"]) == (5, 3, "exact")
    assert len(read_examples(tmp_path / "out/train.jsonl")) == 5 and len(read_examples(tmp_path / "out/test.jsonl")) == 3
