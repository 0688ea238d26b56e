"""A beginning that all rows of a step share is computed once, with the results of computing it every time."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from nomoat.data.mask import Example
from nomoat.data.pack import Pack, pack
from nomoat.engine import model as engine
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.models.spec import COVERABLE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("prefix") / "tiny.gguf"
    tiny.tiny_llama(path, seed=3)
    return Model.load(path)


def examples(vocab: int, prefix: int, count: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, vocab, prefix)
    made = []
    for index in range(count):
        own = rng.integers(0, vocab, 3 + 5 * index)
        own[0] = index  # the beginnings part here
        tokens = np.concatenate([shared, own]).astype(np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[-2:] = 1, 0.5
        made.append(Example(tokens, weights))
    return made


def step(model: Model, packs: list[Pack], precision: str) -> tuple[np.ndarray, list[np.ndarray]]:
    lora = TrainableLora(model.spec, rank=4, seed=1, targets=COVERABLE)
    rng = np.random.default_rng(2)
    for parameter in lora.parameters:
        parameter[:] = 0.1 * rng.standard_normal(parameter.shape)
    logps = []
    for each in packs:
        weights = each.weights[each.weights != 0]
        logps.append(model.loss_gradients(each, lora, -weights, precision=precision))
    return np.concatenate(logps), lora.gradients


@pytest.mark.parametrize("prefix", [8, 63, 64, 70, 130])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_shared_rows_give_the_same_gradients(model: Model, prefix: int, precision: str) -> None:
    rows = examples(model.spec.vocab, prefix, 4, seed=prefix)
    together = pack(rows, 1 << 20)
    assert len(together) == 1
    assert engine._share_prefix(together[0])[3] == prefix
    logp, gradients = step(model, together, precision)
    alone_logp, alone = step(model, [pack([row], 1 << 20)[0] for row in rows], precision)
    assert np.array_equal(logp, alone_logp)  # the forward pass is the same, bit for bit
    for own, expected in zip(gradients, alone, strict=True):
        # the same products, added in another order; in bf16 the summed gradient of a shared row is rounded once, not four times
        bound = (1e-5 if precision == "f32" else 2e-2) * np.linalg.norm(expected)
        assert np.linalg.norm(own - expected) <= bound


def test_a_row_that_carries_loss_is_not_shared(model: Model) -> None:
    rows = examples(model.spec.vocab, 40, 3, seed=1)
    rows[1].weights[20] = 1
    assert engine._share_prefix(pack(rows, 1 << 20)[0])[3] == 19


def test_short_beginnings_and_single_rows_stay_as_they_are(model: Model) -> None:
    rows = examples(model.spec.vocab, 3, 3, seed=1)
    assert engine._share_prefix(pack(rows, 1 << 20)[0])[3] == 0
    assert engine._share_prefix(pack(rows[:1], 1 << 20)[0])[3] == 0
