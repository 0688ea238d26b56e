"""Does a model fit this machine, for chat and for training, and how long would a data set take?

Letters: D width, H heads, Dh head size, K key/value heads, F ffn width, L layers, V vocabulary, N weights in all matrices.

Memory
    weights       file x 1.03                                       packed layout, docs/reference
    KV            2 L K Dh x 2 bytes for each token of context      keys and values in bf16; in int8 2 L K (Dh + 4)
    activations   2 (2 D + 2 H Dh + 2 K Dh + 3 F) + 8 D bytes       for each token and layer that is kept for backward:
                  bf16 inputs of the linears, fp32 residual stream; 2 F without a gate, 3 D or 4 D with post-norms, F of all
                  experts that a token uses, a shared one's too; a recomputed layer keeps its fp32 input, 4 D, alone
    adapter       16 bytes for each parameter                       A and B, gradient, two Adam moments, all fp32; r (N + K) for
                  each linear, for each expert where experts are covered
    the rest      150 MB                                            Python, libraries, buffers
Time
    training      4 N + 6 adapter + 7 L H Dh T FLOPs for each token: forward 2 N and dX 2 N, no dW for frozen weights; LoRA
                  forward 2 and backward 4; causal attention over T tokens (or the window) forward 2 and backward 5; the head
                  counts for the share of tokens that carry loss
    decoding      every weight is read once for each token; of experts only those used, here, in N and in adapter
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nomoat.errors import ResourceError
from nomoat.memory import Memory, this_memory
from nomoat.models.spec import TARGETS, ModelSpec

if TYPE_CHECKING:
    from nomoat.engine.kv import KvType

PACKED = 1.03  # packed size / file size
PROCESS_BYTES = 150_000_000
ADAPTER_STATE = 16  # bytes for each parameter: value, gradient, two moments in fp32
TRAIN_EFFICIENCY = 0.6  # share of the rate of its products that training reaches: 870 tokens/s of SmolLM2 at 0.7 TFLOP/s
DECODE_EFFICIENCY = 0.5  # share of the read bandwidth that decoding reaches
RECOMPUTE_COST = 1.5  # one forward pass more: 6 N instead of 4 N
MARGIN = 0.9  # of the free memory may be planned for
RESERVED = 2 << 30  # bytes of memory that weights leave to the system, the cache of the conversation and everything else


@dataclass(frozen=True)
class Machine(Memory):
    """What this computer offers. Bytes; FLOP/s and bytes/s over all `threads`."""

    disk_free: int
    threads: int
    bf16_flops: float
    read_bandwidth: float


@dataclass(frozen=True)
class Fit:
    """Bytes, tokens per second and seconds; `verdict` says it in words. `train_*` are for one step of `batch_tokens` tokens."""

    weights_bytes: int
    kv_bytes: int
    chat_bytes: int
    chat_fits: bool
    decode_tokens_per_second: float
    adapter_parameters: int
    train_bytes: int
    train_fits: bool
    recompute: bool
    train_tokens_per_second: float
    disk_bytes: int
    disk_fits: bool
    context: int
    batch_tokens: int
    rank: int
    data_tokens: int | None
    train_seconds: float | None
    machine: Machine
    verdict: str


def weight_bytes(file_bytes: int) -> int:
    """Bytes of the packed weights of a model file."""
    return int(file_bytes * PACKED)


def kv_bytes_per_token(spec: ModelSpec, kv_type: KvType = "bf16") -> int:
    """Keys and values of one token; in int8 each has a float32 scale."""
    return 2 * (spec.head_dim + 4 if kv_type == "int8" else 2 * spec.head_dim) * sum(block.kv_heads for block in spec.blocks)


def activation_bytes_per_token(spec: ModelSpec, *, recompute: bool = False) -> int:
    """What one token keeps for backward, over all layers. With `recompute` one layer is whole and the others keep their input."""
    layers = [_layer_activation_bytes(spec, layer) for layer in range(spec.layers)]
    return max(layers) + (spec.layers - 1) * 4 * spec.width if recompute else sum(layers)


def _layer_activation_bytes(spec: ModelSpec, layer: int) -> int:
    block = spec.blocks[layer]
    post_norms = sum(f"blk.{layer}.{part}" in spec.tensors for part in ("attn_post_norm", "mlp_post_norm"))
    ffn = block.ffn * (3 if spec.gated else 2) * (spec.experts_used if block.experts else 1) + 3 * block.shared
    return 2 * ((2 + post_norms) * spec.width + 2 * (block.heads + block.kv_heads) * spec.head_dim + ffn) + 8 * spec.width


def adapter_parameters(spec: ModelSpec, rank: int, targets: Collection[str] = TARGETS, *, active: bool = False) -> int:
    """A [rank, K] and B [N, rank] for every target of every layer, and for every expert; `active`: those that a token uses."""

    def times(layer: int, target: str) -> int:
        experts = spec.experts_at(target, layer)
        return (spec.experts_used if active else experts) if experts else 1

    return sum(rank * sum(spec.linear_shape(target, layer)) * times(layer, target) for layer, target in spec.places(targets))


def train_bytes(spec: ModelSpec, file_bytes: int, batch_tokens: int, parameters: int, *, recompute: bool = False) -> int:
    """Peak memory of training an adapter of `parameters` parameters, `batch_tokens` tokens a step."""
    kept = batch_tokens * activation_bytes_per_token(spec, recompute=recompute)
    return weight_bytes(file_bytes) + kept + ADAPTER_STATE * parameters + PROCESS_BYTES


def chat_bytes(spec: ModelSpec, file_bytes: int, context: int, kv_type: KvType = "bf16") -> int:
    """Peak memory of one conversation that fills `context` tokens."""
    return weight_bytes(file_bytes) + context * kv_bytes_per_token(spec, kv_type) + PROCESS_BYTES


def train_flops_per_token(spec: ModelSpec, parameters: int, *, length: int = 512, loss_share: float = 1.0) -> float:
    """FLOPs of one training token in segments of `length` tokens, of which `loss_share` carry loss.

    `parameters` are those of the adapter that a token uses.
    """
    head = spec.vocab * spec.width * loss_share
    attention = 7 * spec.head_dim * sum(block.heads * min(block.window or length, length) for block in spec.blocks)
    return 4 * (spec.active_linears() + head) + 6 * parameters + attention


def estimate(
    spec: ModelSpec,
    file_bytes: int,
    machine: Machine,
    *,
    context: int | None = None,
    kv_type: KvType = "bf16",
    batch_tokens: int = 2048,
    rank: int = 16,
    targets: Collection[str] = TARGETS,
    data_tokens: int | None = None,
    epochs: float = 1.0,
    loss_share: float = 1.0,
    length: int = 512,
    download_bytes: int = 0,
) -> Fit:
    """Numbers and a verdict for one model on one machine. `context` defaults to the model's, at most 4,096 tokens.

    `length` and `loss_share` describe the data as `train_flops_per_token` wants them; `download_bytes` still have to be fetched.
    """
    context = min(spec.context, 4096) if context is None else context
    parameters = adapter_parameters(spec, rank, targets)
    limit = machine.available * MARGIN
    whole = train_bytes(spec, file_bytes, batch_tokens, parameters)
    recompute = whole > limit
    training = train_bytes(spec, file_bytes, batch_tokens, parameters, recompute=True) if recompute else whole
    active = adapter_parameters(spec, rank, targets, active=True)
    flops = train_flops_per_token(spec, active, length=length, loss_share=loss_share)
    speed = TRAIN_EFFICIENCY * machine.bf16_flops / flops / (RECOMPUTE_COST if recompute else 1)
    chatting = chat_bytes(spec, file_bytes, context, kv_type)
    disk = download_bytes + weight_bytes(file_bytes) + 3 * ADAPTER_STATE * parameters  # packed cache, checkpoints, result
    seconds = None if data_tokens is None else data_tokens * epochs / speed
    read_bytes = weight_bytes(file_bytes) * spec.active_parameters() / spec.parameters()  # for one token of an answer
    return Fit(
        weights_bytes=weight_bytes(file_bytes),
        kv_bytes=context * kv_bytes_per_token(spec, kv_type),
        chat_bytes=chatting,
        chat_fits=chatting <= limit,
        decode_tokens_per_second=DECODE_EFFICIENCY * machine.read_bandwidth / read_bytes,
        adapter_parameters=parameters,
        train_bytes=training,
        train_fits=training <= limit,
        recompute=recompute,
        train_tokens_per_second=speed,
        disk_bytes=disk,
        disk_fits=disk <= machine.disk_free,
        context=context,
        batch_tokens=batch_tokens,
        rank=rank,
        data_tokens=data_tokens,
        train_seconds=seconds,
        machine=machine,
        verdict=_verdict(chatting, training, limit, recompute, disk, machine, context, batch_tokens, speed, seconds),
    )


def _verdict(
    chatting: int,
    training: int,
    limit: float,
    recompute: bool,
    disk: int,
    machine: Machine,
    context: int,
    batch_tokens: int,
    speed: float,
    seconds: float | None,
) -> str:
    """The figures as sentences; what does not fit comes with what would."""
    chat = f"{gigabytes(chatting)} of {gigabytes(machine.available)} free at {context:,} tokens of context"
    train = f"{gigabytes(training)} at {batch_tokens:,} tokens a step"
    smaller = "take a smaller model, or see --larger-than-memory of `nomoat run`"
    parts = [f"Chat fits: {chat}." if chatting <= limit else f"Chat does not fit: {chat}; {smaller}."]
    if training <= limit:
        how = ", by recomputing layers" if recompute else ""
        parts.append(f"Training fits: {train}{how}; about {speed:,.0f} tokens/s.")
        parts += [f"The data would take about {duration(seconds)}."] if seconds is not None else []
    else:
        parts.append(
            f"Training does not fit: {train}, with every layer recomputed; take fewer tokens a step (--batch-tokens) or a "
            "smaller model."
        )
    if disk > machine.disk_free:
        parts.append(f"The disk is too full: {gigabytes(disk)} needed, {gigabytes(machine.disk_free)} free.")
    return " ".join(parts)


def gigabytes(count: float) -> str:
    """Bytes for people: "0.42 GB", "98.4 MB"."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people: "40 s", "7 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"


