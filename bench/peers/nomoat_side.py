"""nomoat's engine, timed as llama.cpp is: prompt rows and single rows with their logits; no sampling, no text."""

from __future__ import annotations

import time
from typing import Any

from bench.peers.channel import peak_rss_mb, rss_mb, serve

from nomoat.bench.speed import TrainStep, decoded, dense_packs, prefilled
from nomoat.engine.model import Model

state: dict[str, Any] = {}


def load(path: str, threads: int) -> dict[str, Any]:
    """Opens a model."""
    state["model"] = Model.load(path, threads=threads)
    return {}


def prefill(tokens: list[int]) -> dict[str, Any]:
    """Seconds for a prompt, with the logits of its last token."""
    sequence, seconds = prefilled(state["model"], tokens)
    state["model"].pool().cut(sequence, 0)
    return {"seconds": seconds}


def decode(tokens: list[int], count: int, streams: int = 1) -> dict[str, Any]:
    """Seconds for `count` steps after a prompt, each a batch of one token of every stream."""
    return {"seconds": decoded(state["model"], tokens, count, streams)}


def train(tokens: list[int], rank: int) -> dict[str, Any]:
    """Seconds for a step of LoRA on all linears of one sequence whose tokens all carry loss: gradients and AdamW."""
    if "step" not in state:
        state["step"] = TrainStep(state["model"], rank)
    packs = dense_packs(tokens, 1, len(tokens))
    began = time.perf_counter()
    loss = state["step"].run(packs)
    return {"seconds": time.perf_counter() - began, "loss": loss}


def memory() -> dict[str, Any]:
    """Resident memory now, and its peak."""
    return {"rss_mb": rss_mb(), "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    serve({"load": load, "prefill": prefill, "decode": decode, "train": train, "memory": memory})
