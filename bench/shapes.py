"""Memory and speed at the shapes of models that people run, beside llama.cpp on the same file.

    python bench/shapes.py --models FOLDER [--only llama-3-8b ...] [--rounds 3] [--remove]

The files are made (tools/make_model.py): true shapes and types, random weights, which cost the same memory and time. FOLDER needs
room for a model and its packed copy, twice the size of the largest: up to 35 GB. `--remove` deletes each file after its turn.

prefill  a prompt of 512 tokens, logits of the last
decode   32 tokens one by one after a prompt of 32, logits each time
train    one step of LoRA, r = 16 on all linears (not those of experts), a sequence of 512 tokens, all in the loss (nomoat only)
memory   resident after prefill and decode, mapped weights included; of training, the peak

Sides take turns where both fit into memory; else one side runs after the other, and the table says so.
Writes bench/results/shapes.json and docs/shapes.md; models that are not measured keep their last figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.* and tools.*, however this file is started

from bench.machine import RESULTS, environment, write  # noqa: E402
from bench.peers.channel import Side  # noqa: E402
from bench.peers.install import LLAMACPP_PYTHON  # noqa: E402

PAGE = ROOT / "docs" / "shapes.md"
PROMPT, NEW, LONG_PROMPT, RANK = 32, 32, 512, 16
TOKENS = list(range(300, 300 + LONG_PROMPT))
#: operation: (its arguments, tokens that its time is for, sides that have it)
WORK: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "prefill": ({"tokens": TOKENS}, LONG_PROMPT, ("nomoat", "llama.cpp")),
    "decode": ({"tokens": TOKENS[:PROMPT], "count": NEW}, NEW, ("nomoat", "llama.cpp")),
    "train": ({"tokens": TOKENS, "rank": RANK}, LONG_PROMPT, ("nomoat",)),
}
#: Both sides map their weights; beyond this share of the memory, one would push the other's out.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    title: str
    architecture: str
    size: str
    type: str

    @property
    def file(self) -> str:
        return f"{self.size}-{self.type}.gguf"


CASES = (
    Case("Llama-3-8B", "llama", "llama-3-8b", "Q4_K_M"),
    Case("Mistral-7B", "mistral", "mistral-7b", "Q4_K_M"),
    Case("Qwen3-4B", "qwen3", "qwen3-4b", "Q4_K_M"),
    Case("Gemma-3-4B", "gemma3_text", "gemma-3-4b", "Q4_0"),
    Case("Mixtral-8x7B", "mixtral", "mixtral-8x7b", "Q2_K"),
)


def measure(path: Path, home: Path, threads: int, rounds: int, peer_python: Path) -> dict[str, Any]:
    """The figures of one file."""
    import psutil

    interleaved = 2 * path.stat().st_size < MEMORY_SHARE * psutil.virtual_memory().total
    with Side("bench.peers.nomoat_side", env={"NOMOAT_HOME": str(home)}) as own:  # packs, so that what is measured maps
        own.ask("load", path=str(path), threads=threads)
    found: dict[str, Any] = {"bytes": path.stat().st_size, "interleaved": interleaved, "sides": {}}
    for names in [("nomoat", "llama.cpp")] if interleaved else [("nomoat",), ("llama.cpp",)]:
        with ExitStack() as stack:
            sides: dict[str, Side] = {}
            for name in names:
                if name == "nomoat":
                    sides[name] = stack.enter_context(Side("bench.peers.nomoat_side", env={"NOMOAT_HOME": str(home)}))
                    sides[name].ask("load", path=str(path), threads=threads)
                else:
                    sides[name] = stack.enter_context(Side("bench.peers.llamacpp_side", peer_python))
                    found["llama.cpp"] = sides[name].ask("load", path=str(path), context=LONG_PROMPT + NEW, threads=threads)
            found["sides"] |= take_turns(sides, rounds)
    return found


def take_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, dict[str, Any]]:
    """Median tokens per second of every work, all values, and memory, by side. A short prompt first reads the weights in."""
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    found: dict[str, dict[str, Any]] = {}
    for side in sides.values():
        side.ask("prefill", tokens=TOKENS[:PROMPT])
    for work, (values, tokens, able) in WORK.items():
        if work == "train":
            found = {name: {"rss_mb": side.ask("memory")["rss_mb"]} for name, side in sides.items()}
        for _ in range(rounds):
            for name in set(able) & set(sides):
                seconds = sides[name].ask(work, **values)["seconds"]
                speeds[name].setdefault(work, []).append(tokens / seconds)
    for name, side in sides.items():
        found[name]["peak_rss_mb"] = side.ask("memory")["peak_rss_mb"]
        found[name]["tokens_per_second"] = {work: statistics.median(values) for work, values in speeds[name].items()}
        found[name]["rounds"] = speeds[name]
    return found


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/shapes.md."""
    lines = [
        "# Shapes",
        "",
        "Memory and speed at the shapes of published models, written by `python bench/shapes.py`. The weights are random: they",
        "say nothing, and cost what real ones cost. Tokens per second; memory is resident, mapped weights included. Training is",
        f"one step of LoRA with r = {RANK} on all linears (in a mixture of experts: of attention) on {LONG_PROMPT} tokens,",
        "its memory the peak.",
        "",
        "| model | file | | prefill 512 | decode | train | memory | training memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, found in results.items():
        for name, side in found["sides"].items():
            first = f"| {title} {found['type']} | {found['bytes'] / 1e9:.1f} GB " if name == "nomoat" else "| | "
            speed = [f"{side['tokens_per_second'][work]:,.1f}" if work in side["tokens_per_second"] else "" for work in WORK]
            trained = f"{side['peak_rss_mb'] / 1e3:.1f} GB" if "train" in side["tokens_per_second"] else ""
            lines.append(f"{first}| {name} | {' | '.join(speed)} | {side['rss_mb'] / 1e3:.1f} GB | {trained} |")
    for title, found in results.items():
        about = found["machine"]
        turns = "taking turns" if found["interleaved"] else "one side after the other: both do not fit into memory"
        lines.append(
            f"\n{title}: {about['cpu']}, {about['level']}, {about['threads']} threads, commit {about['commit']}, "
            f"{about['date']}; llama.cpp by llama-cpp-python {found['llama.cpp']['version']}; {turns}."
        )
    return "\n".join(lines) + "\n"


def ratios(found: Mapping[str, Any]) -> str:
    """nomoat over llama.cpp, as one line."""
    own, peer = (found["sides"][name]["tokens_per_second"] for name in ("nomoat", "llama.cpp"))
    times = {work: f" (x {own[work] / peer[work]:.2f})" if work in peer else "" for work in own}
    return ", ".join(f"{work} {own[work]:,.1f} tokens/s{times[work]}" for work in own)


def run(case: Case, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Makes the file where it is not there yet, and measures it."""
    from tools.make_model import make

    path, home = folder / case.file, folder / "home"
    if not path.exists():
        make(path, case.architecture, case.size, case.type)
    found = measure(path, home, given.threads, given.rounds, given.llamacpp_python)
    shutil.rmtree(home, ignore_errors=True)  # the packed copy
    if given.remove:
        path.unlink()
    return {"type": case.type, **found, "machine": environment(given.threads)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder for the files; never inside the repository")
    parser.add_argument("--only", nargs="+", choices=[case.size for case in CASES], default=[case.size for case in CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--remove", action="store_true")
    parser.add_argument("--llamacpp-python", type=Path, default=LLAMACPP_PYTHON)
    given = parser.parse_args(arguments)
    folder = given.models.resolve()
    if folder.is_relative_to(ROOT):
        parser.error(f"--models {folder}: inside the repository; give a folder elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    last = RESULTS / "shapes.json"
    results: dict[str, Any] = json.loads(last.read_text(encoding="utf-8")) if last.exists() else {}
    for case in CASES:
        if case.size in given.only:
            results[case.title] = run(case, folder, given)
            results = {each.title: results[each.title] for each in CASES if each.title in results}
            print(f"{case.title}: {ratios(results[case.title])}", flush=True)
            write("shapes", results)
            PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
