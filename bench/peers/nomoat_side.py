"""nomoat's engine, timed as llama.cpp is: prompt rows and single rows with their logits; no sampling, no text."""

from __future__ import annotations

import itertools
import time
from typing import Any

from bench.peers.channel import peak_rss_mb, rss_mb, serve

from nomoat.bench.speed import TrainStep, decoded, dense_packs, prefilled, random_stack
from nomoat.engine.generate import Sampling, choose_tokens
from nomoat.engine.kv import Sequence
from nomoat.engine.model import FORWARD_ROWS, Model

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


def adapters(rank: int, count: int) -> dict[str, Any]:
    """Makes random adapters 0 to `count` - 1."""
    state["stacks"] = [random_stack(state["model"].spec, rank, seed) for seed in range(count)]
    return {}


def answers(prompts: list[list[int]], adapters: list[int], count: int) -> dict[str, Any]:
    """Seconds until `count` tokens have been generated for every prompt, greedily, in one batch; adapter -1 is none."""
    model: Model = state["model"]
    greedy = Sampling().native()
    stacks = [state["stacks"][i] if i >= 0 else None for i in adapters]
    sequences = [Sequence() for _ in prompts]
    said: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()
    each = max(1, FORWARD_ROWS // len(prompts[0]))  # prompts of one step
    for first in range(0, len(prompts), each):
        group = range(first, min(first + each, len(prompts)))
        ends = [end - 1 for end in itertools.accumulate(len(prompts[i]) for i in group)]
        logits = model.step([(sequences[i], prompts[i], stacks[i]) for i in group], ends)
        chosen = choose_tokens([greedy] * len(group), logits, [said[i] for i in group])
        for i, token in zip(group, chosen, strict=True):
            said[i].append(token)
    for _ in range(count - 1):
        logits = model.step([(sequences[i], said[i][-1:], stacks[i]) for i in range(len(prompts))], range(len(prompts)))
        chosen = choose_tokens([greedy] * len(prompts), logits, said)
        for own, token in zip(said, chosen, strict=True):
            own.append(token)
    seconds = time.perf_counter() - began
    for sequence in sequences:
        model.pool().cut(sequence, 0)
    return {"seconds": seconds, "tokens": said, "texts": [model.tokenizer.decode(tokens) for tokens in said]}


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
    work = (load, prefill, decode, adapters, answers, train, memory)
    serve({handler.__name__: handler for handler in work})
