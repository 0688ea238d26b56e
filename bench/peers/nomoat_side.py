"""nomoat's engine, timed as llama.cpp is: prompt rows and single rows with their logits; no sampling, no text."""

from __future__ import annotations

import time
from typing import Any

from bench.peers.channel import serve

from nomoat.engine.kv import Sequence
from nomoat.engine.model import FORWARD_ROWS, Model

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


def decode(tokens: list[int], count: int) -> dict[str, Any]:
    """Seconds for `count` tokens, one by one, after a prompt. The tokens themselves do not matter for the time."""
    model: Model = state["model"]
    sequence, _ = _prefill(tokens)
    began = time.perf_counter()
    for i in range(count):
        x = model.forward([(sequence, [tokens[i % len(tokens)]], None)])
        model.head(x, [0])
    seconds = time.perf_counter() - began
    model.pool().cut(sequence, 0)
    return {"seconds": seconds}


if __name__ == "__main__":
    serve({"load": load, "prefill": prefill, "decode": decode})
