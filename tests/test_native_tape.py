"""The tape of a training step: layers that are not kept are run again, with the same bits and less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine_side import Trained, random_pack
from tiny import tiny_llama

pytest.importorskip("nomoat._native")

from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import ACTIVATION_BUDGET, Model, activation_bytes


def step(model: Model, precision: str, budget: int) -> list[bytes]:
    """Log-probabilities and all gradients of one step."""
    pack = random_pack(model.spec.vocab, (33, 7, 12), seed=3)
    lora = Trained(TrainableLora(model.spec, rank=4, alpha=8.0), seed=1).lora
    d_logp = np.linspace(-1, 1, np.count_nonzero(pack.weights), dtype=np.float32)
    logp = model.loss_gradients(pack, lora, d_logp, precision=precision, budget=budget)
    assert all(np.abs(gradient).max() > 0 for gradient in lora.gradients)
    return [logp.tobytes(), *(gradient.tobytes() for gradient in lora.gradients)]


@pytest.mark.parametrize("precision", ["bf16", "f32"])
@pytest.mark.parametrize("type", ["Q4_1", "F16"])
def test_any_budget_gives_the_same_bits(type: str, precision: str, tmp_path: Path) -> None:
    model = Model.load(tiny_llama(tmp_path / "model.gguf", type=type, layers=3), threads=1)
    layer = 52 * activation_bytes(model.spec, 0, 4 * 7, precision)
    whole = step(model, precision, ACTIVATION_BUDGET)
    for budget in (0, layer, 2 * layer, 3 * layer):  # none, one, two and all of the layers are kept
        assert step(model, precision, budget) == whole
