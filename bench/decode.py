"""Inference beside llama.cpp and ik_llama.cpp: the same file, thread count and tokens, taking turns.

    python bench/decode.py [--model smollm2:135m] [--sides nomoat llama.cpp ik_llama.cpp] [--work decode prefill streams-16]

decode      64 tokens one by one after a prompt of 32, logits each time
prefill     a prompt of 512 tokens, logits of the last
streams-N   16 steps after prompts of 32, each with one token of N streams in one batch, logits of all

A figure is the median over rounds; the ratio of medians is what counts, because the machine's speed moves.
Writes bench/results/LEVEL/decode.json, LEVEL being the CPU's, where files of other models keep their figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.*, however this file is started

from bench.machine import RESULTS, environment, of_this_cpu, write  # noqa: E402
from bench.peers.channel import Side  # noqa: E402
from bench.peers.install import IK_PYTHON, LLAMACPP_PYTHON  # noqa: E402

PROMPT, NEW, LONG_PROMPT, STEPS = 32, 64, 512, 16
STREAMS = (4, 8, 16, 32)
SHORT = list(range(100, 100 + PROMPT))
#: name: (operation, its arguments, tokens that its time is for)
WORK: dict[str, tuple[str, dict[str, Any], int]] = {
    "decode": ("decode", {"tokens": SHORT, "count": NEW}, NEW),
    "prefill": ("prefill", {"tokens": list(range(100, 100 + LONG_PROMPT))}, LONG_PROMPT),
    **{f"streams-{n}": ("decode", {"tokens": SHORT, "count": STEPS, "streams": n}, STEPS * n) for n in STREAMS},
}
OWN, PEERS = "nomoat", ("llama.cpp", "ik_llama.cpp")


def measure(sides: Mapping[str, Side], rounds: int, works: Sequence[str] = tuple(WORK)) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by work and side, one value a round; a first round is thrown away."""
    speeds: dict[str, dict[str, list[float]]] = {work: {side: [] for side in sides} for work in works}
    for number in range(rounds + 1):
        for work in works:
            operation, values, tokens = WORK[work]
            for name, side in sides.items():
                seconds = side.ask(operation, **values)["seconds"]
                if number:
                    speeds[work][name].append(tokens / seconds)
    return speeds


def summary(speeds: Mapping[str, Sequence[float]], own: str = OWN) -> dict[str, Any]:
    """Medians of each side, and the ratio of `own`, where it took part, to every other."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = {name: medians[own] / value for name, value in medians.items() if name != own} if own in medians else {}
    return {"tokens_per_second": medians, "ratio": ratio}


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for work, found in summaries.items():
        sides = ", ".join(f"{name} {speed:,.0f}" for name, speed in found["tokens_per_second"].items())
        ratios = ", ".join(f"x {ratio:.2f} of {name}" for name, ratio in found["ratio"].items())
        lines.append(f"{work:10} tokens/s: {sides}" + (f"   ({ratios})" if ratios else ""))
    return "\n".join(lines)


def with_model(file: str, found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What decode.json is to hold: the figures of `file`, and those of other files as they were."""
    path = folder / "decode.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"models": {**known.get("models", {}), file: dict(found)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m", help="a name, or a GGUF file")
    parser.add_argument("--sides", nargs="+", choices=(OWN, *PEERS), default=[OWN, *PEERS])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llamacpp-python", type=Path, default=LLAMACPP_PYTHON)
    parser.add_argument("--ik-python", type=Path, default=IK_PYTHON)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of LEVEL/decode.json")
    given = parser.parse_args()

    from nomoat.hub.names import resolve

    path = resolve(given.model, download=True)
    interpreters = {"llama.cpp": given.llamacpp_python, "ik_llama.cpp": given.ik_python}
    about: dict[str, Any] = {}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in given.sides:
            if name == OWN:
                sides[name] = stack.enter_context(Side("bench.peers.nomoat_side"))
                sides[name].ask("load", path=str(path), threads=given.threads)
                continue
            sides[name] = stack.enter_context(Side("bench.peers.llamacpp_side", interpreters[name]))
            about[name] = sides[name].ask("load", path=str(path), context=PROMPT + LONG_PROMPT + NEW, threads=given.threads)
        rounds = measure(sides, given.rounds, given.work)
    summaries = {work: summary(values) for work, values in rounds.items()}
    print(table(summaries))
    found = {"work": summaries, "rounds": rounds, "machine": environment(given.threads), "peers": about}
    folder = of_this_cpu(given.results)
    print(f"written: {write('decode', with_model(path.name, found, folder), folder)}")


if __name__ == "__main__":
    main()
