"""Packing: every example exactly once, targets and weights right at every segment bound, the same order everywhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomoat.data.mask import Example
from nomoat.data.pack import Pack, batches, pack, shuffled_order, useful_rows
from nomoat.errors import InputError


@st.composite
def examples(draw: st.DrawFn) -> Example:
    count = draw(st.integers(2, 12))
    tokens = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    weights = [0.0, *draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count - 1, max_size=count - 1))]
    weights[draw(st.integers(1, count - 1))] = 1.0
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32))


def segments(packed: Pack) -> list[tuple[int, slice]]:
    bounds = packed.starts.tolist()
    return [(index, slice(a, b)) for index, a, b in zip(packed.examples, bounds[:-1], bounds[1:], strict=True)]


def check(packs: list[Pack], given_examples: list[Example], max_tokens: int) -> None:
    """Each pack is made of whole examples, cut only behind the last target that carries loss."""
    for packed in packs:
        assert packed.rows == len(packed.targets) == len(packed.weights) == packed.starts[-1] and packed.starts[0] == 0
        assert packed.rows <= max_tokens or len(packed.examples) == 1
        assert [a.dtype for a in (packed.tokens, packed.starts, packed.targets)] == [np.int32] * 3
        assert packed.weights.dtype == np.float32
        for index, rows in segments(packed):
            source = given_examples[index]
            length = rows.stop - rows.start
            assert np.array_equal(packed.tokens[rows], source.tokens[:length])
            assert np.array_equal(packed.targets[rows], source.tokens[1 : length + 1])
            assert np.array_equal(packed.weights[rows], source.weights[1 : length + 1])
            assert packed.weights[rows][-1] > 0, "a row that no loss depends on was kept"
            assert not source.weights[length + 1 :].any(), "a target with loss was lost"


@given(st.lists(examples(), max_size=12), st.integers(1, 40), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_example_is_packed_once(some: list[Example], max_tokens: int, dice: Any) -> None:
    order = list(range(len(some)))
    dice.shuffle(order)
    packs = pack(some, max_tokens, order=order)
    assert [index for packed in packs for index in packed.examples] == order
    check(packs, some, max_tokens)
    for left, right in pairwise(packs):  # greedy: no pack ends while the next example still fits
        assert left.rows + useful_rows(some[right.examples[0]]) > max_tokens


@given(st.lists(examples(), min_size=1, max_size=20), st.integers(1, 6), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_an_epoch_visits_every_example_once(some: list[Example], batch: int, max_tokens: int, epoch: int) -> None:
    steps = batches(some, batch, max_tokens, seed=7, epoch=epoch)
    visited = [[index for packed in step for index in packed.examples] for step in steps]
    assert sorted(index for step in visited for index in step) == list(range(len(some)))
    assert [len(step) for step in visited[:-1]] == [batch] * (len(visited) - 1) and 1 <= len(visited[-1]) <= batch
    for step in steps:
        check(step, some, max_tokens)


def test_total_weight_survives() -> None:
    rng = np.random.default_rng(0)
    some = []
    for _ in range(50):
        weights = (rng.random(rng.integers(2, 60)) < 0.3).astype(np.float32)
        weights[0], weights[1] = 0, 1
        some.append(Example(rng.integers(0, 99, len(weights)).astype(np.int32), weights))
    total = sum(float(packed.weights.sum()) for step in batches(some, 16, 128, seed=0, epoch=0) for packed in step)
    assert total == sum(float(example.weights.sum()) for example in some)


def test_the_order_is_fixed_for_ever() -> None:
    """A run that is resumed on another machine, with another numpy, must see the same batches."""
    assert shuffled_order(8, seed=0, epoch=0).tolist() == ORDER_0_0
    assert shuffled_order(8, seed=0, epoch=1).tolist() == ORDER_0_1
    assert shuffled_order(0, seed=0, epoch=0).tolist() == []


ORDER_0_0 = [3, 2, 1, 6, 0, 7, 4, 5]
ORDER_0_1 = [7, 4, 5, 1, 6, 2, 0, 3]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(shuffled_order(30, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25 and all(sorted(order) == list(range(30)) for order in orders)


LEARNED = Example(np.array([1, 2, 3], np.int32), np.array([0, 0, 1], np.float32))
MASKED = Example(np.array([1, 2, 3], np.int32), np.zeros(3, np.float32))


def test_an_example_without_loss_is_refused_instead_of_giving_nan() -> None:
    """D07."""
    with pytest.raises(InputError, match="no token to learn") as fault:
        pack([LEARNED, MASKED], 16)
    assert (fault.value.code, fault.value.exit_code) == ("E_EMPTY", 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack([LEARNED], 0),
        lambda: pack([LEARNED], -1),
        lambda: batches([LEARNED], 0, 16, seed=0, epoch=0),
        lambda: batches([LEARNED], 1, 0, seed=0, epoch=0),
        lambda: batches([LEARNED], 1, 16, seed=-1, epoch=0),
        lambda: batches([LEARNED], 1, 16, seed=0, epoch=-1),
    ],
)
def test_sizes_out_of_range(call: Any) -> None:
    """D12."""
    with pytest.raises(InputError) as fault:
        call()
    assert (fault.value.code, fault.value.exit_code) == ("E_LIMIT", 2)
