"""Decode and prefill beside llama.cpp: the same file, thread count and tokens, taking turns.

    python bench/decode.py [--model smollm2:135m] [--rounds 7]

decode   64 tokens one by one after a prompt of 32, logits each time
prefill  a prompt of 512 tokens, logits of the last

A figure is the median over rounds; the ratio of medians is what counts, because the machine's speed moves.
Writes bench/results/decode.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.*, however this file is started

from bench.machine import environment, write  # noqa: E402
from bench.peers.channel import Side  # noqa: E402
from bench.peers.install import LLAMACPP_PYTHON  # noqa: E402

PROMPT, NEW, LONG_PROMPT = 32, 64, 512
#: name: (operation, its arguments, tokens that its time is for)
WORK: dict[str, tuple[str, dict[str, Any], int]] = {
    "decode": ("decode", {"tokens": list(range(100, 100 + PROMPT)), "count": NEW}, NEW),
    "prefill": ("prefill", {"tokens": list(range(100, 100 + LONG_PROMPT))}, LONG_PROMPT),
}


def measure(sides: Mapping[str, Side], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by work and side, one value a round; a first round is thrown away."""
    speeds: dict[str, dict[str, list[float]]] = {work: {side: [] for side in sides} for work in WORK}
    for number in range(rounds + 1):
        for work, (operation, values, tokens) in WORK.items():
            for name, side in sides.items():
                seconds = side.ask(operation, **values)["seconds"]
                if number:
                    speeds[work][name].append(tokens / seconds)
    return speeds


def summary(speeds: Mapping[str, Sequence[float]], own: str = "nomoat") -> dict[str, Any]:
    """Medians of each side, and the ratio of `own` to every other."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {"tokens_per_second": medians, "ratio": {name: medians[own] / value for name, value in medians.items() if name != own}}


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for work, found in summaries.items():
        sides = ", ".join(f"{name} {speed:,.0f}" for name, speed in found["tokens_per_second"].items())
        ratios = ", ".join(f"x {ratio:.2f} of {name}" for name, ratio in found["ratio"].items())
        lines.append(f"{work:8} tokens/s: {sides}   ({ratios})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llamacpp-python", type=Path, default=LLAMACPP_PYTHON)
    given = parser.parse_args()

    from nomoat.hub.names import resolve

    path = resolve(given.model, download=True)
    with Side("bench.peers.nomoat_side") as own, Side("bench.peers.llamacpp_side", given.llamacpp_python) as peer:
        own.ask("load", path=str(path), threads=given.threads)
        about = peer.ask("load", path=str(path), context=PROMPT + LONG_PROMPT + NEW, threads=given.threads)
        speeds = measure({"nomoat": own, "llama.cpp": peer}, given.rounds)
    summaries = {work: summary(values) for work, values in speeds.items()}
    print(table(summaries))
    figures = {"model": path.name, "work": summaries, "rounds": speeds, "machine": environment(given.threads), "llama.cpp": about}
    print(f"written: {write('decode', figures)}")


if __name__ == "__main__":
    main()
