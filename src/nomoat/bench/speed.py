"""Decode, prefill, batch and train, timed: tokens per second, the share of what the machine allows, and where the time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from nomoat import _native
from nomoat.bench import roofline
from nomoat.data.pack import Pack
from nomoat.engine import kv
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import FORWARD_ROWS, Model
from nomoat.engine.stack import Adapter, Stack
from nomoat.errors import InputError
from nomoat.hub import fit
from nomoat.models.spec import ModelSpec, layer_and_part
from nomoat.train.optimizer import AdamW

#: Bytes from which on the model itself is read to find the bandwidth: of less that is read again and again, a third-level cache
#: may keep as much as it keeps of the model.
LARGEST_READ = 512 * roofline.MEGABYTE


@dataclass(frozen=True)
class Speed:
    """Of one kind of work: a rate for each round, what a token costs, and seconds by stage in the last round.

    `limits` are what the machine could do, measured before each round: tokens per second if nothing but the bytes (or the
    multiply-adds) of a token counted.
    """

    work: str
    rates: list[float]
    bytes_per_token: float
    multiply_adds_per_token: float
    limits: dict[str, list[float]]
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(self.rates)

    @property
    def shares(self) -> dict[str, float]:
        """Tokens per second over each limit, the median of the rounds: a machine that others use, too, changes within seconds."""
        return {
            name: statistics.median(rate / limit for rate, limit in zip(self.rates, limits, strict=True))
            for name, limits in self.limits.items()
        }


def in_turns(
    once: Callable[[], float], tokens: int, rounds: int, limits: Mapping[str, Callable[[], float]]
) -> tuple[list[float], dict[str, list[float]]]:
    """Tokens per second of each round, whose seconds `once` returns, and each limit as it was before that round.

    A first round, which meets cold caches, does not count.
    """
    once()
    rates: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in limits}
    for _ in range(rounds):
        for name, limit in limits.items():
            found[name].append(limit())
        rates.append(tokens / once())
    return rates, found


def prefilled(model: Model, tokens: Sequence[int], stack: Stack | None = None) -> tuple[kv.Sequence, float]:
    """A sequence with `tokens` in its cache, and the seconds that took, the logits of the last token included."""
    sequence = kv.Sequence()
    began = time.perf_counter()
    model.next_logits(sequence, tokens, stack)
    return sequence, time.perf_counter() - began


class Streams:
    """Conversations that go on side by side, one token of each a step. Which tokens does not matter."""

    def __init__(self, model: Model, tokens: Sequence[int], count: int, stacks: Sequence[Stack | None] = (None,)) -> None:
        self.model, self.tokens = model, tokens
        self.stacks = [stacks[i % len(stacks)] for i in range(count)]
        self.sequences = [prefilled(model, tokens, stack)[0] for stack in self.stacks]

    def run(self, steps: int) -> float:
        """Seconds of `steps` steps with their logits; what the next tokens are was known before."""
        rows = range(len(self.sequences))
        given = [[[self.tokens[(step + i) % len(self.tokens)]] for i in rows] for step in range(steps)]
        seconds = 0.0
        for tokens in given:
            segments = list(zip(self.sequences, tokens, self.stacks, strict=True))
            began = time.perf_counter()
            self.model.step(segments, rows)
            seconds += time.perf_counter() - began
        return seconds

    def close(self) -> None:
        for sequence in self.sequences:
            self.model.pool().cut(sequence, 0)


def decoded(model: Model, tokens: Sequence[int], count: int, streams: int = 1, stacks: Sequence[Stack | None] = (None,)) -> float:
    """Seconds for `count` steps of `streams` streams after a prompt."""
    batch = Streams(model, tokens, streams, stacks)
    seconds = batch.run(count)
    batch.close()
    return seconds


class TrainStep:
    """A step of LoRA on all linears, gradients and AdamW; all tokens carry loss."""

    def __init__(self, model: Model, rank: int) -> None:
        self.model = model
        self.lora = TrainableLora(model.spec, rank=rank, alpha=2.0 * rank)
        self.optimizer = AdamW(self.lora.parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def run(self, packs: Sequence[Pack]) -> float:
        """Mean loss over the packs, in nats."""
        total = sum(pack.rows for pack in packs)
        self.lora.zero_grad()
        loss = 0.0
        for pack in packs:
            logp = self.model.loss_gradients(pack, self.lora, np.full(pack.rows, -1 / total, np.float32))
            loss -= float(logp.sum()) / total
        self.optimizer.update(self.lora.gradients, rate=1e-4, scale=1.0)
        return loss


def dense_packs(tokens: Sequence[int], rows: int, length: int, max_tokens: int = 768) -> list[Pack]:
    """`rows` segments of `length` tokens that share no beginning, as many in a pack as `max_tokens` allow."""
    each = max(1, max_tokens // length)
    packs = []
    for first in range(0, rows, each):
        count = min(each, rows - first)
        flat = np.concatenate([np.roll(np.resize(np.asarray(tokens, np.int32), length), first + i) for i in range(count)])
        starts = np.arange(0, (count + 1) * length, length, dtype=np.int32)
        packs.append(Pack(flat, starts, np.roll(flat, -1), np.ones(len(flat), np.float32), tuple(range(count))))
    return packs


def random_adapter(spec: ModelSpec, rank: int, seed: int) -> Adapter:
    """An adapter on all linears that changes something: B is not zero."""
    lora = TrainableLora(spec, rank=rank, alpha=2.0 * rank, seed=seed)
    random = np.random.default_rng(seed)
    for parameter in lora.parameters[1::2]:
        parameter[...] = 0.01 * random.standard_normal(parameter.shape, np.float32)
    return lora.to_adapter()


def random_stack(spec: ModelSpec, rank: int, seed: int) -> Stack:
    """That adapter alone, as it is applied."""
    return Stack(spec, [(random_adapter(spec, rank, seed), 1.0)])


def weight_bytes(model: Model) -> float:
    """Packed bytes of the weights that one token reads: of experts those used, the head, and no embedding rows."""
    spec = model.spec
    total = 0.0
    for name, tensor in model.weights.tensors.items():
        layer, part = layer_and_part(name)
        experts = spec.experts_at(part, layer) if layer >= 0 else 0
        if name != "embed" or spec.tied_head:
            total += tensor.data.nbytes * (spec.experts_used / experts if experts else 1)
    return total


def head_weights(model: Model) -> int:
    return model.spec.vocab * model.spec.width


def decode(model: Model, *, prompt: int, tokens: int, rounds: int) -> Speed:
    """One stream: a token at a time after `prompt` tokens."""
    return _batch("decode", model, [None], prompt=prompt, tokens=tokens, streams=1, rounds=rounds)


def batch(model: Model, *, streams: int, adapters: int, rank: int, prompt: int, tokens: int, rounds: int) -> Speed:
    """`streams` streams, one token of each a step; with adapters, each stream has one of them."""
    stacks: list[Stack | None] = [random_stack(model.spec, rank, seed) for seed in range(adapters)]
    return _batch("batch", model, stacks or [None], prompt=prompt, tokens=tokens, streams=streams, rounds=rounds)


def _batch(
    work: str, model: Model, stacks: Sequence[Stack | None], *, prompt: int, tokens: int, streams: int, rounds: int
) -> Speed:
    _check_context(model, prompt + tokens)
    given = _some_tokens(model, prompt)
    adapters = sum(2.0 * linear.a.size + 2.0 * linear.bt.size for s in stacks if s is not None for linear in s.linears.values())
    keys = fit.kv_bytes_per_token(model.spec, model.kv_type) * (prompt + tokens / 2)
    size = (weight_bytes(model) + adapters) / streams + keys
    products = model.spec.active_linears() + head_weights(model)
    bandwidth = _read_bandwidth(model, int(size * streams))
    limits = {"memory": lambda: bandwidth() / size}
    if streams > 1:
        limits["int8"] = lambda: roofline.multiply_adds("int8") / products
    once = partial(decoded, model, given, tokens, streams, stacks)
    rates, found = in_turns(once, streams * tokens, rounds, limits)
    last = Streams(model, given, streams, stacks)
    whole, stages = profiled(lambda: last.run(tokens))
    last.close()
    return Speed(work, rates, size, products, found, whole, stages)


def _read_bandwidth(model: Model, size: int) -> Callable[[], float]:
    """What tells the bytes per second at which all threads read `size` bytes again: own memory, or the weights in turn."""
    if size <= LARGEST_READ:
        return roofline.reader(size)
    weights = [tensor.data for tensor in model.weights.tensors.values() if tensor.data.nbytes > roofline.MEGABYTE]

    def read(times: int) -> float:
        for _ in range(times):
            for data in weights:
                _native.read_all(data)
        return float(times * sum(data.nbytes for data in weights))

    return lambda: roofline.best_rate(read)


def prefill(model: Model, *, tokens: int, rounds: int) -> Speed:
    """A prompt of `tokens` tokens, with the logits of the last."""
    _check_context(model, tokens)
    given = _some_tokens(model, tokens)

    def once() -> float:
        sequence, seconds = prefilled(model, given)
        model.pool().cut(sequence, 0)
        return seconds

    products = model.spec.active_linears() + head_weights(model) / tokens
    size = weight_bytes(model) / min(tokens, FORWARD_ROWS)
    rates, limits = in_turns(once, tokens, rounds, {"int8": lambda: roofline.multiply_adds("int8") / products})
    whole, stages = profiled(once)
    return Speed("prefill", rates, size, products, limits, whole, stages)


def train(model: Model, *, rows: int, length: int, rank: int, rounds: int) -> Speed:
    """A step of LoRA on `rows` sequences of `length` tokens; multiply-adds as in `nomoat fit`: no dW of frozen weights."""
    _check_context(model, length)
    step = TrainStep(model, rank)
    packs = dense_packs(_some_tokens(model, length), rows, length)

    def once() -> float:
        began = time.perf_counter()
        step.run(packs)
        return time.perf_counter() - began

    products = 2.0 * (model.spec.active_linears() + head_weights(model))
    kinds = {kind: roofline.multiply_adds(kind) for kind in ("bf16", "f32")}
    kind = max(kinds, key=lambda name: kinds[name])  # a level without dots of bf16 takes float32 products
    rates, limits = in_turns(once, rows * length, rounds, {kind: lambda: roofline.multiply_adds(kind) / products})
    whole, stages = profiled(once)
    size = weight_bytes(model) * 2 * len(packs) / (rows * length)
    return Speed("train", rates, size, products, limits, whole, stages)


def profiled(work: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Seconds of `work`, and of each of its stages; `rest` is what no stage counted."""
    _native.profile(True)
    began = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - began
        _native.profile(False)
    stages = dict(_native.profiled())
    return seconds, stages | {"rest": max(0.0, seconds - sum(stages.values()))}


def _some_tokens(model: Model, count: int) -> list[int]:
    return [(100 + i) % model.spec.vocab for i in range(count)]


def _check_context(model: Model, tokens: int) -> None:
    if tokens > model.spec.context:
        raise InputError(f"{tokens:,} tokens; the model was trained for {model.spec.context:,}", code="E_LIMIT")


#: work: what measures it
WORK: dict[str, Callable[..., Speed]] = {"decode": decode, "prefill": prefill, "batch": batch, "train": train}
