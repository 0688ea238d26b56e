"""Adapters as the native engine takes them: stacks for the forward pass, and the one that is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from nomoat import _native
from nomoat.engine.stack import Adapter, Place, Stack, StackedLinear, natural
from nomoat.errors import InputError
from nomoat.models.spec import COVERABLE, LINEARS, TARGETS, ModelSpec

Float32 = npt.NDArray[np.float32]

_sets: WeakKeyDictionary[Stack, _native.LoraSet] = WeakKeyDictionary()


def native_set(stack: Stack, layers: int) -> _native.LoraSet:
    """The stack's arrays as the engine's adapter table; made once for each stack, which keeps the arrays alive."""
    found = _sets.get(stack)
    if found is None:
        found = _native.LoraSet(layers)
        for (layer, target), linear in stack.linears.items():
            found.set(layer, LINEARS.index(target), linear.a, linear.bt, linear.scale)
        _sets[stack] = found
    return found


class TrainableLora:
    """A new adapter, on top of a frozen stack if `base` is given: at each linear both are one adapter of concatenated rank.

    `parameters` and `gradients` are float32 views, A [r, K] and B^T [r, N] in turn, of E experts A [r, E, K] and B^T [r, E, N],
    named by `names`. A is Kaiming-uniform as in PEFT (U(-1/sqrt(K), 1/sqrt(K))), B is zero, so training starts from the base
    model. `targets` are some of COVERABLE, of which those count that the model has. Raises InputError E_LIMIT.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        targets: Sequence[str] = TARGETS,
        seed: int = 0,
        base: Stack | None = None,
    ) -> None:
        if not targets or set(targets) - set(COVERABLE):
            raise InputError(f"targets {', '.join(targets) or '(none)'}; expected some of {', '.join(COVERABLE)}", code="E_LIMIT")
        places = list(spec.places(targets))
        if not places:
            raise InputError(f"targets {', '.join(targets)}; the model has none of them", code="E_LIMIT")
        smallest = min(min(spec.linear_shape(target, layer)) for layer, target in places)
        if not 1 <= rank <= smallest:
            raise InputError(f"rank {rank}; expected 1 to {smallest}, the smallest side of a linear here", code="E_LIMIT")
        self.spec, self.rank, self.alpha = spec, rank, alpha
        self.targets = tuple(target for target in LINEARS if any(target == place[1] for place in places))
        self.base = base
        self.names: list[str] = []
        self.parameters: list[Float32] = []
        self.gradients: list[Float32] = []
        self.native = _native.LoraSet(spec.layers)
        self.places: list[Place] = []
        self._arrays: list[Float32] = []  # keeps what the native table points to alive
        for layer, target in spec.places():
            frozen = base.linears.get((layer, target)) if base else None
            if (layer, target) in places:
                self._add(layer, target, seed, frozen)
            elif frozen is not None:
                self.native.set(layer, LINEARS.index(target), frozen.a, frozen.bt, frozen.scale)

    def _add(self, layer: int, target: str, seed: int, frozen: StackedLinear | None) -> None:
        rows, cols = self.spec.linear_shape(target, layer)
        experts = self.spec.experts_at(target, layer)
        middle = (experts,) if experts else ()
        beneath = 0 if frozen is None else len(frozen.scale)
        a = np.zeros((beneath + self.rank, *middle, cols), np.float32)
        bt = np.zeros((beneath + self.rank, *middle, rows), np.float32)
        scale = np.full(beneath + self.rank, self.alpha / self.rank, np.float32)
        if frozen is not None:
            a[:beneath], bt[:beneath], scale[:beneath] = frozen.a, frozen.bt, frozen.scale
        words = np.random.PCG64(np.random.SeedSequence([seed, layer, LINEARS.index(target)])).random_raw(a[beneath:].size)
        uniform = (words >> np.uint64(40)).astype(np.float64) / 2.0**24  # raw words: a stream that NumPy guarantees
        a[beneath:] = ((2 * uniform - 1) / np.sqrt(cols)).reshape(a[beneath:].shape)
        da, dbt = np.zeros_like(a[beneath:]), np.zeros_like(bt[beneath:])
        self.native.set(layer, LINEARS.index(target), a, bt, scale, da, dbt)
        self._arrays += [a, bt, scale, da, dbt]
        self.places.append((layer, target))
        self.names += [f"blk.{layer}.{target}.a", f"blk.{layer}.{target}.bt"]
        self.parameters += [a[beneath:], bt[beneath:]]
        self.gradients += [da, dbt]

    def zero_grad(self) -> None:
        """Sets all gradients to zero."""
        _native.clear(self.gradients)

    def to_adapter(self) -> Adapter:
        """A copy of the trained part as an adapter of its own."""
        tensors = {place: natural(self.parameters[2 * i], self.parameters[2 * i + 1]) for i, place in enumerate(self.places)}
        return Adapter(self.rank, self.alpha, self.targets, tensors)
