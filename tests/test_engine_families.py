"""Every feature that a family of models brings, against tests/reference.py and against itself in other batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from engine_side import Trained, adapter_of, cosine, flat, joined, random_pack, relative_error
from families import ALL, BLOCK, FAMILIES, FEATURES, aligned, family, model_of, random_weights
from nomoat.data.pack import Pack
from nomoat.engine.kv import Sequence
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import ACTIVATION_BUDGET, Model, _share_prefix, activation_bytes
from nomoat.engine.stack import Stack
from nomoat.models.spec import ModelSpec
from reference import Reference, random_lora

TOKENS = np.random.default_rng(7).integers(0, 50, 21).tolist()
LOGIT_ERROR = {"f32": 1e-5, "bf16": 0.02, "int8": 0.04}  # tests/test_engine_oracle.py says why


def built(spec: ModelSpec, type: str = "F32") -> tuple[Model, Reference]:
    weights = random_weights(spec)
    return model_of(spec, weights, type), Reference(spec, weights)


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_changes_the_logits(name: str) -> None:
    """The oracle knows it, and these sizes show it: all weights that both models have are the same."""
    if name == "plain":
        return
    spec = FEATURES[name]
    without = family(blocks=(dataclasses.replace(BLOCK),) * 2)
    found, expected = (Reference(s, random_weights(s)).logits(TOKENS) for s in (without, spec))
    assert relative_error(found, expected) > 2 * LOGIT_ERROR["int8"]


@pytest.mark.parametrize("precision", LOGIT_ERROR)
@pytest.mark.parametrize("name", ALL)
def test_logits(name: str, precision: str) -> None:
    model, reference = built(ALL[name])
    assert relative_error(model.logits(TOKENS, precision=precision), reference.logits(TOKENS)) < LOGIT_ERROR[precision]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_quantized_weights(name: str) -> None:
    """Q8_0 is off by 1/254 of the largest of 32 weights, as much as int8 activations are."""
    model, reference = built(aligned(FAMILIES[name]), "Q8_0")
    assert relative_error(model.logits(TOKENS), reference.logits(TOKENS)) < LOGIT_ERROR["int8"]


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str) -> None:
    """By complex step: of families all entries, of single features some of every matrix."""
    model, reference = built(ALL[name])
    trained = Trained(TrainableLora(model.spec, rank=2, alpha=4.0))
    pack = random_pack(model.spec.vocab, (5, 1, 7), seed=5)
    lora, batch = trained.values(), (pack.tokens, pack.targets, pack.weights, pack.starts)
    assert lora.keys() == set(model.spec.places())
    (high, logp), (low, low_logp) = (trained.gradients(model, pack, precision) for precision in ("f32", "bf16"))
    assert relative_error(logp, reference.logprobs(*batch, lora)) < 1e-5
    assert relative_error(low_logp, logp) < LOGIT_ERROR["bf16"]
    size = np.linalg.norm(flat(high))
    for place in lora:
        for part, found in enumerate(high[place]):
            entries = np.arange(found.size) if name in FAMILIES else np.random.default_rng(part).integers(0, found.size, 6)
            expected = reference.gradient(place, part, lora, *batch, entries=entries.tolist())
            assert np.linalg.norm(found.reshape(-1)[entries] - expected) < 1e-5 * size, (place, "AB"[part])
            if np.linalg.norm(found) > 1e-6 * size:
                assert cosine(low[place][part], found) > 0.99, (place, "AB"[part])
    assert cosine(flat(low), flat(high)) > 0.999


#: families, and what none of them has here
MIXED = {**FAMILIES, "layers of their own": FEATURES["layers of their own"], "large groups": FEATURES["large groups"]}


def stack_of(spec: ModelSpec, seed: int) -> Stack:
    return Stack(spec, [(adapter_of(random_lora(spec, rank=3, seed=seed)), 1.0)])


@pytest.mark.parametrize(("type", "precision"), [("Q4_1", "int8"), ("F32", "int8"), ("Q8_0", "bf16"), ("F32", "f32")])
@pytest.mark.parametrize("name", MIXED)
def test_rows_do_not_depend_on_chunks_and_neighbours(name: str, type: str, precision: str) -> None:
    """Chunks of two prompts, one of them with an adapter, beside each other in one step: the bits of each prompt at once."""
    spec = MIXED[name] if type == "F32" else aligned(MIXED[name])
    model, _ = built(spec, type)
    texts = [TOKENS, TOKENS[5:] + TOKENS[:11]]
    stacks = [None, stack_of(spec, 1)]
    whole = [model.logits(text, stack=stack, precision=precision) for text, stack in zip(texts, stacks, strict=True)]
    for length in (1, 2, 7, 16, 17):
        np.testing.assert_array_equal(model.logits(TOKENS[:length], precision=precision), whole[0][:length])
    sequences = [Sequence(), Sequence()]
    found: list[list[npt.NDArray[np.float32]]] = [[], []]
    for counts in ((10, 1), (1, 16), (0, 9), (9, 1), (1, 0)):
        segments = []
        for which, count in enumerate(counts):
            begin = len(sequences[which].tokens)
            segments += [(sequences[which], texts[which][begin : begin + count], stacks[which])] if count else []
        logits = np.split(model.step(segments, range(sum(counts)), precision=precision), [counts[0]])
        for which in (0, 1):
            found[which].append(logits[which])
    for which in (0, 1):
        np.testing.assert_array_equal(np.concatenate(found[which]), whole[which])


def step(model: Model, packs: list[Pack], precision: str, budget: int = ACTIVATION_BUDGET) -> list[npt.NDArray[np.float32]]:
    """Log-probabilities, then all gradients."""
    trained = Trained(TrainableLora(model.spec, rank=2, alpha=4.0))
    d_logp = [np.linspace(-1, 1, np.count_nonzero(pack.weights), dtype=np.float32) for pack in packs]
    logps = [
        model.loss_gradients(pack, trained.lora, d, precision=precision, budget=budget)
        for pack, d in zip(packs, d_logp, strict=True)
    ]
    return [np.concatenate(logps), *trained.lora.gradients]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("name", MIXED)
def test_training_repeats_with_any_budget(name: str, precision: str) -> None:
    """Layers that are run again have the bits of layers that were kept, and of scoring."""
    model, _ = built(MIXED[name])
    pack = random_pack(model.spec.vocab, (9, 20), seed=5)
    whole = step(model, [pack], precision)
    assert all(np.abs(gradient).max() > 0 for gradient in whole)
    last = model.spec.layers - 1
    some = 29 * activation_bytes(model.spec, last, 2 * len(model.spec.targets(last)), precision)
    for budget in (0, some):
        for found, expected in zip(step(model, [pack], precision, budget), whole, strict=True):
            np.testing.assert_array_equal(found, expected)
    stack = Stack(model.spec, [(Trained(TrainableLora(model.spec, rank=2, alpha=4.0)).lora.to_adapter(), 1.0)])
    np.testing.assert_array_equal(model.logprobs(pack, stack=stack, precision=precision), whole[0])


@pytest.mark.parametrize("name", MIXED)
def test_a_shared_beginning_gives_the_same_gradients(name: str) -> None:
    """Longer than a page and than the windows; the rows behind it see it, or the end of it, or nothing of it."""
    model, _ = built(MIXED[name])
    shared = np.random.default_rng(1).integers(0, 50, 70, dtype=np.int32)
    packs = []
    for index, length in enumerate((3, 12, 1)):
        tokens = np.concatenate([shared, np.random.default_rng(index).integers(0, 50, length, dtype=np.int32)])
        tokens[70] = index
        weights = np.zeros(len(tokens), np.float32)
        weights[70:] = 1
        packs.append(Pack(tokens, np.array([0, len(tokens)], np.int32), np.roll(tokens, -1), weights, (index,)))
    together = joined(packs)
    assert _share_prefix(together)[3] == 70
    d_logp = np.random.default_rng(2).standard_normal(16).astype(np.float32)
    trained = Trained(TrainableLora(model.spec, rank=2, alpha=4.0))
    logp = model.loss_gradients(together, trained.lora, d_logp, precision="f32")
    found = flat(trained.by_place())
    trained.lora.zero_grad()
    alone = [
        model.loss_gradients(pack, trained.lora, d, precision="f32")
        for pack, d in zip(packs, np.split(d_logp, [3, 15]), strict=True)
    ]
    np.testing.assert_array_equal(logp, np.concatenate(alone))
    assert relative_error(found, flat(trained.by_place())) < 1e-5
