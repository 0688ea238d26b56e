"""A model of one adapted matrix with exact gradients in NumPy: for tests of the training loop, of checkpoints and adapters."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from nomoat.adapters.package import save_adapter
from nomoat.data.mask import Example
from nomoat.data.pack import Pack, batches, pack
from nomoat.engine.stack import Adapter, Float32, Stack
from nomoat.errors import NonFiniteError
from nomoat.models.spec import TARGETS, LayerSpec, ModelSpec, RopeSpec
from nomoat.train.checkpoint import Checkpoints
from nomoat.train.loop import Trainer
from nomoat.train.plan import TrainOptions


def toy_spec(layers: int = 2) -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        name="toy",
        width=12,
        head_dim=4,
        vocab=32,
        context=64,
        norm_eps=1e-5,
        tied_head=True,
        blocks=(LayerSpec(heads=3, kv_heads=1, ffn=20),) * layers,
        ropes=(RopeSpec(dim=4, interleaved=True, inv_freq=np.ones(2, np.float32)),),
    )


def fingerprint(spec: ModelSpec) -> dict[str, Any]:
    """As `Model.fingerprint`."""
    dimensions = {key: getattr(spec, key) for key in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab")}
    return {
        "architecture": spec.architecture,
        "name": spec.name,
        "dimensions": dimensions,
        "vocabulary": "v" * 64,
        "digest": "d" * 64,
    }


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


class ToyLora:
    """An adapter of matrix `o` in layer 0, with gradients."""

    def __init__(self, spec: ModelSpec, *, rank: int = 2, alpha: float = 4.0, seed: int = 0) -> None:
        rows, columns = spec.linear_shape("o")
        a = np.random.default_rng(seed).uniform(-0.3, 0.3, (rank, columns)).astype(np.float32)
        self.rank, self.alpha = rank, alpha
        self.parameters = [a, np.zeros((rows, rank), np.float32)]
        self.gradients = [np.zeros_like(parameter) for parameter in self.parameters]
        self.names = ["blk.0.o.a", "blk.0.o.b"]

    def zero_grad(self) -> None:
        for gradient in self.gradients:
            gradient[...] = 0

    def to_adapter(self) -> Adapter:
        a, b = (parameter.copy() for parameter in self.parameters)
        return Adapter(self.rank, self.alpha, ("o",), {(0, "o"): (a, b)})


class ToyModel:
    """logits = U (x + s B A x) with x = embedding of the token: next-token prediction from one token."""

    def __init__(self, seed: int = 1) -> None:
        self.spec = toy_spec(layers=1)
        rng = np.random.default_rng(seed)
        self.embedding = rng.standard_normal((self.spec.vocab, self.spec.width))
        self.head = rng.standard_normal((self.spec.vocab, self.spec.width))
        self.calls = 0
        self.poisoned: frozenset[int] = frozenset()  # calls of loss_gradients that give NaN
        self.refused: frozenset[int] = frozenset()  # calls that raise

    def logprobs(self, pack: Pack, *, stack: Stack | None = None, precision: str = "int8") -> Float32:
        rows = np.flatnonzero(pack.weights)
        x = self.embedding[pack.tokens[rows]]
        y = x.copy()
        if stack is not None and (0, "o") in stack:
            a, bt, scale = stack[0, "o"]
            y += ((x @ a.T.astype(float)) * scale) @ bt.astype(float)
        return self._logp(y)[np.arange(len(rows)), pack.targets[rows]].astype(np.float32)

    def loss_gradients(
        self, pack: Pack, lora: ToyLora, d_logp: Float32, *, precision: str = "bf16", budget: int | None = None
    ) -> Float32:
        self.calls += 1
        rows = np.flatnonzero(pack.weights)
        targets = pack.targets[rows]
        a, b = (parameter.astype(float) for parameter in lora.parameters)
        scale = lora.alpha / lora.rank
        x = self.embedding[pack.tokens[rows]]
        logp = self._logp(x + scale * (x @ a.T) @ b.T)
        d_logits = -np.exp(logp) * d_logp[:, None].astype(float)
        d_logits[np.arange(len(rows)), targets] += d_logp
        dy = d_logits @ self.head
        lora.gradients[0] += (scale * (dy @ b).T @ x).astype(np.float32)
        lora.gradients[1] += (scale * dy.T @ (x @ a.T)).astype(np.float32)
        if self.calls in self.poisoned:
            lora.gradients[0][0, 0] = np.nan
        if self.calls in self.refused:
            raise NonFiniteError("a log-probability is NaN")
        return logp[np.arange(len(rows)), targets].astype(np.float32)

    def _logp(self, y: np.ndarray) -> np.ndarray:
        logits = y @ self.head.T
        logits -= logits.max(axis=1, keepdims=True)
        logp: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logp


def toy_examples(count: int, seed: int = 7, vocab: int = 32) -> list[Example]:
    """Sequences in which every token but the first is learned; token t is followed by (5 t + 1) mod V."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = [int(rng.integers(vocab))]
        for _ in range(int(rng.integers(4, 12))):
            tokens.append((5 * tokens[-1] + 1) % vocab)
        weights = np.array([0.0] + [1.0] * (len(tokens) - 1), np.float32)
        found.append(Example(np.array(tokens, np.int32), weights))
    return found


def toy_trainer(model: ToyModel | None = None, *, options: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    """60 steps on 40 examples, 3 epochs of 20 steps; `changes` go to Trainer."""
    model = model or ToyModel()
    chosen = TrainOptions(**({"batch_sequences": 2, "seed": 3, "checkpoint_seconds": 0.0} | (options or {})))
    examples, held_out = toy_examples(40), toy_examples(8, seed=8)
    arguments: dict[str, Any] = {
        "peak_rate": 0.05,
        "steps": 60,
        "batches": lambda epoch: batches(examples, chosen.batch_sequences, 32, chosen.seed, epoch),
        "validation": pack(held_out, 32),
        **changes,
    }
    return Trainer(model, ToyLora(model.spec), chosen, **arguments)


def run(folder: Path, output: Path, events: Connection) -> None:
    """One attempt at the whole run, going on from the newest checkpoint; tells of every event. Meant to be killed."""
    checkpoints = Checkpoints(folder, {"run": "toy"})
    # long enough that twenty kills land before the end on any machine
    trainer = toy_trainer(steps=400, checkpoints=checkpoints, report=lambda event: events.send(event["event"]))
    checkpoint = checkpoints.latest()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    trainer.run()
    save_adapter(output, trainer.lora.to_adapter(), trainer.model.spec, {}, replace=True)
