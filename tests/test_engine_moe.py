"""Layers with experts against tests/reference.py, and the same bits whatever runs beside a row."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

import reference
from engine_side import Trained, adapter_of, cosine, flat, joined, random_pack, relative_error
from families import NORMS, POST_NORMS, model_of, rope
from nomoat.data.pack import Pack
from nomoat.engine.stack import Adapter
from nomoat.errors import AdapterError, InputError, ModelError
from nomoat.files.ggml import GgmlType
from nomoat.models.spec import COVERABLE, SHARED_TARGETS, TARGETS, LayerSpec, ModelSpec, Source
from reference import Reference, random_lora
from test_engine_prefix import examples, step

pytest.importorskip("nomoat._native")

from nomoat import _native
from nomoat.data.pack import pack as pack_examples
from nomoat.engine.kv import Sequence
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model, _share_prefix, activation_bytes
from nomoat.engine.stack import Stack
from nomoat.engine.weights import load_weights

EXPERTS = 5
TOKENS = np.random.default_rng(2).integers(0, 96, 40).tolist()
#: As in test_engine_oracle.py: distance of the logits over their length.
LOGIT_ERROR = {"f32": 1e-5, "bf16": 0.02, "int8": 0.04}
#: Rounding moves a logit of the router by a hundredth or so of what logits are; rows whose last expert used is no nearer to the
#: first one left out than this share keep their experts in every precision.
MARGIN = 0.1


class Built(NamedTuple):
    model: Model
    reference: Reference


def spec_of(
    width: int, ffn: int, used: int, expert_norm: bool, layers: str = "ee", vectors: tuple[str, ...] = NORMS, **fields: Any
) -> ModelSpec:
    """Layers are "e" with experts, "s" with a shared one too, or "d" dense, whose MLP is wider; each has the vectors named."""
    block = {"e": LayerSpec(4, 2, ffn, experts=EXPERTS), "d": LayerSpec(4, 2, 2 * ffn)}
    block["s"] = dataclasses.replace(block["e"], shared=ffn + 32)
    spec = ModelSpec(
        architecture="experts",
        name="tiny experts",
        width=width,
        head_dim=8,
        vocab=96,
        context=256,
        norm_eps=1e-5,
        tied_head=True,
        blocks=tuple(block[kind] for kind in layers),
        ropes=(rope(8),),
        experts_used=used,
        expert_norm=expert_norm,
        **fields,
    )
    names = ["embed", "final_norm"]
    for i, kind in enumerate(layers):
        routers = {"e": ("router",), "s": ("router", "shared_router"), "d": ()}[kind]
        names += [f"blk.{i}.{part}" for part in (*vectors, *spec.targets(i), *routers)]
    return dataclasses.replace(spec, tensors={name: Source((name,)) for name in names})


def build(spec: ModelSpec, type: str, seed: int) -> Built:
    """Random weights of a format, routers and vectors in float32; the reference has the values that the format leaves of them."""
    rng = np.random.default_rng(seed)
    kind, weights = gguf.GGMLQuantizationType[type], {}
    for name in spec.tensors:
        shape = spec.tensor_shape(name)
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            weights[name] = 0.3 * values if name.endswith(("bias", "router")) else 1 + 0.2 * values
            continue
        values *= shape[-1] ** -0.5
        stored = name.endswith("router") or type == "F32"
        weights[name] = values if stored else dequantize(quantize(values.reshape(-1, shape[-1]), kind), kind).reshape(shape)
    return Built(model_of(spec, weights, type), Reference(spec, weights))


def margin(built: Built, tokens: Any, starts: Any = None, lora: Any = None) -> float:
    """How far the last expert used is from the first one left out, over the size of the router's logits: least of all rows."""
    least, used, original = np.inf, built.model.spec.experts_used, reference.experts

    def watched(h: Any, router: Any, *rest: Any) -> Any:
        nonlocal least
        logits = h @ router.T
        ordered = np.sort(logits, axis=-1)[..., ::-1]
        if used < EXPERTS:
            least = min(least, float((ordered[..., used - 1] - ordered[..., used]).min() / np.sqrt((logits**2).mean())))
        return original(h, router, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "experts", watched)
        built.reference.hidden(tokens, starts, lora)
    return least


