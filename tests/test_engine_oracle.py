"""The engine against tests/reference.py: logits, log-probabilities and every LoRA gradient, at every precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine_side import Pair, Trained, adapter_of, cosine, flat, lora_of, loss, random_pack, relative_error
from golden.make_transformers_llama import MODELS
from nomoat.data.pack import Pack
from nomoat.files.ggml import BLOCK_SHAPE, GgmlType
from nomoat.models.check import MATRIX_TYPES
from nomoat.models.spec import TARGETS
from reference import Place, Reference, random_lora
from stories import golden_text, stories_gguf
from tiny import tiny_llama

pytest.importorskip("nomoat._native")

from nomoat.engine.generate import Sampling, generate
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.engine.stack import Stack

TOKENS = [1, 52, 287, 11, 3, 3, 200, 77, 140, 9, 250, 18, 30]

#: Distance of the logits over their length. f32: eps x sqrt(products in a row) x layers, below 1e-6 x 10.
#: bf16: both factors of each product are rounded to 2^-9, so each of 8 linears adds 2^-9 sqrt(2/3) or so: 1 %.
#: int8: activations are rounded to 1/254 of the largest of 32, about 2.3 sigma: 0.5 % per linear, 2 % in all.
LOGIT_ERROR = {"f32": 1e-5, "bf16": 0.02, "int8": 0.04}


def shape_of(type: str) -> dict[str, Any]:
    if BLOCK_SHAPE[GgmlType[type]][0] == 256:
        return {"width": 256, "heads": 4, "kv_heads": 2, "ffn": 512}
    return {"width": 64, "heads": 4, "kv_heads": 2, "ffn": 96}


@pytest.mark.parametrize("precision", LOGIT_ERROR)
@pytest.mark.parametrize("type", MATRIX_TYPES)
def test_logits(type: str, precision: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf", type=type, **shape_of(type))
    expected = Reference.load(path).logits(TOKENS)
    found = Model.load(path).logits(TOKENS, precision=precision)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert relative_error(found, expected) < LOGIT_ERROR[precision]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_shape_and_rope(name: str, tmp_path: Path) -> None:
    """Multi-head, one key/value head, own head dimension, untied head, odd widths, linear and llama3 rope."""
    path = tiny_llama(tmp_path / "model.gguf", **MODELS[name])
    assert relative_error(Model.load(path).logits(TOKENS, precision="f32"), Reference.load(path).logits(TOKENS)) < 1e-5


def test_rope_over_a_part_of_the_head(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf", metadata={"llama.rope.dimension_count": 8})
    assert Model.load(path).spec.head_dim == 16
    assert relative_error(Model.load(path).logits(TOKENS, precision="f32"), Reference.load(path).logits(TOKENS)) < 1e-5


def test_positions_far_from_zero(tmp_path: Path) -> None:
    """Angles are position x frequency in float32: at 200 they are off by at most 200 eps."""
    path = tiny_llama(tmp_path / "model.gguf")
    tokens = np.random.default_rng(0).integers(0, 288, 200).tolist()
    found = Model.load(path).logits(tokens, precision="f32")
    assert relative_error(found, Reference.load(path).logits(tokens)) < 2e-5


@pytest.mark.parametrize("precision", LOGIT_ERROR)
def test_logits_with_a_stack(precision: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf", type="Q8_0", **shape_of("Q8_0"))
    model, reference = Model.load(path), Reference.load(path)
    first = random_lora(model.spec, rank=3, scale=0.5, seed=1)
    second = random_lora(model.spec, rank=2, scale=1.0, seed=2, targets=("k", "down"))
    stack = Stack(model.spec, [(adapter_of(first), 0.75), (adapter_of(second), -1.5)])
    merged = dict(reference.weights)
    for lora, weight in ((first, 0.75), (second, -1.5)):
        for (layer, target), (a, b, scale) in lora.items():
            name = f"blk.{layer}.{target}"
            merged[name] = merged[name] + weight * scale * b @ a
    expected = Reference(reference.spec, merged).logits(TOKENS)
    assert relative_error(model.logits(TOKENS, stack=stack, precision=precision), expected) < LOGIT_ERROR[precision]
    assert relative_error(reference.logits(TOKENS), expected) > 2 * LOGIT_ERROR["int8"]  # the stack matters


@pytest.mark.parametrize("precision", LOGIT_ERROR)
def test_logprobs_of_weighted_rows(precision: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf", type="Q4_1", **shape_of("Q4_1"))
    model = Model.load(path)
    pack = random_pack(model.spec.vocab, (1, 9, 2, 30), seed=4)
    expected = Reference.load(path).logprobs(pack.tokens, pack.targets, pack.weights, pack.starts)
    found = model.logprobs(pack, precision=precision)
    assert found.shape == (np.count_nonzero(pack.weights),)
    assert relative_error(found, expected) < LOGIT_ERROR[precision]


class Case(NamedTuple):
    """One model, adapter and pack with all gradients by complex step."""

    model: Model
    trained: Trained
    pack: Pack
    logp: np.ndarray
    gradients: dict[Place, Pair]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tiny_llama(tmp_path_factory.mktemp("case") / "model.gguf", type="Q8_0", width=32, heads=4, kv_heads=2, ffn=64)
    model, reference = Model.load(path), Reference.load(path)
    trained = Trained(TrainableLora(model.spec, rank=2, alpha=4.0))
    pack = random_pack(model.spec.vocab, (5, 1, 7), seed=5)
    lora = trained.values()
    batch = (pack.tokens, pack.targets, pack.weights, pack.starts)
    gradients = {
        place: (reference.gradient(place, 0, lora, *batch), reference.gradient(place, 1, lora, *batch)) for place in lora
    }
    return Case(model, trained, pack, reference.logprobs(*batch, lora), gradients)


def test_every_gradient_in_f32(case: Case) -> None:
    found, logp = case.trained.gradients(case.model, case.pack, "f32")
    assert found.keys() == case.gradients.keys() == {(i, target) for i in range(2) for target in TARGETS}
    assert relative_error(logp, case.logp) < 1e-5
    assert relative_error(flat(found), flat(case.gradients)) < 1e-5
    for place, pair in case.gradients.items():
        for part in (0, 1):
            assert relative_error(found[place][part], pair[part]) < 1e-5, (place, "AB"[part])


def test_every_gradient_in_bf16(case: Case) -> None:
    found, logp = case.trained.gradients(case.model, case.pack, "bf16")
    assert relative_error(logp, case.logp) < LOGIT_ERROR["bf16"]
    for place, pair in case.gradients.items():
        for part in (0, 1):
            assert cosine(found[place][part], pair[part]) > 0.999, (place, "AB"[part])


def test_gradients_are_added_up(case: Case) -> None:
    """Two calls without zero_grad: gradient accumulation."""
    once, _ = case.trained.gradients(case.model, case.pack, "f32")
    weights = case.pack.weights[case.pack.weights != 0]
    case.model.loss_gradients(case.pack, case.trained.lora, (-weights / weights.sum()).astype(np.float32), precision="f32")
    assert relative_error(flat(case.trained.by_place()), 2 * flat(once)) < 1e-6


def test_gradients_are_linear_in_d_logp(case: Case) -> None:
    """Any objective is a vector of d_logp: the gradient of row sums is the sum of the rows' gradients."""
    n = int(np.count_nonzero(case.pack.weights))
    rng = np.random.default_rng(0)
    d_logp = rng.standard_normal((2, n)).astype(np.float32)

    def gradient(values: np.ndarray) -> np.ndarray:
        case.trained.lora.zero_grad()
        case.model.loss_gradients(case.pack, case.trained.lora, values.astype(np.float32), precision="f32")
        return np.concatenate([g.ravel() for g in case.trained.lora.gradients]).astype(np.float64)

    assert relative_error(gradient(d_logp[0] - 2 * d_logp[1]), gradient(d_logp[0]) - 2 * gradient(d_logp[1])) < 1e-5


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("o",), ("gate", "down"), ("up",)])
def test_subsets_of_linears(case: Case, targets: tuple[str, ...]) -> None:
    """An adapter on fewer linears: its gradients are those of the full one whose other B are zero."""
    trained = Trained(TrainableLora(case.model.spec, rank=2, alpha=4.0, targets=targets), seed=7)
    found, _ = trained.gradients(case.model, case.pack, "f32")
    assert {target for _, target in found} == set(targets)
    full = Trained(TrainableLora(case.model.spec, rank=2, alpha=4.0))
    values = full.values()
    full.set({place: trained.values().get(place, (a, np.zeros_like(b), scale)) for place, (a, b, scale) in values.items()})
    expected, _ = full.gradients(case.model, case.pack, "f32")
    for place, pair in found.items():
        for part in (0, 1):
            assert relative_error(pair[part], expected[place][part]) < 1e-5, (place, "AB"[part])


