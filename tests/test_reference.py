"""The oracle itself: against transformers' logits, published text, central differences and the algebra it must obey."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.make_transformers_llama import FILE, MODELS, ROWS, TOKENS
from nomoat.models.spec import RopeSpec
from nomoat.text.tokenizer import Tokenizer
from reference import (
    Reference,
    attention,
    capped,
    gelu,
    layernorm,
    linear,
    log_softmax,
    random_lora,
    rmsnorm,
    rope,
    segments,
    silu,
    softmax,
)
from stories import golden_text, stories_gguf
from tiny import tiny_hf, tiny_llama

SMALL: dict[str, Any] = {"width": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
TARGETS_OF = [*TOKENS[1:], -1]
WEIGHTS = [0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference.load(tiny_hf(tmp_path_factory.mktemp("small") / "hf", **SMALL))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_logits_of_transformers(name: str, source: str, tmp_path: Path) -> None:
    """transformers takes angles in float32: at 12 positions they are off by 12 eps, logits by a few times that."""
    path = tmp_path / "model"
    model = Reference.load(tiny_hf(path, **MODELS[name]) if source == "hf" else tiny_llama(path, **MODELS[name]))
    golden = np.load(FILE)[f"{name}.logits"]
    bound = 4 * len(TOKENS) * np.finfo(np.float32).eps * np.abs(golden).max()
    np.testing.assert_allclose(model.logits(TOKENS)[ROWS], golden, rtol=0, atol=bound)


def test_stories260k_reproduces_its_published_text(shared_data: Path, tmp_path: Path) -> None:
    """Each of the 256 tokens is the most likely one after those before it; by causality one pass shows all of greedy decoding."""
    from nomoat.files.gguf import open_gguf

    source = shared_data / "stories260k"
    path = stories_gguf(source, tmp_path / "stories.gguf")
    with open_gguf(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    tokens = tokenizer.encode(golden_text(source))
    assert len(tokens) == 257
    assert tokens[0] == 1
    model = Reference.load(path)
    np.testing.assert_array_equal(model.logits(tokens)[:-1].argmax(-1), tokens[1:])
    assert model.greedy(tokens[:1], 8) == tokens[1:9]


def test_one_weight_type_is_dequantized_as_stored(tmp_path: Path) -> None:
    exact = Reference.load(tiny_llama(tmp_path / "f32.gguf"))
    rounded = Reference.load(tiny_llama(tmp_path / "q8.gguf", type="Q8_0"))
    for name, weight in exact.weights.items():
        if weight.ndim == 2:  # Q8_0 rounds to 1/254 of the largest of 32; its scale to 11 bits
            assert 0 < np.abs(weight - rounded.weights[name]).max() <= np.abs(weight).max() * (1 / 254 + 2**-11)
        else:
            np.testing.assert_array_equal(weight, rounded.weights[name])


def test_complex_step_equals_central_differences(small: Reference) -> None:
    """A central difference with step d is off by d^2 (third derivative) + eps / d: at d = 1e-5 about 1e-10 of a loss near 6."""
    lora = random_lora(small.spec, rank=2, scale=2.0)
    batch = (TOKENS, TARGETS_OF, WEIGHTS, (0, 7, 12))
    for place in [(0, "q"), (1, "down"), (0, "gate"), (1, "v")]:
        for part in (0, 1):
            entry = 5
            exact = small.gradient(place, part, lora, *batch, entries=[entry])[0]
            losses = []
            for step in (1e-5, -1e-5):
                shifted = lora[place][part].copy()
                shifted.reshape(-1)[entry] += step
                pair = (shifted, lora[place][1]) if part == 0 else (lora[place][0], shifted)
                losses.append(float(small.loss(*batch, {**lora, place: (*pair, 2.0)})))
            assert exact == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_directional_derivative_is_the_inner_product_with_the_gradient(small: Reference) -> None:
    lora = random_lora(small.spec, rank=1, targets=("k", "o", "up"))
    batch = (TOKENS, TARGETS_OF, WEIGHTS)
    rng = np.random.default_rng(3)
    directions = {place: (rng.standard_normal(a.shape), rng.standard_normal(b.shape)) for place, (a, b, _) in lora.items()}
    expected = sum(
        float((small.gradient(place, part, lora, *batch) * directions[place][part]).sum()) for place in lora for part in (0, 1)
    )
    assert small.derivative(directions, lora, *batch) == pytest.approx(expected, rel=1e-12)


def test_segments_are_independent_and_causal(small: Reference) -> None:
    packed = small.logits(TOKENS, (0, 5, 12))
    np.testing.assert_allclose(packed[:5], small.logits(TOKENS[:5]), atol=1e-13)
    np.testing.assert_allclose(packed[5:], small.logits(TOKENS[5:]), atol=1e-13)
    changed = [*TOKENS[:8], 99, *TOKENS[9:]]
    difference = np.abs(small.logits(changed) - small.logits(TOKENS)).max(-1)
    assert difference[:8].max() == 0
    assert difference[8:].min() > 1e-3


def test_positions_and_mask_of_segments() -> None:
    position, allowed = segments((0, 2, 5))
    assert position.tolist() == [0, 1, 0, 1, 2]
    assert allowed.astype(int).tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_lora_equals_merged_weights(small: Reference) -> None:
    lora = random_lora(small.spec, rank=3, scale=0.7)
    merged = dict(small.weights)
    for (layer, target), (a, b, scale) in lora.items():
        merged[f"blk.{layer}.{target}"] = merged[f"blk.{layer}.{target}"] + scale * b @ a
    with_lora = small.logits(TOKENS, lora=lora)
    np.testing.assert_allclose(with_lora, Reference(small.spec, merged).logits(TOKENS), atol=1e-12)
    assert np.abs(with_lora - small.logits(TOKENS)).max() > 0.1


def test_leading_axes_are_adapters_side_by_side(small: Reference) -> None:
    loras = [random_lora(small.spec, rank=2, seed=seed) for seed in (1, 2)]
    both = {p: (np.stack([x[p][0] for x in loras]), np.stack([x[p][1] for x in loras]), 1.0) for p in loras[0]}
    found = small.loss(TOKENS, TARGETS_OF, WEIGHTS, lora=both)
    np.testing.assert_allclose(found, [small.loss(TOKENS, TARGETS_OF, WEIGHTS, lora=x) for x in loras], rtol=1e-13)


def test_loss_is_the_weighted_mean_of_the_target_rows(small: Reference) -> None:
    logits = small.logits(TOKENS)
    expected = total = 0.0
    for row, (target, weight) in enumerate(zip(TARGETS_OF, WEIGHTS, strict=True)):
        if weight:
            expected -= weight * (logits[row, target] - math.log(math.fsum(math.exp(x) for x in logits[row])))
            total += weight
    assert small.loss(TOKENS, TARGETS_OF, WEIGHTS) == pytest.approx(expected / total, rel=1e-12)


def test_rope_turns_pairs_and_depends_on_distance_only() -> None:
    inv_freq = np.array([1.0, 0.25], np.float32)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 6))
    for interleaved in (True, False):
        spec = RopeSpec(4, interleaved, inv_freq)
        turned = rope(q, np.array([3]), spec)[0, 0]
        pair = (2, 3) if interleaved else (1, 3)
        a, b = q[0, 0, pair[0]], q[0, 0, pair[1]]
        turn = complex(a, b) * complex(math.cos(0.75), math.sin(0.75))  # position 3 x frequency 0.25
        assert complex(turned[pair[0]], turned[pair[1]]) == pytest.approx(turn, abs=1e-12)
        assert turned[4:].tolist() == q[0, 0, 4:].tolist()
        near, far = ((rope(q, np.array([p + 2]), spec) * rope(k, np.array([p]), spec)).sum() for p in (0, 1000))
        assert near == pytest.approx(far, abs=1e-9)


def test_pieces_against_scalar_formulas() -> None:
    x = np.array([3.0, -4.0])
    assert rmsnorm(x, np.array([1.0, 2.0]), 0.5) == pytest.approx([3 / math.sqrt(13), -8 / math.sqrt(13)])
    assert layernorm(np.array([5.0, -2.0]), np.array([1.0, 2.0]), 7.0, 0.75) == pytest.approx(
        [7 + 3.5 / math.sqrt(13), 7 - 7 / math.sqrt(13)]
    )
    assert silu(np.array([1.5]))[0] == pytest.approx(1.5 / (1 + math.exp(-1.5)))
    assert gelu(np.array([0.0, 1.0, -1.0])) == pytest.approx([0, 0.841192, -0.158808], abs=1e-6)
    assert capped(np.array([1.5]), 3.0)[0] == pytest.approx(3 * math.tanh(0.5))
    assert capped(np.array([1.5]), 0.0)[0] == 1.5
    assert softmax(np.array([0.0, math.log(3)])) == pytest.approx([0.25, 0.75])
    assert softmax(np.array([9.0, 0.0, 0.0]), np.array([False, True, True])) == pytest.approx([0, 0.5, 0.5])
    assert log_softmax(np.full(8, 700.0)) == pytest.approx(np.full(8, -math.log(8)))
    weight, a, b = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.array([[5.0]])
    assert linear(np.array([[1.0, 1.0]]), weight, (a, b, 0.1))[0, 0] == pytest.approx(3 + 0.1 * 7 * 5)


def test_grouped_attention_shares_heads_in_order() -> None:
    """Two key/value heads with far-apart constant values: query heads 0 and 1 read the first, 2 and 3 the second."""
    q = np.zeros((3, 4, 2))
    k = np.zeros((3, 2, 2))
    v = np.stack([np.full((3, 2), 1.0), np.full((3, 2), 100.0)], axis=1)
    mixed = attention(q, k, v, segments((0, 3))[1])
    assert mixed[:, :, 0].tolist() == [pytest.approx([1, 1, 100, 100])] * 3
