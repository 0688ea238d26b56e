"""Writes docs/speed.md from bench/results/LEVEL/decode.json of all CPU levels.

python bench/speed_page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.*, however this file is started

from bench.machine import RESULTS  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"


def page(inference: Mapping[str, Any]) -> str:
    """docs/speed.md of the contents of decode.json by CPU level."""
    lines = [
        "# Speed beside peers",
        "",
        "Written by `python bench/speed_page.py` from `bench/results/LEVEL/decode.json`. Tokens per second, medians of rounds in",
        "which the programs took turns on the same file with the same number of threads; in brackets nomoat's speed over theirs.",
        "`python bench/decode.py --help` says what each work is.",
    ]
    for level, figures in inference.items():
        for file, found in figures["models"].items():
            lines += section(f"{file}, {level}", found)
    return "\n".join(lines) + "\n"


def section(title: str, found: Mapping[str, Any]) -> list[str]:
    """The figures of one file on one machine."""
    works = found["work"]
    sides = list(dict.fromkeys(side for work in works.values() for side in work["tokens_per_second"]))
    lines = ["", f"## {title}", "", f"| work | {' | '.join(sides)} |", f"|---|{'---|' * len(sides)}"]
    for work, figures in works.items():
        lines.append(f"| {work} | {' | '.join(cell(figures, side) for side in sides)} |")
    machine = found["machine"]
    peers = ", ".join(f"{name} by bindings {about['version']}" for name, about in found["peers"].items())
    lines += [
        "",
        f"{machine['cpu']}, {machine['level']}, {machine['threads']} threads, {machine['compiler']}, "
        f"commit {machine['commit']}, {machine['date']}" + (f"; {peers}." if peers else "."),
    ]
    return lines


def cell(figures: Mapping[str, Any], side: str) -> str:
    """Speed of a side, and the ratio to it; empty where it did not take part."""
    if side not in figures["tokens_per_second"]:
        return ""
    ratio = figures["ratio"].get(side)
    return f"{figures['tokens_per_second'][side]:,.1f}" + ("" if ratio is None else f" (x {ratio:.2f})")


def main() -> None:
    sources = sorted(RESULTS.glob("*/decode.json"))
    if not sources:
        raise SystemExit(f"{RESULTS / 'LEVEL' / 'decode.json'} is not there; python bench/decode.py writes it")
    PAGE.write_text(page({file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in sources}), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
