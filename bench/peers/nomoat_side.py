"""nomoat's engine, timed as llama.cpp is: prompt rows and single rows with their logits; no sampling, no text."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from bench.peers.channel import peak_rss_mb, rss_mb, serve

from nomoat.data.pack import Pack
from nomoat.engine.kv import Sequence
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import FORWARD_ROWS, Model
from nomoat.train.optimizer import AdamW

state: dict[str, Any] = {}


def load(path: str, threads: int) -> dict[str, Any]:
    """Opens a model."""
    state["model"] = Model.load(path, threads=threads)
    return {}


def _prefill(tokens: list[int]) -> tuple[Sequence, float]:
    """A sequence with the prompt in its cache, and the seconds that took."""
    model: Model = state["model"]
    sequence = Sequence()
    began = time.perf_counter()
    for begin in range(0, len(tokens), FORWARD_ROWS):
        part = tokens[begin : begin + FORWARD_ROWS]
        x = model.forward([(sequence, part, None)])
    model.head(x, [len(part) - 1])
    return sequence, time.perf_counter() - began


def prefill(tokens: list[int]) -> dict[str, Any]:
    """Seconds for a prompt, with the logits of its last token."""
    sequence, seconds = _prefill(tokens)
    state["model"].pool().cut(sequence, 0)
    return {"seconds": seconds}


def decode(tokens: list[int], count: int, streams: int = 1) -> dict[str, Any]:
    """Seconds for `count` steps after a prompt, each a batch of one token of every stream. Which tokens does not matter."""
    model: Model = state["model"]
    sequences = [_prefill(tokens)[0] for _ in range(streams)]
    began = time.perf_counter()
    for step in range(count):
        x = model.forward([(sequence, [tokens[(step + s) % len(tokens)]], None) for s, sequence in enumerate(sequences)])
        model.head(x, range(streams))
    seconds = time.perf_counter() - began
    for sequence in sequences:
        model.pool().cut(sequence, 0)
    return {"seconds": seconds}


def train(tokens: list[int], rank: int) -> dict[str, Any]:
    """Seconds for a step of LoRA on all linears of one sequence whose tokens all carry loss: gradients and AdamW."""
    model: Model = state["model"]
    if "lora" not in state:
        state["lora"] = TrainableLora(model.spec, rank=rank, alpha=2.0 * rank)
        state["optimizer"] = AdamW(state["lora"].parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    lora: TrainableLora = state["lora"]
    given = np.asarray(tokens, np.int32)
    rows = Pack(given, np.array([0, len(given)], np.int32), np.roll(given, -1), np.ones(len(given), np.float32), (0,))
    began = time.perf_counter()
    lora.zero_grad()
    logp = model.loss_gradients(rows, lora, np.full(len(given), -1 / len(given), np.float32))
    state["optimizer"].update(lora.gradients, rate=1e-4, scale=1.0)
    return {"seconds": time.perf_counter() - began, "loss": -float(logp.mean())}


def memory() -> dict[str, Any]:
    """Resident memory now, and its peak."""
    return {"rss_mb": rss_mb(), "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    serve({"load": load, "prefill": prefill, "decode": decode, "train": train, "memory": memory})
