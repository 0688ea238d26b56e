"""Well-formed files that describe an impossible model or vocabulary: one typed error, before anything is computed with them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hostile import model_cases
from hostile.case import Case, check
from hostile.gguf_bytes import ARRAY, STRING, key, model
from nomoat.errors import InputError
from nomoat.files.gguf import open_gguf
from nomoat.models import spec_from_gguf
from nomoat.text.tokenizer import Tokenizer

CASES = list(model_cases.cases())
ROWS = sorted({case.row for case in CASES})


def describe(path: Path) -> None:
    """What every command does first with a model."""
    with open_gguf(path) as file:
        spec = spec_from_gguf(file)
        tokenizer = Tokenizer.from_gguf(file)
        assert spec.vocab == tokenizer.vocab_size
        tokenizer.decode(tokenizer.encode("abcd ab"))


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports are not part of any measurement."""
    path = tmp_path_factory.mktemp("warm") / "m.gguf"
    for case in CASES:
        if case.name == "valid":
            path.write_bytes(case.data)
            describe(path)
            with open_gguf(path) as file:
                tokenizer = Tokenizer.from_gguf(file)
                assert tokenizer.decode(tokenizer.encode("abcd ab")).strip() == "abcd ab"


def test_rows_are_complete() -> None:
    assert [f"G{i}" for i in (21, 22, 23, 24, 25, 39, 40, 42, 43, 44, 45)] == ROWS
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(case.data)
    check(path, case.codes, describe)


@pytest.mark.parametrize("name", ["llama.block_count", "llama.attention.head_count", "tokenizer.ggml.tokens"])
def test_missing_keys_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model().without(name).build())
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        describe(path)


def test_million_merges_load_in_linear_time(tmp_path: Path) -> None:
    """G45: twice the merges may not take four times as long. Repeats of known merges, the worst case a loader can be given."""
    seconds = []
    for count in (50_000, 100_000):
        merges = key("tokenizer.ggml.merges", ARRAY, ["a b"] * count, element=STRING)
        path = tmp_path / f"{count}.gguf"
        path.write_bytes(model_cases._byte_level(["a b"]).with_raw("tokenizer.ggml.merges", merges).build())
        best = 1e9
        for _ in range(3):
            began = time.process_time()
            try:
                describe(path)
            except InputError:
                pass
            best = min(best, time.process_time() - began)
        seconds.append(best)
    assert seconds[1] < 3 * seconds[0] + 0.05
