"""Broken weights, broken calls, threads and forks: an error or NaN that is reported, never a crash, never a plausible number."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_side import random_pack, relative_error
from reference import Reference
from tiny import source_name, tiny_llama

pytest.importorskip("nomoat._native")

from nomoat import _native
from nomoat.engine.generate import Sampling, generate
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.errors import NonFiniteError
from nomoat.files.gguf import open_gguf
from nomoat.models.spec import TARGETS

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ["int8", "bf16", "f32"]
TOKENS = [1, 52, 287, 11, 3, 3, 200, 77, 140]
GREEDY = Sampling(max_tokens=4)
NAN, INFINITY, SUBNORMAL = b"\x00\x7e", b"\x00\x7c", b"\x03\x00"  # float16
Q4_0_BLOCK = 18


@pytest.fixture(autouse=True)
def one_thread_after() -> Iterator[None]:
    """The thread count belongs to the process."""
    yield
    _native.set_threads(1)


def overwrite(path: Path, tensor: str, at: int, data: bytes, step: int | None = None) -> Path:
    """Puts `data` at byte `at` of a tensor, named as the engine names it; every `step` bytes if one is given."""
    with open_gguf(path) as file:
        info = file.tensors[source_name(tensor, hf=False)]
    content = bytearray(path.read_bytes())
    for offset in range(at, info.nbytes, step or info.nbytes):
        content[info.offset + offset : info.offset + offset + len(data)] = data
    path.write_bytes(content)
    return path


def refusals(model: Model) -> list[Callable[[], object]]:
    """Everything that gives numbers to the rest of the program."""
    pack = random_pack(model.spec.vocab, (12, 5), seed=1)
    lora = TrainableLora(model.spec, rank=2)
    d_logp = np.ones(np.count_nonzero(pack.weights), np.float32)
    return [
        lambda: model.logprobs(pack),
        lambda: model.loss_gradients(pack, lora, d_logp),
        lambda: generate(model, [TOKENS], GREEDY),
        lambda: generate(model, [TOKENS], Sampling(temperature=1.0, top_k=5, top_p=0.9, max_tokens=4)),
    ]


@pytest.mark.parametrize("damage", [NAN, INFINITY, b"\xff" * Q4_0_BLOCK], ids=["nan", "infinity", "all ones"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_block_makes_every_logit_nan(target: str, damage: bytes, tmp_path: Path) -> None:
    """One block of one row of the second layer: its output, then all rows, and no part of the program takes them for numbers."""
    path = overwrite(tiny_llama(tmp_path / "model.gguf", type="Q4_0"), f"blk.1.{target}", 5 * 2 * Q4_0_BLOCK, damage)
    model = Model.load(path, threads=2)
    for precision in PRECISIONS:
        logits = model.logits(TOKENS, precision=precision)
        assert np.isnan(logits).all(), precision
    for call in refusals(model):
        with pytest.raises(NonFiniteError):
            call()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", ["blk.0.attn_norm", "blk.1.mlp_norm", "final_norm"])
def test_a_broken_norm_makes_every_logit_nan(norm: str, value: float, tmp_path: Path) -> None:
    path = overwrite(tiny_llama(tmp_path / "model.gguf", type="Q4_0"), norm, 4 * 7, np.float32(value).tobytes())
    model = Model.load(path)
    for precision in PRECISIONS:
        assert not np.isfinite(model.logits(TOKENS, precision=precision)).any(), precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_broken_embedding_is_seen_from_its_token_on(precision: str, tmp_path: Path) -> None:
    """Token 3 stands at position 4. Nothing before it may be touched, nothing behind it may look healthy."""
    path = tiny_llama(tmp_path / "model.gguf", type="Q4_0", tied=False)
    healthy = Model.load(path).logits(TOKENS, precision=precision)
    overwrite(path, "embed", 3 * 2 * Q4_0_BLOCK, NAN)
    model = Model.load(path)
    logits = np.concatenate([model.logits(TOKENS[:4], precision=precision), model.logits(TOKENS, precision=precision)[4:]])
    np.testing.assert_array_equal(logits[:4], healthy[:4])
    assert np.isnan(logits[4:]).all()


def test_a_broken_head_row_is_that_token_and_ends_generation(tmp_path: Path) -> None:
    """The other logits are numbers, so greedy choice could pass over it."""
    path = overwrite(tiny_llama(tmp_path / "model.gguf", type="Q4_0", tied=False), "head", 40 * 2 * Q4_0_BLOCK, NAN)
    model = Model.load(path)
    for precision in PRECISIONS:
        broken = np.isnan(model.logits(TOKENS, precision=precision))
        assert broken[:, 40].all()
        assert broken.sum() == len(TOKENS)
    for call in refusals(model):
        with pytest.raises(NonFiniteError):
            call()


def test_a_broken_cache_page_is_harmless_once_it_is_given_back(tmp_path: Path) -> None:
    """Pages are reused: NaN keys and values that one sequence left must not reach the next."""
    path = tiny_llama(tmp_path / "model.gguf", type="Q4_0", tied=False)
    healthy = Model.load(path).logits(TOKENS)
    model = Model.load(overwrite(path, "embed", 250 * 2 * Q4_0_BLOCK, NAN))
    assert np.isnan(model.logits([250] * 60)).all()
    np.testing.assert_array_equal(model.logits(TOKENS), healthy)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_subnormal_scales_are_numbers(precision: str, tmp_path: Path) -> None:
    """Every scale of `down` is 3 x 2^-24: the layer's output is almost zero, not zero, and not garbage."""
    path = overwrite(tiny_llama(tmp_path / "model.gguf", type="Q4_0"), "blk.0.down", 0, SUBNORMAL, Q4_0_BLOCK)
    assert relative_error(Model.load(path).logits(TOKENS, precision=precision), Reference.load(path).logits(TOKENS)) < 0.04