def without_ties(spec: ModelSpec, type: str, tokens: Any, starts: Any = None, least: float = MARGIN) -> Built:
    """The first seed that leaves every row a margin."""
    return next(built for seed in itertools.count() if margin(built := build(spec, type, seed), tokens, starts) > least)


SHAPES = {"F32": (48, 48), "F16": (48, 48), "Q8_0": (64, 96), "Q4_0": (64, 64)}


@pytest.mark.parametrize("precision", LOGIT_ERROR)
@pytest.mark.parametrize("type", SHAPES)
@pytest.mark.parametrize(("used", "expert_norm"), [(1, True), (1, False), (2, True), (2, False), (EXPERTS, True)])
def test_logits(type: str, used: int, expert_norm: bool, precision: str) -> None:
    tokens = TOKENS[:12]
    model, oracle = without_ties(spec_of(*SHAPES[type], used, expert_norm, "sd"), type, tokens)
    assert relative_error(model.logits(tokens, precision=precision), oracle.logits(tokens)) < LOGIT_ERROR[precision]


class Case(NamedTuple):
    model: Model
    trained: Trained
    pack: Pack
    logp: np.ndarray
    gradients: dict[Any, Any]


@pytest.fixture(scope="module", params=[(1, False), (2, True), (2, False), (EXPERTS, True), (EXPERTS, False)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Two layers with experts, one of them with a shared one, and a dense one between them; all gradients by complex step."""
    used, expert_norm = request.param
    spec = spec_of(32, 32, used, expert_norm, "sde")
    pack = random_pack(spec.vocab, (5, 1, 7), seed=5)
    for seed in itertools.count():
        model, oracle = build(spec, "Q8_0", seed)
        trained = Trained(TrainableLora(spec, rank=2, alpha=4.0, targets=COVERABLE))
        if margin(Built(model, oracle), pack.tokens, pack.starts, trained.values()) > MARGIN:
            break
    lora, batch = trained.values(), (pack.tokens, pack.targets, pack.weights, pack.starts)
    gradients = {place: tuple(oracle.gradient(place, part, lora, *batch) for part in (0, 1)) for place in lora}
    return Case(model, trained, pack, oracle.logprobs(*batch, lora), gradients)


def test_every_gradient_in_f32(case: Case) -> None:
    found, logp = case.trained.gradients(case.model, case.pack, "f32")
    assert found.keys() == case.gradients.keys() == set(case.model.spec.places())
    assert len(found) == 3 * len(TARGETS) + len(SHARED_TARGETS)
    assert relative_error(logp, case.logp) < 1e-5
    assert relative_error(flat(found), flat(case.gradients)) < 1e-5
    for place, pair in case.gradients.items():
        for part in (0, 1):
            assert relative_error(found[place][part], pair[part]) < 1e-5, (place, "AB"[part])


def test_every_gradient_in_bf16(case: Case) -> None:
    found, logp = case.trained.gradients(case.model, case.pack, "bf16")
    assert relative_error(logp, case.logp) < LOGIT_ERROR["bf16"]
    assert cosine(flat(found), flat(case.gradients)) > 0.999
    for place, pair in case.gradients.items():
        for part in (0, 1):  # those of q and k are differences of larger numbers
            assert cosine(found[place][part], pair[part]) > 0.995, (place, "AB"[part])


#: what else surrounds the MLP of a layer
SURROUNDINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "gelu": (NORMS, {"activation": "gelu"}),
    "residual scale": (NORMS, {"residual_scale": 0.3}),
    "sandwich norms": ((*NORMS, *POST_NORMS), {"residual_scale": 0.7}),
    "post-norms alone": (POST_NORMS, {}),
    "layer norm": ((*NORMS, "attn_norm_bias", "mlp_norm_bias"), {"norm": "layer"}),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_norms_and_scales_around_experts(name: str) -> None:
    """The derivative along the gradient is the gradient's length; layers that are run again have the same bits."""
    vectors, fields = SURROUNDINGS[name]
    pack = random_pack(96, (9, 3, 12), seed=6)
    batch = (pack.tokens, pack.targets, pack.weights, pack.starts)
    model, oracle = without_ties(spec_of(48, 48, 2, True, "sde", vectors, **fields), "F32", *batch[::3], least=1e-3)
    trained = Trained(TrainableLora(model.spec, rank=3, alpha=6.0, targets=COVERABLE))
    found, logp = trained.gradients(model, pack, "f32")
    assert relative_error(logp, oracle.logprobs(*batch, trained.values())) < 1e-5
    along = oracle.derivative(found, trained.values(), *batch)
    assert along == pytest.approx(float(flat(found) @ flat(found)), rel=2e-5)
    rng = np.random.default_rng(1)
    other = {place: (rng.standard_normal(a.shape), rng.standard_normal(b.shape)) for place, (a, b) in found.items()}
    length = float(np.linalg.norm(flat(other)))
    expected = oracle.derivative(other, trained.values(), *batch) / length
    assert float(flat(found) @ flat(other)) / length == pytest.approx(expected, abs=1e-5 * float(np.linalg.norm(flat(found))))
    trained.lora.zero_grad()
    weights = pack.weights[pack.weights != 0]
    model.loss_gradients(pack, trained.lora, (-weights / weights.sum()).astype(np.float32), precision="f32", budget=0)
    np.testing.assert_array_equal(flat(trained.by_place()), flat(found))


@pytest.fixture(scope="module", params=["Q4_1", "F32"])
def built(request: pytest.FixtureRequest) -> Built:
    return build(spec_of(64, 64, 2, True, "sde"), request.param, seed=1)


@pytest.fixture
def threads() -> Iterator[None]:
    before = _native.threads()
    yield
    _native.set_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", LOGIT_ERROR)
def test_a_row_does_not_depend_on_chunks_neighbours_or_threads(built: Built, precision: str) -> None:
    model = built.model
    stack = Stack(model.spec, [(adapter_of(random_lora(model.spec, rank=3, seed=1)), 1.0)])
    whole = model.logits(TOKENS, stack=stack, precision=precision)
    for count in (1, 2, 3):
        _native.set_threads(count)
        for length in (1, 2, 3, 15, 16, 17, 33, 40):
            found = model.logits(TOKENS[:length], stack=stack, precision=precision)
            np.testing.assert_array_equal(found, whole[:length], f"{length} rows, {count} threads")
    one, other, rows = Sequence(), Sequence(), []
    for begin, end in itertools.pairwise((0, 1, 2, 9, 26, 27, 40)):  # steps of one row and of many, beside another sequence
        segments = [(other, TOKENS[:3], None), (one, TOKENS[begin:end], stack)]
        rows.append(model.step(segments, range(3, 3 + end - begin), precision=precision))
    np.testing.assert_array_equal(np.concatenate(rows), whole)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_training_repeats_bit_for_bit(built: Built, precision: str) -> None:
    """On any number of threads, and with layers kept or run again; scoring sees the same numbers."""
    model = built.model
    trained = Trained(TrainableLora(model.spec, rank=3, alpha=6.0, targets=COVERABLE), seed=2)
    packs = [random_pack(model.spec.vocab, lengths, seed=3) for lengths in ((33, 7, 12), (1,))]
    pack = joined(packs)
    d_logp = -pack.weights[pack.weights != 0]

    def bits(budget: int, threads: int) -> list[bytes]:
        _native.set_threads(threads)
        trained.lora.zero_grad()
        logp = model.loss_gradients(pack, trained.lora, d_logp, precision=precision, budget=budget)
        return [array.tobytes() for array in (logp, *trained.lora.gradients)]

    whole = bits(1 << 30, 1)
    assert any(any(part) for part in whole[1:])
    for budget, threads in ((1 << 30, 3), (0, 1), (0, 2), (40_000, 1)):
        assert bits(budget, threads) == whole
    stack = Stack(model.spec, [(trained.lora.to_adapter(), 1.0)])
    assert model.logprobs(pack, stack=stack, precision=precision).tobytes() == whole[0]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_shared_beginning_gives_the_same_gradients(built: Built, precision: str) -> None:
    rows = examples(built.model.spec.vocab, 70, 4, seed=70)
    together = pack_examples(rows, 1 << 20)
    assert _share_prefix(together[0])[3] == 70
    logp, gradients = step(built.model, together, precision)
    alone_logp, alone = step(built.model, [pack_examples([row], 1 << 20)[0] for row in rows], precision)
    assert np.array_equal(logp, alone_logp)
    for own, expected in zip(gradients, alone, strict=True):
        bound = (1e-5 if precision == "f32" else 2e-2) * np.linalg.norm(expected)  # as in test_engine_prefix.py
        assert np.linalg.norm(own - expected) <= bound


def test_what_the_tape_keeps_of_a_row() -> None:
    """Gate and up of the experts used, the weights of all experts and which are used; of a dense layer gate and up.

    Of a shared expert too, and its weight.
    """
    spec = spec_of(32, 48, 2, True, "eds")
    attention = 2 * 32 + 2 * (4 + 2) * 8
    assert activation_bytes(spec, 0, 0) == 2 * (attention + 2 * 2 * 48) + 4 * (4 + 32 + 2)
    assert activation_bytes(spec, 1, 0) == 2 * (attention + 2 * 2 * 48) + 4 * 4
    assert activation_bytes(spec, 2, 0) == activation_bytes(spec, 0, 0) + 2 * 2 * (48 + 32) + 4
    assert activation_bytes(dataclasses.replace(spec, experts_used=4), 0, 3, "f32") == 4 * (
        attention + 4 * 2 * 48 + 4 + 32 + 4 + 3
    )


@pytest.mark.parametrize("precision", LOGIT_ERROR)
@pytest.mark.parametrize("type", ["F32", "Q8_0"])
def test_logits_with_adapters_on_experts(type: str, precision: str) -> None:
    """Two stacks side by side, each a sum of adapters, and rows without any: all as if they were alone."""
    spec = spec_of(*SHAPES[type], 2, True, "sd")
    some, other = (random_lora(spec, rank=3, scale=1.0, seed=seed) for seed in (1, 2))
    both = {
        place: (np.concatenate([a, other[place][0]], axis=-2), np.concatenate([b, -0.5 * other[place][1]], axis=-1), 1.0)
        for place, (a, b, _) in some.items()
    }
    tokens = TOKENS[:12]
    loras = (some, both, None)
    built = next(
        built
        for seed in itertools.count()
        if min(margin(built := build(spec, type, seed), tokens, lora=lora) for lora in loras) > MARGIN / 2
    )
    model, oracle = built
    stacks = [
        Stack(spec, [(adapter_of(some), 1.0)]),
        Stack(spec, [(adapter_of(some), 1.0), (adapter_of(other), -0.5)]),
        None,
    ]
    segments = [(Sequence(), tokens, stack) for stack in stacks]
    found = model.step(segments, range(3 * len(tokens)), precision=precision).reshape(3, len(tokens), -1)
    for stack, lora, logits in zip(stacks, loras, found, strict=True):
        assert relative_error(logits, oracle.logits(tokens, lora=lora)) < LOGIT_ERROR[precision]
        np.testing.assert_array_equal(logits, model.logits(tokens, stack=stack, precision=precision))
    assert relative_error(found[0], oracle.logits(tokens)) > 0.1  # the adapter matters


def test_training_on_top_of_adapters_on_experts(built: Built) -> None:
    """Both are one adapter of twice the rank, of which the last ranks learn."""
    model, oracle = built
    base = random_lora(model.spec, rank=2, scale=1.0, seed=3)
    trained = Trained(
        TrainableLora(model.spec, rank=2, alpha=2.0, targets=("q", "experts"), base=Stack(model.spec, [(adapter_of(base), 1.0)]))
    )
    assert {target for layer, target in trained.where if layer == 0} == {"q", "gate", "up", "down"}
    assert {target for layer, target in trained.where if layer == 1} == {"q"}
    pack = random_pack(model.spec.vocab, (9, 4), seed=4)
    batch = (pack.tokens, pack.targets, pack.weights, pack.starts)
    whole = dict(base)
    for place, (a, b, scale) in trained.values().items():
        whole[place] = (np.concatenate([base[place][0], a], axis=-2), np.concatenate([base[place][1], b], axis=-1), scale)
    found, logp = trained.gradients(model, pack, "f32")
    assert relative_error(logp, oracle.logprobs(*batch, whole)) < 1e-5
    padded = {
        place: (np.concatenate([0 * base[place][0], a], axis=-2), np.concatenate([0 * base[place][1], b], axis=-1))
        for place, (a, b) in found.items()
    }
    along = oracle.derivative(padded, whole, *batch)
    assert along == pytest.approx(float(flat(found) @ flat(found)), rel=2e-5)


def test_what_is_covered() -> None:
    """By default no experts; with them, each has an A and a B of its own."""
    spec = spec_of(32, 48, 2, True, "ed")
    assert [place for place in TrainableLora(spec, rank=2).places if place[0] == 0] == [(0, target) for target in "qkvo"]
    lora = TrainableLora(spec, rank=2, targets=("experts",))
    assert (lora.targets, lora.places) == (("gate", "up", "down"), [(0, "gate"), (0, "up"), (0, "down")])
    shapes = [(a.shape, b.shape) for a, b in lora.to_adapter().tensors.values()]
    assert shapes == [((EXPERTS, 2, 32), (EXPERTS, 48, 2))] * 2 + [((EXPERTS, 2, 48), (EXPERTS, 32, 2))]
    assert len({parameter[:, e].tobytes() for parameter in lora.parameters[::2] for e in range(EXPERTS)}) == 3 * EXPERTS
    beside = spec_of(32, 48, 2, True, "s")  # gate, up and down of a shared expert go by these names
    assert TrainableLora(beside, rank=2).places == [(0, target) for target in (*"qkvo", *SHARED_TARGETS)]
    assert TrainableLora(beside, rank=2, targets=("up",)).places == [(0, "shared_up")]
    assert TrainableLora(beside, rank=2, targets=("experts",)).places == lora.places
    with pytest.raises(InputError, match="the model has none of them"):
        TrainableLora(spec_of(32, 32, 2, True, "d"), rank=2, targets=("experts",))


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 32), (32, 2)), ((4, 2, 32), (4, 32, 2)), ((5, 2, 32), (5, 32, 3)), ((5, 2, 16), (5, 32, 2)), ((5, 0, 32), (5, 32, 0))],
)
def test_an_adapter_of_other_experts_is_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    spec = spec_of(32, 32, 2, True, "e")
    adapter = Adapter(2, 2.0, ("gate",), {(0, "gate"): (np.zeros(a, np.float32), np.zeros(b, np.float32))})
    with pytest.raises(AdapterError, match=r"A must be \[5, r, 32\] and B \[5, 32, r\]") as caught:
        Stack(spec, [(adapter, 1.0)])
    assert caught.value.code == "E_SHAPE"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_used": 0}, "0 experts used of 5"),
        ({"experts_used": 6}, "6 experts used of 5"),
        ({"gated": False}, "must have a gate"),
        ({"blocks": (LayerSpec(4, 2, 40, experts=EXPERTS),)}, "multiple of 16"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(change: dict[str, Any], message: str) -> None:
    spec = dataclasses.replace(spec_of(32, 32, 2, True, "e"), **change)
    with pytest.raises(ModelError, match=message):
        build(spec, "F32", seed=0)


def test_the_router_of_a_folder_is_not_quantized(tmp_path: Path) -> None:
    """One tensor for each expert, as in most folders: they become one matrix, in blocks, beside a router as it is stored."""
    import tiny

    spec = spec_of(32, 32, 2, True, "e")
    rng = np.random.default_rng(0)
    names = {"gate": [f"experts.{e}.w1" for e in range(EXPERTS)], "router": ["router"]}
    arrays = {
        name: rng.standard_normal((EXPERTS if part == "router" else 32, 32)).astype(np.float32)
        for part, some in names.items()
        for name in some
    }
    tiny.write_safetensors(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text("{}")
    spec = dataclasses.replace(spec, tensors={f"blk.0.{part}": Source(tuple(some)) for part, some in names.items()})
    tensors = load_weights(tmp_path, spec).tensors
    router, gate = tensors["blk.0.router"], tensors["blk.0.gate"]
    assert (router.format, router.rows, router.cols) == (GgmlType.F32, EXPERTS, 32)
    assert (gate.format, gate.rows, gate.cols) == (GgmlType.Q8_0, EXPERTS * 32, 32)
    ids = np.arange(EXPERTS * 32, dtype=np.int32)
    out = np.empty((len(ids), 32), np.float32)
    _native.read_rows(gate.format, gate.rows, gate.cols, gate.data, ids, out)
    expected = np.concatenate([arrays[name] for name in names["gate"]])
    assert np.abs(out - expected).max() <= np.abs(expected).max() / 127 / 2 * 1.01  # Q8_0 rounds to half a step
    _native.read_rows(router.format, EXPERTS, 32, router.data, ids[:EXPERTS], out[:EXPERTS])
    np.testing.assert_array_equal(out[:EXPERTS], arrays["router"])