def check_weights(packed_bytes: int, machine: Memory, *, larger_than_memory: bool = False) -> str | None:
    """What to say before weights are loaded that memory cannot hold, or None. They are mapped from a file, so they work all
    the same, read from the disk again and again.

    Raises ResourceError, unless `larger_than_memory` accepts that, where they could not stay in memory even if nothing else ran.
    """
    weights, whole = f"the packed weights take {gigabytes(packed_bytes)}", gigabytes(machine.memory)
    slow = "what does not fit is read from the disk again for every token, which is slow"
    if packed_bytes > machine.memory - RESERVED:
        have = f"this machine has {whole} of memory, of which {gigabytes(RESERVED)} are kept for everything else"
        if not larger_than_memory:
            raise ResourceError(f"{weights}; {have}. Take a smaller model, or add --larger-than-memory: {slow}")
        return f"{weights}; {have}: {slow}"
    if packed_bytes > machine.available:
        return f"{weights}, and {gigabytes(machine.available)} of {whole} of memory are free: {slow}. Close other programs"
    return None


def this_machine(folder: Path, threads: int) -> Machine:
    """Measure this computer in under a second. `folder` names the disk; memory limits of containers count."""
    import shutil

    memory = this_memory()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return Machine(
        memory=memory.memory,
        available=memory.available,
        disk_free=shutil.disk_usage(existing).free,
        threads=threads,
        bf16_flops=_product_rate(threads),
        read_bandwidth=_read_rate(threads),
    )


def _best_seconds(work: Callable[[], None], threads: int, times: int) -> float:
    from nomoat import _native

    before = _native.threads()
    _native.set_threads(threads)
    best = 1e30
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    _native.set_threads(before)
    return best


def _product_rate(threads: int) -> float:
    """FLOP/s of the product that training consists of, bf16 factors with weights decoded on the way, best of a few runs."""
    import numpy as np

    from nomoat import _native

    rows, side, f32 = 512, 1024, 0  # f32: the GGUF type id
    weight = np.empty(_native.packed_bytes(f32, side, side), np.uint8)
    _native.pack(f32, side, side, np.ones((side, side), np.float32).view(np.uint8).reshape(-1), weight)
    x, y = np.ones((rows, side), np.float32), np.zeros((rows, side), np.float32)
    seconds = _best_seconds(lambda: _native.product(f32, side, side, weight, x, y, "bf16"), threads, 6)
    return 2 * rows * side * side / seconds


def _read_rate(threads: int) -> float:
    """Bytes/s at which `threads` threads read memory far larger than the caches, best of three."""
    import numpy as np

    from nomoat import _native

    data = np.ones(threads * 48 << 20, np.uint8)
    return data.nbytes / _best_seconds(lambda: _native.read_all(data), threads, 3)
