"""A stack of adapters equals the sum of its adapters; names of stacks are read exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nomoat.engine.stack import Stack
from nomoat.errors import AdapterError, InputError
from nomoat.models.spec import TARGETS
from toy import random_adapter, toy_spec


def test_stack_equals_the_sum_of_its_adapters() -> None:
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
            assert all(array.flags.c_contiguous for array in (a, bt, scale))
            np.testing.assert_allclose(((x @ a.T) * scale) @ bt, expected, rtol=1e-5, atol=1e-5)
    assert (stack[1, "v"].a.shape[0], stack[0, "q"].a.shape[0], stack.rank) == (5, 7, 7)


def test_a_place_without_adapter_is_absent() -> None:
    spec = toy_spec()
    stack = Stack(spec, [(random_adapter(spec, 1, targets=("q",), layers=(1,)), 1.0)])
    assert stack.get(0, "q") is None
    assert list(stack) == [(1, "q")]
    assert len(Stack(spec, [])) == 0


def test_key_changes_with_contents_weight_strength_and_order() -> None:
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
def test_weight_must_be_finite(weight: float) -> None:
    spec = toy_spec()
    with pytest.raises(InputError, match="finite"):
        Stack(spec, [(random_adapter(spec, 1), weight)])


def test_an_adapter_of_another_shape_is_refused() -> None:
    spec = toy_spec()
    adapter = random_adapter(spec, 1)
    for wrong in (toy_spec(layers=1), replace(spec, width=16), replace(spec, blocks=(replace(spec.blocks[0], kv_heads=3),) * 2)):
        with pytest.raises(AdapterError):
            Stack(wrong, [(adapter, 1.0)])


def test_non_finite_weights_are_refused() -> None:
    spec = toy_spec()
    adapter = random_adapter(spec, 1)
    adapter.tensors[1, "up"][1][3, 2] = np.inf
    with pytest.raises(AdapterError, match="layer 1, up: B holds 1"):
        Stack(spec, [(adapter, 1.0)])
