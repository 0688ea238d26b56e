"""Sixteen requests on sixteen adapters, sent at once: nomoat in one batch, llama.cpp's server as it takes them.

    python bench/adapters.py [--model smollm2:135m] [--requests 16] [--prompt 81] [--new 64] [--rounds 3]

Random adapters of rank 16 on all linears, the same ones on both sides (as GGUF for llama.cpp). Time from sending until the last
answer is whole; greedy, the end token ignored. Also what adapters cost nomoat: the same requests without any.
Writes bench/results/LEVEL/adapters.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.*, however this file is started

from bench.machine import environment, of_this_cpu, write  # noqa: E402
from bench.peers.channel import Side  # noqa: E402
from bench.peers.install import SERVER_PYTHON  # noqa: E402

if TYPE_CHECKING:
    from nomoat.engine.stack import Adapter

RANK = 16


def write_gguf(adapter: Adapter, architecture: str, path: Path) -> None:
    """An adapter as llama.cpp reads it: A [r, K] and B [N, r] by the name of the weight they belong to."""
    import gguf

    from nomoat.models.tensors import GGUF

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    for (layer, target), (a, b) in adapter.tensors.items():
        name = f"blk.{layer}.{GGUF[target]}.weight"
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def agreement(own: list[str], other: list[str]) -> float:
    """Mean share of each text that both begin with alike. Arithmetic differs, so answers part somewhere."""
    return statistics.mean(len(os.path.commonprefix(pair)) / max(1, len(pair[0])) for pair in zip(own, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m", help="a name, or a GGUF file of architecture llama")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=81)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--server-python", type=Path, default=SERVER_PYTHON)
    given = parser.parse_args()

    from nomoat.bench.speed import random_adapter
    from nomoat.engine.weights import read_spec
    from nomoat.hub.names import resolve

    path = resolve(given.model, download=True)
    spec = read_spec(path)
    random = np.random.default_rng(0)
    prompts = random.integers(1000, spec.vocab, (given.requests, given.prompt)).tolist()
    which, none = list(range(given.requests)), [-1] * given.requests
    with tempfile.TemporaryDirectory(prefix="nomoat-bench-") as name:
        files = [Path(name) / f"{seed}.gguf" for seed in which]
        for seed, file in enumerate(files):
            write_gguf(random_adapter(spec, RANK, seed), spec.architecture, file)
        with Side("bench.peers.nomoat_side") as own, Side("bench.peers.server_side", given.server_python) as server:
            own.ask("load", path=str(path), threads=given.threads)
            own.ask("adapters", rank=RANK, count=given.requests)
            about = server.ask(
                "load",
                path=str(path),
                adapters=[str(file) for file in files],
                threads=given.threads,
                slots=given.requests,
                context=given.prompt + given.new + 16,
            )
            seconds: dict[str, list[float]] = {"nomoat": [], "nomoat without adapters": [], "llama.cpp server": []}
            share = 0.0
            for round in range(given.rounds + 1):
                ours = own.ask("answers", prompts=prompts, adapters=which, count=given.new)
                plain = own.ask("answers", prompts=prompts, adapters=none, count=given.new)
                theirs = server.ask("answers", prompts=prompts, adapters=which, count=given.new)
                share = agreement(ours["texts"], theirs["texts"])
                if round:
                    for key, answer in zip(seconds, (ours, plain, theirs), strict=True):
                        seconds[key].append(answer["seconds"])
    report(given, seconds, share, about)


def report(given: argparse.Namespace, seconds: dict[str, list[float]], share: float, about: Any) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["llama.cpp server"] / medians["nomoat"]
    cost = medians["nomoat"] / medians["nomoat without adapters"] - 1
    for name, value in medians.items():
        print(f"{name:24} {value:7.2f} s   {given.requests * given.new / value:7.1f} new tokens/s")
    print(f"ratio {ratio:.2f}; adapters cost {cost:.1%}; answers agree for {share:.0%} of their length")
    work = {key: getattr(given, key) for key in ("model", "requests", "prompt", "new")} | {"rank": RANK}
    figures = {"work": work, "seconds": seconds, "medians": medians, "ratio": ratio, "adapter_cost": cost}
    figures |= {"agreement": share, "machine": environment(given.threads), "llama.cpp server": about}
    print(f"written: {write('adapters', figures, of_this_cpu())}")


if __name__ == "__main__":
    main()
