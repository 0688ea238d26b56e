"""What a figure depends on beside the code under test, and the JSON files that figures go to."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LOAD_BEFORE = os.getloadavg()[0]
BUSY = 0.5  # other work on half a core: beyond it, ratios say more about the schedulers than about the programs


def cpu() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """The commit that is checked out, with `+` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")


def compiler(library: Path) -> str:
    """The compiler that a shared library names in itself, for example `GCC 12.2.0`."""
    found = re.search(rb"(GCC|clang version)[: ][^\0]{0,60}?(\d+\.\d+\.\d+)", library.read_bytes())
    return f"{'GCC' if found[1] == b'GCC' else 'Clang'} {found[2].decode()}" if found else "unknown"


def environment(threads: int) -> dict[str, Any]:
    """The machine and this build of nomoat."""
    from nomoat import _native

    return {
        "cpu": cpu(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "level": _native.level(),
        "compiler": compiler(Path(str(_native.__file__))),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": round(LOAD_BEFORE, 2),
    }


def of_this_cpu(folder: Path = RESULTS) -> Path:
    """The folder of figures that speed decides: one a CPU level, so that machines do not overwrite each other's."""
    from nomoat import _native

    return folder / _native.level()


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `figures` to NAME.json, whole or not at all. Says so where the machine was busy before it began."""
    if LOAD_BEFORE > BUSY:
        print(f"warning: the load was {LOAD_BEFORE:.1f} when this began; compare speeds on an idle machine only", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return path
