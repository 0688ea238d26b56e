"""nomoat's trainer on a plan of `bench/train_vs_peft.py`, some steps at a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from bench.peers.channel import peak_rss_mb, serve
from bench.train_plan import Plan

from nomoat.data.mask import Example
from nomoat.data.pack import Pack, pack
from nomoat.engine.generate import Sampling, generate
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.engine.stack import Stack
from nomoat.train.loop import Trainer
from nomoat.train.plan import TrainOptions

state: dict[str, Any] = {}


def load(model: str, plan: str, rank: int, alpha: float, rate: float, threads: int) -> dict[str, Any]:
    """Opens the model and makes a trainer for one epoch of the plan."""
    given = Plan.load(Path(plan))
    state["plan"], state["model"] = given, Model.load(model, threads=threads)
    options = TrainOptions(rank=rank, alpha=alpha, learning_rate=rate)
    examples = [Example(tokens, weights) for tokens, weights in zip(given.tokens, given.weights, strict=True)]
    packs: list[list[Pack]] = [pack(examples, options.max_tokens, order=order) for order in given.batches]
    state["lora"] = TrainableLora(state["model"].spec, rank=rank, alpha=alpha)
    state["trainer"] = Trainer(
        state["model"],
        state["lora"],
        options,
        peak_rate=rate,
        steps=len(packs),
        batches=lambda epoch: packs,
        report=lambda event: state["losses"].append(event["loss"]),
        interrupted=lambda: len(state["losses"]) >= state["wanted"],
    )
    return {"peak_rss_mb": peak_rss_mb()}


def steps(count: int) -> dict[str, Any]:
    """The next `count` optimizer steps: seconds, and the loss of each."""
    state["losses"], state["wanted"] = [], count
    began = time.perf_counter()
    state["trainer"].run()
    return {"seconds": time.perf_counter() - began, "losses": state["losses"], "peak_rss_mb": peak_rss_mb()}


def answers(limit: int) -> dict[str, Any]:
    """Greedy answers of the trained adapter to every prompt of the plan, as token ids."""
    model = state["model"]
    stack = Stack(model.spec, [(state["lora"].to_adapter(), 1.0)])
    prompts = [np.asarray(prompt).tolist() for prompt in state["plan"].prompts]
    began = time.perf_counter()
    made = generate(model, prompts, Sampling(max_tokens=limit), stacks=[stack] * len(prompts))
    return {"seconds": time.perf_counter() - began, "tokens": [completion.tokens for completion in made]}


if __name__ == "__main__":
    serve({"load": load, "steps": steps, "answers": answers})
