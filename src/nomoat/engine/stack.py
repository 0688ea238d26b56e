"""Adapters in memory, and stacks of them.

An adapter adds a low-rank product beside a frozen linear (LoRA, Hu et al. 2021, arXiv:2106.09685):

    y = W x + (alpha / r) B (A x)          A [r, K], B [N, r]

Several adapters at once are one adapter whose rank is the sum of the ranks, because

    sum_i s_i B_i (A_i x) = [B_1 .. B_n] diag(s) [A_1; ..; A_n] x

so a stack is exact and needs no second code path. Adapters of one stack may cover different linears. Where a layer has E
experts, each has an A and a B of its own: A [E, r, K], B [E, N, r].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nomoat.errors import AdapterError, InputError, printable
from nomoat.models.spec import LINEARS, ModelSpec

Float32 = npt.NDArray[np.float32]

#: (layer, target), for example (0, "q"); targets are those of `nomoat.models.spec.LINEARS`.
Place = tuple[int, str]


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter. Its arrays are treated as immutable; rows of q/k `B` are in the row order of the base file.

    tensors[layer, target] = (A [r, K], B [N, r]), of experts (A [E, r, K], B [E, N, r]), float32. `rank` and `alpha` are those of
    the whole adapter; a place may have a rank of its own (its A decides), and a strength of its own is folded into its B when the
    adapter is read.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    tensors: Mapping[Place, tuple[Float32, Float32]]

    @property
    def scale(self) -> float:
        """alpha / r: what the product B (A x) is multiplied by."""
        return self.alpha / self.rank

    def places(self) -> list[Place]:
        """The linears it covers, in the one order that is used for files, hashes and gradients."""
        return sorted(self.tensors, key=lambda place: (place[0], LINEARS.index(place[1])))

    def parameters(self) -> int:
        """Trainable weights in all A and B."""
        return sum(a.size + b.size for a, b in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of strength, places, shapes and weights."""
        hasher = hashlib.sha256(f"lora {self.scale!r}".encode())
        for layer, target in self.places():
            a, b = self.tensors[layer, target]
            hasher.update(f"\n{layer} {target} {a.shape} {b.shape}\n".encode())
            hasher.update(np.ascontiguousarray(a, dtype="<f4").tobytes())
            hasher.update(np.ascontiguousarray(b, dtype="<f4").tobytes())
        return hasher.hexdigest()

    def check(self, spec: ModelSpec) -> None:
        """Raises AdapterError (E_LIMIT, E_ARCH, E_SHAPE, E_TYPE, E_NONFINITE) unless it fits the model."""
        if self.rank < 1:
            raise AdapterError(f"adapter rank is {self.rank}; it must be at least 1", code="E_LIMIT")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"adapter alpha is {self.alpha}; it must be a finite number above 0", code="E_LIMIT")
        if not self.tensors:
            raise AdapterError("the adapter holds no weights", code="E_SHAPE")
        for (layer, target), (a, b) in self.tensors.items():
            where = f"layer {layer}, {printable(str(target))}"
            if not 0 <= layer < spec.layers or target not in spec.targets(layer):
                linears = spec.targets(layer if 0 <= layer < spec.layers else 0)
                raise AdapterError(
                    f"the adapter changes {where}, which {printable(spec.name)} does not have "
                    f"(layers 0 to {spec.layers - 1}, linears {', '.join(linears)})",
                    code="E_ARCH",
                )
            _check_pair(a, b, spec.tensor_shape(f"blk.{layer}.{target}"), where)