def test_sampling_gives_back_a_logit_that_is_no_number() -> None:
    """At every place and under every filter, so that the caller sees it. Sorting by NaN must not leave the array."""
    rng = np.random.default_rng(0)
    for filters in [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 40, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 40, 0.5, 0.1)]:
        for value in (np.nan, np.inf):
            logits = rng.standard_normal((2, 3000)).astype(np.float32)
            places = rng.integers(3000, size=2).tolist()
            logits[[0, 1], places] = value
            assert _native.sample(logits, [_native.Sampling(*filters, 1.0, 0.0, 0.0, 1)] * 2, [(), ()], [2, 3]) == places


# ---- calls ---------------------------------------------------------------------------------------------------------------


LAYER: dict[str, int] = {"heads": 2, "kv_heads": 1, "ffn": 32}


def engine(layer: dict[str, int] = LAYER, **changes: Any) -> _native.Engine:
    dimensions: dict[str, Any] = {"layers": 1, "width": 32, "head_dim": 16, "vocab": 40, "context": 64, "eps": 1e-5}
    made = _native.Engine(**(dimensions | changes))
    made.add_rope(False, np.ones(8, np.float32), 1.0)
    made.set_layer(0, **(LAYER | layer))
    return made


def batch(
    counts: Sequence[int] = (3,),
    *,
    positions: Sequence[int] = (0,),
    pages: Sequence[Sequence[int]] = ((0,),),
    prefix: int = 0,
    read: Sequence[int] | None = None,
) -> _native.Batch:
    return _native.Batch(counts, positions, pages, [], prefix, read)


def forward(precision: str = "int8", tokens: Sequence[int] = (1, 2, 3), x: Any = None, logits: Any = None) -> None:
    made = engine()
    made.forward(precision, tokens, batch(), _native.KvCache(made), x, logits)