@pytest.mark.parametrize("type", ["F32", "Q4_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("tied", [True, False])
def test_directional_derivatives(type: str, tied: bool, tmp_path: Path) -> None:
    """Larger models, one complex pass a direction: along the gradient itself, and along random ones."""
    path = tiny_llama(tmp_path / "model.gguf", type=type, tied=tied, layers=3, **shape_of(type))
    model, reference = Model.load(path), Reference.load(path)
    trained = Trained(TrainableLora(model.spec, rank=8, alpha=8.0))
    pack = random_pack(model.spec.vocab, (9, 3, 12), seed=6)
    batch = (pack.tokens, pack.targets, pack.weights, pack.starts)
    found, logp = trained.gradients(model, pack, "f32")
    assert loss(pack, logp) == pytest.approx(float(reference.loss(*batch, trained.values())), rel=1e-5)
    norm = float(np.linalg.norm(flat(found)))
    rng = np.random.default_rng(1)
    randoms = [{p: (rng.standard_normal(a.shape), rng.standard_normal(b.shape)) for p, (a, b) in found.items()} for _ in range(2)]
    for direction in [found, *randoms]:
        length = float(np.linalg.norm(flat(direction)))
        along = float(flat(found) @ flat(direction)) / length
        assert along == pytest.approx(reference.derivative(direction, trained.values(), *batch) / length, abs=1e-5 * norm)


def test_training_on_top_of_a_frozen_stack(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf", **shape_of("F32"))
    model, reference = Model.load(path), Reference.load(path)
    frozen = random_lora(model.spec, rank=3, scale=0.5, seed=8)
    merged = dict(reference.weights)
    for (layer, target), (a, b, scale) in frozen.items():
        merged[f"blk.{layer}.{target}"] = merged[f"blk.{layer}.{target}"] + 0.8 * scale * b @ a
    stack = Stack(model.spec, [(adapter_of(frozen), 0.8)])
    trained = Trained(TrainableLora(model.spec, rank=2, alpha=2.0, targets=("q", "v", "down"), base=stack))
    pack = random_pack(model.spec.vocab, (6, 11), seed=9)
    found, logp = trained.gradients(model, pack, "f32")
    beneath = Reference(reference.spec, merged)
    batch = (pack.tokens, pack.targets, pack.weights, pack.starts)
    assert relative_error(logp, beneath.logprobs(*batch, trained.values())) < 1e-5
    along = beneath.derivative(found, trained.values(), *batch)
    assert along == pytest.approx(float(flat(found) @ flat(found)), rel=2e-5)
    assert set(trained.lora.to_adapter().tensors) == {(i, t) for i in range(2) for t in ("q", "v", "down")}


def test_fresh_adapter_changes_nothing_and_learns_b_first(tmp_path: Path) -> None:
    """B starts at zero: logits are the base's, the gradient of A is zero and that of B is not."""
    path = tiny_llama(tmp_path / "model.gguf", **shape_of("F32"))
    model = Model.load(path)
    lora = TrainableLora(model.spec, rank=4, alpha=8.0, seed=3)
    again, other = TrainableLora(model.spec, rank=4, alpha=8.0, seed=3), TrainableLora(model.spec, rank=4, alpha=8.0, seed=4)
    adapter = lora.to_adapter()
    assert adapter.digest == again.to_adapter().digest != other.to_adapter().digest
    assert (adapter.rank, adapter.alpha, adapter.scale) == (4, 8.0, 2.0)
    for (_, target), (a, b) in adapter.tensors.items():
        rows, columns = model.spec.linear_shape(target)
        assert (a.shape, b.shape) == ((4, columns), (rows, 4))
        assert not b.any()
        assert np.abs(a).max() <= np.sqrt(3 / columns) * 1.0001  # Kaiming uniform with a = sqrt(5), PEFT's: sqrt(1 / columns)
    stack = Stack(model.spec, [(adapter, 1.0)])
    np.testing.assert_array_equal(model.logits(TOKENS, stack=stack), model.logits(TOKENS))
    pack = random_pack(model.spec.vocab, (8,), seed=1)
    lora.zero_grad()
    model.loss_gradients(pack, lora, -pack.weights[pack.weights != 0], precision="f32")
    sizes = sorted(float(np.abs(gradient).max()) for gradient in lora.gradients)
    half = len(sizes) // 2
    assert sizes[half - 1] == 0.0
    assert sizes[half] > 0.0


def test_stories260k(shared_data: Path, tmp_path: Path) -> None:
    """All 256 published greedy tokens, teacher-forced, of a real trained model with head_dim 8 and an MLP width of 172."""
    source = shared_data / "stories260k"
    model = Model.load(stories_gguf(source, tmp_path / "stories.gguf"))
    tokens = model.tokenizer.encode(golden_text(source))
    assert len(tokens) == 257
    logits = model.logits(tokens, precision="f32")
    np.testing.assert_array_equal(logits[:-1].argmax(-1), tokens[1:])
    expected = Reference.load(tmp_path / "stories.gguf").logits(tokens)
    assert relative_error(logits, expected) < 1e-5
    answer = generate(model, [tokens[:1]], Sampling(max_tokens=120))[0]  # int8 activations, through the cache
    assert answer.tokens == tokens[1:121]
    assert golden_text(source).startswith(answer.text)
    going_on = generate(model, [tokens[:1]], Sampling(max_tokens=120, continues=True))[0]
    assert going_on.text == " " + answer.text


def test_lora_of_is_the_adapter(tmp_path: Path) -> None:
    """The bridge between the engine's adapters and the reference's keeps values and strength."""
    spec = Model.load(tiny_llama(tmp_path / "model.gguf")).spec
    lora = random_lora(spec, rank=2, scale=0.5)
    back = lora_of(adapter_of(lora), weight=2.0)
    for place, (a, b, _) in lora.items():
        np.testing.assert_array_equal(back[place][0], a)
        np.testing.assert_array_equal(back[place][1], b)
        assert back[place][2] == 1.0