def _check_pair(a: Float32, b: Float32, shape: tuple[int, ...], where: str) -> None:
    *experts, rows, columns = shape
    if a.dtype != np.float32 or b.dtype != np.float32:
        raise AdapterError(f"{where}: A is {a.dtype} and B is {b.dtype}; both must be float32", code="E_TYPE")
    rank = a.shape[-2] if a.ndim > 1 else 0
    if rank < 1 or a.shape != (*experts, rank, columns) or b.shape != (*experts, rows, rank):
        each = "".join(f"{count}, " for count in experts)
        raise AdapterError(
            f"{where}: A is {list(a.shape)} and B is {list(b.shape)}; the base model's weight is {list(shape)}, "
            f"so A must be [{each}r, {columns}] and B [{each}{rows}, r]. Is this adapter for another model?",
            code="E_SHAPE",
        )
    # A sum is finite only if no term is NaN or infinite; it may overflow, so a second look decides.
    for name, array in (("A", a), ("B", b)):
        if not math.isfinite(float(array.sum(dtype=np.float64))) and not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            raise AdapterError(f"{where}: {name} holds {bad} NaN or infinite weights", code="E_NONFINITE")


class StackedLinear(NamedTuple):
    """All adapters of a stack at one linear, as one of rank R = sum of their ranks. All C-contiguous."""

    a: Float32  # [R, K], of experts [R, E, K]
    bt: Float32  # [R, N], of experts [R, E, N]: one rank after the other, so that those of an adapter are one piece of memory
    scale: Float32  # [R]: weight * alpha / r of the adapter that the rank row came from


def natural(a: Float32, bt: Float32) -> tuple[Float32, Float32]:
    """A and B as an Adapter has them, copied from A and B^T as a StackedLinear has them."""
    return np.swapaxes(a, 0, -2).copy(), np.ascontiguousarray(np.moveaxis(bt, 0, -1))


class Stack:
    """Adapters with weights, ready for the engine: `stack[layer, target]` is a StackedLinear, absent places have none.

    Raises InputError for a weight that is not finite, AdapterError for an adapter that does not fit `spec`.
    """

    def __init__(self, spec: ModelSpec, adapters: Sequence[tuple[Adapter, float]]) -> None:
        for adapter, weight in adapters:
            if not math.isfinite(weight):
                raise InputError(f"adapter weight {weight}: expected a finite number", code="E_LIMIT")
            adapter.check(spec)
        self.adapters = tuple((adapter, float(weight)) for adapter, weight in adapters)
        covered = {place for adapter, _ in self.adapters for place in adapter.tensors}
        self.linears: dict[Place, StackedLinear] = {
            place: self._concatenate(place) for place in sorted(covered, key=lambda p: (p[0], LINEARS.index(p[1])))
        }

    def _concatenate(self, place: Place) -> StackedLinear:
        parts = [(adapter, weight, *adapter.tensors[place]) for adapter, weight in self.adapters if place in adapter.tensors]
        a = np.concatenate([np.swapaxes(a, 0, -2) for _, _, a, _ in parts], axis=0)
        bt = np.concatenate([np.moveaxis(b, -1, 0) for _, _, _, b in parts], axis=0)
        scale = np.concatenate([np.full(a.shape[-2], weight * adapter.scale) for adapter, weight, a, _ in parts])
        return StackedLinear(
            np.ascontiguousarray(a, dtype=np.float32),
            np.ascontiguousarray(bt, dtype=np.float32),
            np.ascontiguousarray(scale, dtype=np.float32),
        )

    @cached_property
    def key(self) -> str:
        """Stable hash of contents, weights and order: two stacks with one key give the same logits (prefix caches use it)."""
        text = "\n".join(f"{weight!r} {adapter.digest}" for adapter, weight in self.adapters)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, layer: int, target: str) -> StackedLinear | None:
        """The stacked adapters of one linear, or None where no adapter touches it."""
        return self.linears.get((layer, target))

    def __getitem__(self, place: Place) -> StackedLinear:
        return self.linears[place]

    def __contains__(self, place: object) -> bool:
        return place in self.linears

    def __iter__(self) -> Iterator[Place]:
        return iter(self.linears)

    def __len__(self) -> int:
        """Number of linears touched."""
        return len(self.linears)

    @property
    def rank(self) -> int:
        """The largest concatenated rank of any linear; 0 for an empty stack."""
        return max((linear.a.shape[0] for linear in self.linears.values()), default=0)