def record(layer: int, rows: int = 3) -> None:
    made = engine()
    made.record_layer(layer, floats(rows, 32), batch(), _native.Tape(made, "f32"))


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: engine(layers=0), "positive"),
    (lambda: engine({"ffn": 0}), "positive"),
    (lambda: engine({"heads": 3, "kv_heads": 2}), "times the kv heads"),
    (lambda: engine({"heads": 130, "kv_heads": 2}), "times the kv heads"),
    (lambda: engine({"window": -1}), "window"),
    (lambda: engine({"rope": 1}), "rope 1 of 1"),
    (lambda: engine({"experts": 4, "ffn": 24}), "multiple of 16"),
    (lambda: engine({"shared": 32}), "beside others"),
    (lambda: engine({"experts": 4, "shared": -1}), "must not be negative"),
    (lambda: engine(qk_norm=3), "qk_norm"),
    (lambda: engine(score_cap=-1.0), "caps"),
    (lambda: engine(head_dim=15), "head dimension"),
    (lambda: engine(head_dim=1024), "head dimension"),
    (lambda: engine().add_rope(False, np.ones(9, np.float32), 1.0), "rope dimension"),
    (lambda: engine().set_layer(1, **LAYER), "layer 1 of 1"),
    (lambda: engine().set_linear(0, 0, 2, np.zeros(10, np.uint8)), "packed weights"),
    (lambda: engine().set_linear(1, 0, 2, np.zeros(10, np.uint8)), "layer 1 of 1"),
    (lambda: engine().set_linear(-1, 0, 2, np.zeros(10, np.uint8)), "layer -1 of 1"),
    (lambda: engine().set_linear(0, 7, 2, np.zeros(10, np.uint8)), "target"),
    (lambda: engine().set_linear(0, 0, 99, np.zeros(10, np.uint8)), "format 99"),
    (lambda: engine().set_vector(0, "attn_norm", floats(31)), "'attn_norm': 31 values, expected 32"),
    (lambda: engine().set_vector(0, "q_bias", floats(64)), "expected 32"),
    (lambda: engine().set_vector(0, "q_norm", floats(32)), "qk_norm is 0"),
    (lambda: engine().set_vector(0, "value_norm", floats(32)), "not known"),
    (lambda: engine().set_vector(-1, "attn_norm", floats(32)), "not known"),
    (lambda: engine().set_vector(1, "attn_norm", floats(32)), "layer 1 of 1"),
    (lambda: batch((0,)), "non-empty"),
    (lambda: batch((-3,)), "non-empty"),
    (lambda: batch(positions=(-1,)), "non-empty"),
    (lambda: batch((65,)), "page table too short"),
    (lambda: batch((2**31 - 1,)), "page table too short"),
    (lambda: batch(positions=(62,)), "page table too short"),
    (lambda: batch(positions=(2**31 - 1,)), "page table too short"),
    (lambda: batch(pages=((),)), "page table too short"),
    (lambda: batch(pages=((-1,),)), "negative page"),
    (lambda: batch((3, 1)), "length"),
    (lambda: batch(pages=((0,), (1,))), "length"),
    (lambda: batch(prefix=2), "with a prefix"),
    (lambda: batch(prefix=-3), "with a prefix"),
    (lambda: batch((3, 1), positions=(0, 5), pages=((0,), (1,)), prefix=3), "with a prefix"),
    (lambda: batch(read=(0, 3)), "ascend, below 3"),
    (lambda: batch(read=(-1,)), "ascend"),
    (lambda: batch(read=(1, 1)), "ascend"),
    (lambda: engine().embed([0, 40], floats(2, 32)), "token 40"),
    (lambda: engine().embed([-1], floats(1, 32)), "token -1"),
    (lambda: engine().embed([0], floats(1, 31)), "x must be"),
    (lambda: forward(tokens=[1, 2]), "2 tokens for 3 rows"),
    (lambda: forward(), "either x or logits"),
    (lambda: forward(x=floats(3, 32), logits=floats(3, 64)), "either x or logits"),
    (lambda: forward("int4", x=floats(3, 32)), "int4"),
    (lambda: forward(x=floats(2, 32)), "x must be"),
    (lambda: forward(logits=floats(3, 40)), "logits must be"),
    (lambda: forward(tokens=[1, 2, 40], x=floats(3, 32)), "token 40"),
    (lambda: forward(x=floats(3, 32)), "embedding has not been set"),
    (lambda: record(0), "weight 0 has not been set"),
    (lambda: record(1), "layer 1 of 1"),
    (lambda: record(0, rows=2), "x must be"),
    (lambda: engine().embed([0], floats(1, 32)), "embedding has not been set"),
    (lambda: _native.Tape(engine(), "int8"), "bf16 or f32"),
    (lambda: engine().logprobs("f32", floats(2, 32), ids(2), ids(1), floats(1)), "row 2"),
    (lambda: engine().logprobs("f32", floats(2, 32), ids(1), ids(1), floats(1)), "head or its norm has not been set"),
    (lambda: engine().logprobs("f32", floats(2, 32), ids(0), ids(40), floats(1)), "target 40"),
    (lambda: engine().logprobs("f32", floats(2, 32), ids(0), ids(1), floats(2)), "agree in length"),
    (lambda: engine().logprobs("f32", floats(2, 32), ids(0), ids(1), floats(1), floats(1)), "come together"),
    (lambda: _native.LoraSet(1).set(1, 0, floats(2, 32), floats(2, 32), floats(2)), "layer or target"),
    (lambda: _native.LoraSet(1).set(0, 0, floats(2, 32), floats(3, 32), floats(2)), "rank"),
    (lambda: _native.LoraSet(1).set(0, 0, floats(2, 32), floats(2, 32), floats(2), floats(3, 32), floats(3, 32)), "gradients"),
    (lambda: _native.sample(floats(1, 0), [Sampling().native()], [()], [0]), "rows side by side"),
    (lambda: _native.sample(floats(4, 4).T[:1], [Sampling().native()], [()], [0]), "rows side by side"),
    (lambda: _native.sample(floats(1, 4), [Sampling().native()], [(4,)], [0]), "token 4"),
    (lambda: _native.sample(floats(2, 4), [Sampling().native()], [(), ()], [0, 0]), "length"),
    (lambda: _native.adamw(floats(3), floats(4), floats(3), floats(3), 1e-3, 0.9, 0.999, 1e-8, 0.0, 1), "differ in size"),
    (lambda: _native.adamw(floats(3), floats(3), floats(3), floats(3), 1e-3, 0.9, 0.999, 1e-8, 0.0, 0), "from 1"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[f"{i}: {words}" for i, (_, words) in enumerate(REFUSED)])
