"""Rope frequencies against transformers', and the two row orders of q and k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.make_transformers_llama import FILE, MODELS
from nomoat.engine.model import Model
from nomoat.errors import InputError, ModelError
from nomoat.files.gguf import open_gguf
from nomoat.models import rope, spec_from_gguf, spec_from_hf
from nomoat.models.fields import Fields
from nomoat.models.hf import read_config
from tiny import interleave, tiny_hf, tiny_llama

# transformers computes the power and the scaling in float32: a few roundings
RELATIVE = 4 * float(np.finfo(np.float32).eps)


def hf_frequencies(folder: Path) -> np.ndarray:
    return spec_from_hf(read_config(folder), None).ropes[0].inv_freq


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_of_transformers(name: str, tmp_path: Path) -> None:
    golden = np.load(FILE)[f"{name}.inv_freq"]
    np.testing.assert_allclose(hf_frequencies(tiny_hf(tmp_path / "hf", **MODELS[name])), golden, rtol=RELATIVE)
    with open_gguf(tiny_llama(tmp_path / "model.gguf", **MODELS[name])) as file:
        found = spec_from_gguf(file).ropes[0]
    np.testing.assert_allclose(found.inv_freq, golden, rtol=RELATIVE)
    assert found.interleaved


@pytest.mark.parametrize("name", ["linear_rope", "llama3_rope"])
def test_both_spellings_of_the_scaling(name: str, tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters` with rope_theta inside; older files `rope_scaling`, the oldest with `type`."""
    dimensions = MODELS[name]
    scaling, theta = dimensions["rope_scaling"], dimensions.get("rope_base", 10000.0)
    old = hf_frequencies(tiny_hf(tmp_path / "old", **dimensions))
    joined = {"rope_theta": None, "rope_scaling": None, "rope_parameters": {**scaling, "rope_theta": theta}}
    np.testing.assert_array_equal(old, hf_frequencies(tiny_hf(tmp_path / "new", config=joined, **dimensions)))
    oldest = {"rope_scaling": {("type" if key == "rope_type" else key): value for key, value in scaling.items()}}
    np.testing.assert_array_equal(old, hf_frequencies(tiny_hf(tmp_path / "oldest", config=oldest, **dimensions)))


def test_gguf_factor_zero_and_none_mean_unscaled(tmp_path: Path) -> None:
    plain = rope.frequencies(16, 10000.0).astype(np.float32)
    cases: list[dict[str, Any]] = [
        {"llama.rope.scaling.factor": 0.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.freq_base": None},
    ]
    for keys in cases:
        with open_gguf(tiny_llama(tmp_path / "model.gguf", metadata=keys)) as file:
            np.testing.assert_array_equal(spec_from_gguf(file).ropes[0].inv_freq, plain)
    with open_gguf(tiny_llama(tmp_path / "model.gguf", metadata={"llama.rope.scale_linear": 4.0})) as file:
        np.testing.assert_array_equal(spec_from_gguf(file).ropes[0].inv_freq, plain / 4)


@pytest.mark.parametrize(
    ("scaling", "code"),
    [
        ({"rope_type": "proportional", "factor": 4.0}, "E_ARCH"),
        ({"rope_type": "\x1b[31mred"}, "E_ARCH"),
        ({"rope_type": 3}, "E_TYPE"),
        ({"rope_type": "linear"}, "E_ARCH"),
        ({"rope_type": "linear", "factor": 0}, "E_LIMIT"),
        ({"rope_type": "linear", "factor": float("nan")}, "E_NONFINITE"),
        ({"rope_type": "linear", "factor": 10**400}, "E_LIMIT"),
        ({"rope_type": "linear", "factor": True}, "E_TYPE"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "E_LIMIT"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 0,
            },
            "E_ARCH",
        ),
    ],
)
def test_bad_scalings(scaling: dict[str, Any], code: str) -> None:
    with pytest.raises(ModelError) as caught:
        rope.from_config(Fields({"rope_scaling": scaling}, "config.json"), 16, 4096)
    assert caught.value.code == code
    assert "\x1b" not in str(caught.value)


def test_interleaved_rows_is_the_permutation_of_the_converter() -> None:
    hf = np.arange(3 * 8 * 2, dtype=np.float32).reshape(24, 2)
    order = rope.interleaved_rows(heads=3, head_dim=8)
    gguf = hf[order]
    np.testing.assert_array_equal(gguf, interleave(hf, heads=3))
    np.testing.assert_array_equal(gguf[np.argsort(order)], hf)
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_context_that_a_model_is_loaded_with(tmp_path: Path) -> None:
    pairs = 16 // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [4.0] * pairs}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 64, **factors}
    folder = tiny_hf(tmp_path / "hf", config={"rope_scaling": scaling})
    short, long = Model.load(folder), Model.load(folder, context=256)
    assert (short.spec.context, long.spec.context) == (64, 256)
    np.testing.assert_allclose(short.spec.ropes[0].inv_freq / long.spec.ropes[0].inv_freq, 4.0, rtol=RELATIVE)
    assert np.abs(short.logits([1, 5, 9]) - long.logits([1, 5, 9])).max() > 1e-3
    with pytest.raises(InputError, match="exceed the model's context of 64"):
        short.logits([1] * 65)
