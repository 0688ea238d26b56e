"""Keys and values in int8: half the memory, and the same bits whatever runs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engine_side import adapter_of
from reference import random_lora
from tiny import tiny_llama

pytest.importorskip("nomoat._native")

from nomoat import _native
from nomoat.engine.generate import Sampling, generate
from nomoat.engine.kv import Sequence
from nomoat.engine.model import Model
from nomoat.engine.stack import Stack
from nomoat.errors import InputError
from nomoat.hub.fit import kv_bytes_per_token

RNG = np.random.default_rng(8)
TOKENS = RNG.integers(3, 271, 150).tolist()  # three pages


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("kv") / "model.gguf", type="Q4_1", context=256)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return Model.load(path, threads=1, kv_type="int8")


@pytest.fixture
def one_thread_after() -> Iterator[None]:
    yield
    _native.set_threads(1)


def chunked(model: Model, size: int) -> np.ndarray[Any, Any]:
    """Logits of TOKENS, given to the model `size` at a time."""
    sequence, parts = Sequence(), []
    for at in range(0, len(TOKENS), size):
        part = TOKENS[at : at + size]
        parts.append(model.step([(sequence, part, None)], range(len(part))))
    model.pool().cut(sequence, 0)
    return np.concatenate(parts)


@pytest.mark.usefixtures("one_thread_after")
def test_chunks_and_threads_do_not_change_logits(model: Model) -> None:
    whole = model.logits(TOKENS)
    for size in (1, 2, 7, 16, 17, 64, 100):
        np.testing.assert_array_equal(chunked(model, size), whole, str(size))
    for threads in (2, 3, 8):
        _native.set_threads(threads)
        np.testing.assert_array_equal(model.logits(TOKENS), whole, f"{threads} threads")


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=40), Sampling(temperature=0.8, seed=3, max_tokens=40)])
def test_answers_do_not_depend_on_their_neighbours(model: Model, sampling: Sampling) -> None:
    prompts = [TOKENS[:70], TOKENS[3:20] * 3, TOKENS[5:6]]
    stacks = [None, Stack(model.spec, [(adapter_of(random_lora(model.spec, rank=4, seed=1)), 1.0)]), None]
    alone = [generate(model, [prompt], sampling, stacks=[stack])[0] for prompt, stack in zip(prompts, stacks, strict=True)]
    assert generate(model, prompts, sampling, stacks=stacks) == alone


def test_int8_is_near_bf16_and_other_precisions_do_not_use_it(path: Path, model: Model) -> None:
    plain = Model.load(path, threads=1)
    exact, found = plain.logits(TOKENS, precision="f32"), model.logits(TOKENS)
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    for precision in ("bf16", "f32"):
        np.testing.assert_array_equal(model.logits(TOKENS, precision=precision), plain.logits(TOKENS, precision=precision))


def test_pages_have_the_size_that_a_plan_counts_with(path: Path, model: Model) -> None:
    pages = {"int8": model.pool().native.page_bytes, "bf16": Model.load(path).pool().native.page_bytes}
    dim, stride = model.spec.head_dim, -(-model.spec.head_dim // 16) * 16  # a plan leaves the padding of a head out
    for kv_type, bytes_each in (("int8", 1), ("bf16", 2)):
        rows = 2 * 64 * sum(block.kv_heads for block in model.spec.blocks)
        planned = 64 * kv_bytes_per_token(model.spec, cast(Any, kv_type))
        assert pages[kv_type] == planned + rows * bytes_each * (stride - dim)
    assert pages["int8"] < pages["bf16"]


def test_an_unknown_type_is_refused(path: Path, model: Model) -> None:
    with pytest.raises(InputError, match="kv_type = 'int4'; expected one of bf16, int8"):
        Model.load(path, kv_type=cast(Any, "int4"))
    with pytest.raises(ValueError, match="int4"):
        _native.KvCache(model._engine, "int4")