def test_calls_that_do_not_fit_are_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 32)), np.zeros((2, 64), np.float32)[:, ::2], np.zeros((32, 2), np.float32).T, None, [[0.0] * 32] * 2],
    ids=["float64", "strided", "transposed", "none", "list"],
)
def test_arrays_of_another_kind_are_refused(x: Any) -> None:
    """Never converted in silence: the engine would write its result into a copy."""
    with pytest.raises(TypeError):
        engine().embed([1, 2], x)


OBJECTS = sorted((ROOT / "build").glob("*/CMakeFiles/nomoat_engine.dir/native/kernel/*.cc.o"))


@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="no object files under build/, or no nm to read them")
def test_levels_share_no_machine_code() -> None:
    """Of two functions with one name the linker keeps one, and an old processor would run the one made for a new one."""
    for file in OBJECTS:
        if file.name == "select.cc.o":
            continue
        listing = subprocess.run(
            ["nm", "--defined-only", "--extern-only", "-C", file], capture_output=True, text=True, check=True
        )
        names = [line.split(" ", 2)[2] for line in listing.stdout.splitlines()]
        level = file.name.removesuffix(".cc.o")
        assert [name for name in names if not name.startswith("DW.ref.")] == [f"nomoat::{level}_kernels()"], file


# ---- threads and processes -------------------------------------------------------------------------------------------------


def test_two_python_threads_compute_at_once(tmp_path: Path) -> None:
    """Native calls let go of the interpreter lock, and all share one pool of threads."""
    models = [Model.load(tiny_llama(tmp_path / f"{seed}.gguf", type="Q4_1", seed=seed), threads=3) for seed in (1, 2)]
    alone = [model.logits(TOKENS) for model in models]
    differ: list[int] = []

    def work(which: int) -> None:
        for _ in range(60):
            if not np.array_equal(models[which].logits(TOKENS), alone[which]):
                differ.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differ == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_child_of_a_fork_computes_the_same(tmp_path: Path) -> None:
    """It has none of its parent's threads and makes its own."""
    model = Model.load(tiny_llama(tmp_path / "model.gguf", type="Q4_1"), threads=3)
    alone = model.logits(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of forks beside threads
        child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if np.array_equal(model.logits(TOKENS), alone) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(model.logits(TOKENS), alone)
