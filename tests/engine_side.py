"""The engine under test, in the terms of tests/reference.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nomoat.data.pack import Pack
from nomoat.engine.stack import Adapter
from nomoat.models.spec import LINEARS, ModelSpec
from reference import Lora, Place

if TYPE_CHECKING:
    from nomoat.engine.lora import TrainableLora
    from nomoat.engine.model import Model

Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def adapter_of(lora: Lora) -> Adapter:
    """In float32, as the engine and files hold it."""
    a, _, scale = next(iter(lora.values()))
    tensors = {place: (a.astype(np.float32), b.astype(np.float32)) for place, (a, b, _) in lora.items()}
    targets = tuple(target for target in LINEARS if any(target == t for _, t in lora))
    return Adapter(rank=a.shape[-2], alpha=scale * a.shape[-2], targets=targets, tensors=tensors)


def lora_of(adapter: Adapter, weight: float = 1.0) -> dict[Place, Any]:
    """In float64, for the reference."""
    scale = weight * adapter.scale
    return {place: (a.astype(np.float64), b.astype(np.float64), scale) for place, (a, b) in adapter.tensors.items()}


class Trained:
    """A TrainableLora whose parameters are known by place, in whatever order, and order of axes, the engine keeps them."""

    def __init__(self, lora: TrainableLora, seed: int = 0) -> None:
        """Fills A and B with random values, each a tenth of what would change the layer's output by its own size."""
        rng = np.random.default_rng(seed)
        for parameter in lora.parameters:
            parameter[...] = rng.standard_normal(parameter.shape) * 0.1
        self.lora = lora
        adapter = lora.to_adapter()
        self.where: dict[Place, list[tuple[int, tuple[int, ...]]]] = {
            place: [self._find(matrix) for matrix in pair] for place, pair in adapter.tensors.items()
        }
        assert len({index for found in self.where.values() for index, _ in found}) == len(lora.parameters)

    def _find(self, matrix: npt.NDArray[np.float32]) -> tuple[int, tuple[int, ...]]:
        """(index of the parameter, order of its axes in the matrix)"""
        for index, parameter in enumerate(self.lora.parameters):
            for axes in itertools.permutations(range(parameter.ndim)):
                if np.array_equal(parameter.transpose(axes), matrix):
                    return index, axes
        raise AssertionError("to_adapter() returned a matrix that is none of the parameters")

    def set(self, lora: Lora) -> None:
        """Copies A and B in."""
        for place, found in self.where.items():
            for (index, axes), matrix in zip(found, lora[place][:2], strict=True):
                self.lora.parameters[index].transpose(axes)[...] = matrix

    def values(self) -> dict[Place, Any]:
        return lora_of(self.lora.to_adapter())

    def gradients(self, model: Model, pack: Pack, precision: str) -> tuple[dict[Place, Pair], npt.NDArray[np.float32]]:
        """d loss / d (A, B) of the weighted mean cross entropy, and the log-probabilities."""
        self.lora.zero_grad()
        weights = pack.weights[pack.weights != 0]
        logp = model.loss_gradients(pack, self.lora, (-weights / weights.sum()).astype(np.float32), precision=precision)
        return self.by_place(), logp

    def by_place(self) -> dict[Place, Pair]:
        """Copies of the gradients as they are, (dA, dB)."""
        found: dict[Place, Pair] = {}
        for place, places in self.where.items():
            da, db = (self.lora.gradients[index].transpose(axes).copy() for index, axes in places)
            found[place] = (da, db)
        return found


def loss(pack: Pack, logp: npt.NDArray[np.float32]) -> float:
    """Weighted mean cross entropy."""
    weights = pack.weights[pack.weights != 0].astype(np.float64)
    return float(-(logp * weights).sum() / weights.sum())


def flat(gradients: Mapping[Place, Pair]) -> npt.NDArray[np.float64]:
    """All gradients as one vector, in the order of places."""
    return np.concatenate([np.ravel(part) for place in sorted(gradients) for part in gradients[place]]).astype(np.float64)


def relative_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Distance over the length of `expected`."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def cosine(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Cosine of the angle between two arrays as vectors."""
    a, b = np.ravel(found).astype(np.float64), np.ravel(expected).astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def random_pack(vocab: int, lengths: tuple[int, ...], seed: int) -> Pack:
    """Segments of random tokens; a third of the rows carries no loss, a third half a weight."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    weights = rng.choice(np.array([0.0, 0.5, 1.0], np.float32), rows)
    weights[-1] = 1.0
    return Pack(
        tokens=rng.integers(0, vocab, rows, dtype=np.int32),
        starts=np.cumsum([0, *lengths], dtype=np.int32),
        targets=rng.integers(0, vocab, rows, dtype=np.int32),
        weights=weights,
        examples=tuple(range(len(lengths))),
    )


def joined(packs: list[Pack]) -> Pack:
    """The segments of several packs in one."""
    bounds = np.cumsum([0, *(pack.rows for pack in packs)])
    starts = [pack.starts[:-1] + begin for pack, begin in zip(packs, bounds[:-1], strict=True)]
    return Pack(
        tokens=np.concatenate([pack.tokens for pack in packs]),
        starts=np.concatenate([*starts, bounds[-1:]]).astype(np.int32),
        targets=np.concatenate([pack.targets for pack in packs]),
        weights=np.concatenate([pack.weights for pack in packs]),
        examples=tuple(range(sum(len(pack.examples) for pack in packs))),
    )


def rounding(spec: ModelSpec, rows: int) -> float:
    """How far two computations in float32 may be apart, relative to the length of the result.

    Each of the linears on a path rounds sums of K products (eps * sqrt(K)), on either side; angles are off by a rounding of the
    position (eps * rows). Activations and softmax add less than the linears do.
    """
    eps = float(np.finfo(np.float32).eps)
    columns = max(spec.linear_shape(target, layer)[1] for layer, target in spec.places())
    return 2 * eps * (7 * spec.layers * math.sqrt(columns) + rows)
