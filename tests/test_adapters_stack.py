"""A stack of adapters equals the sum of its adapters; names of stacks are read exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nomoat.engine.stack import Adapter, Stack
from nomoat.errors import AdapterError, InputError
from nomoat.models.spec import TARGETS, ModelSpec, RopeSpec


def toy_spec(layers: int = 2) -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        name="toy",
        layers=layers,
        width=12,
        heads=3,
        kv_heads=1,
        head_dim=4,
        ffn=20,
        vocab=32,
        context=64,
        norm_eps=1e-5,
        rope=RopeSpec(dim=4, interleaved=True, inv_freq=np.ones(2, np.float32)),
        tied_head=True,
    )


def random_adapter(
    spec: ModelSpec, seed: int, *, rank: int = 4, targets: tuple[str, ...] = TARGETS, layers: tuple[int, ...] = (0, 1)
) -> Adapter:
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        for target in targets:
            rows, columns = spec.linear_shape(target)
            a = rng.standard_normal((rank, columns), dtype=np.float32)
            b = rng.standard_normal((rows, rank), dtype=np.float32)
            tensors[layer, target] = (a, b)
    return Adapter(rank=rank, alpha=2.0 * rank, targets=targets, tensors=tensors)


def test_stack_equals_the_sum_of_its_adapters():
    spec = toy_spec()
    parts = [
        (random_adapter(spec, 1), 0.8),
        (random_adapter(spec, 2, rank=3, targets=("q", "down")), -0.5),
        (random_adapter(spec, 3, rank=1, targets=("v", "o"), layers=(1,)), 1.0),
    ]
    stack = Stack(spec, parts)
    rng = np.random.default_rng(0)
    for layer in range(spec.layers):
        for target in TARGETS:
            rows, columns = spec.linear_shape(target)
            x = rng.standard_normal((5, columns))
            expected = np.zeros((5, rows))
            for adapter, weight in parts:
                if (layer, target) in adapter.tensors:
                    a, b = adapter.tensors[layer, target]
                    expected += weight * adapter.scale * (x @ a.T.astype(float)) @ b.T.astype(float)
            a, bt, scale = stack[layer, target]
            assert a.dtype == bt.dtype == scale.dtype == np.float32
            assert a.flags.c_contiguous and bt.flags.c_contiguous and scale.flags.c_contiguous
            np.testing.assert_allclose(((x @ a.T) * scale) @ bt, expected, rtol=1e-5, atol=1e-5)
    assert stack[1, "v"].a.shape[0] == 5 and stack[0, "q"].a.shape[0] == 7 and stack.rank == 7


def test_a_place_without_adapter_is_absent():
    spec = toy_spec()
    stack = Stack(spec, [(random_adapter(spec, 1, targets=("q",), layers=(1,)), 1.0)])
    assert stack.get(0, "q") is None and (1, "q") in stack and list(stack) == [(1, "q")]
    assert len(Stack(spec, [])) == 0


def test_key_changes_with_contents_weight_strength_and_order():
    spec = toy_spec()
    one, two = random_adapter(spec, 1), random_adapter(spec, 2)
    keys = {
        Stack(spec, parts).key
        for parts in (
            [(one, 1.0)],
            [(one, 0.5)],
            [(two, 1.0)],
            [(one, 1.0), (two, 1.0)],
            [(two, 1.0), (one, 1.0)],
            [(replace(one, alpha=3.0), 1.0)],
        )
    }
    assert len(keys) == 6
    assert Stack(spec, [(one, 1.0)]).key == Stack(spec, [(random_adapter(spec, 1), 1.0)]).key


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_must_be_finite(weight):
    spec = toy_spec()
    with pytest.raises(InputError, match="finite"):
        Stack(spec, [(random_adapter(spec, 1), weight)])


def test_an_adapter_of_another_shape_is_refused():
    spec = toy_spec()
    adapter = random_adapter(spec, 1)
    for wrong in (toy_spec(layers=1), replace(spec, width=16), replace(spec, kv_heads=3)):
        with pytest.raises(AdapterError):
            Stack(wrong, [(adapter, 1.0)])


def test_non_finite_weights_are_refused():
    spec = toy_spec()
    adapter = random_adapter(spec, 1)
    adapter.tensors[1, "up"][1][3, 2] = np.inf
    with pytest.raises(AdapterError, match="layer 1, up: B holds 1"):
        Stack(spec, [(adapter, 1.0)])
