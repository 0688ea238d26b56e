"""tests/reference.py against transformers and PEFT in float64, and the stored goldens against what makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_side import random_pack, relative_error
from golden.make_transformers_llama import FILE, MODELS, make
from parity import peft_side
from reference import Reference, random_lora
from tiny import tiny_hf

# transformers takes angles in float32, so its float64 is good to about positions x eps32 = 12 x 1.2e-7
TOLERANCE = 1e-5


def test_goldens_are_what_transformers_says() -> None:
    stored = np.load(FILE)
    fresh = make()
    assert set(stored.files) == set(fresh)
    for name, values in fresh.items():
        np.testing.assert_allclose(stored[name], values, rtol=1e-6, atol=1e-6 * float(np.abs(values).max()), err_msg=name)


@pytest.mark.parametrize(
    "dimensions", [{"width": 32, "ffn": 48}, MODELS["llama3_rope"] | {"width": 32, "heads": 2, "kv_heads": 1}]
)
def test_all_lora_gradients(dimensions: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", **dimensions)
    reference = Reference.load(folder)
    lora = random_lora(reference.spec, rank=2, scale=2.0)
    pack = random_pack(reference.spec.vocab, (5, 7), seed=1)
    model = peft_side.with_lora(peft_side.load_base(folder, torch.float64), lora)
    batch = (pack.tokens, pack.targets, pack.weights, pack.starts)
    assert float(reference.loss(*batch, lora)) == pytest.approx(float(peft_side.loss_of(model, pack).detach()), rel=1e-6)
    for place, expected in peft_side.gradients(model, pack).items():
        for part in (0, 1):
            found = reference.gradient(place, part, lora, *batch)
            assert relative_error(found, expected[part]) < TOLERANCE, (place, part)
