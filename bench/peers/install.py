"""Creates build/peers: an environment with llama-cpp-python, compiled from its source distribution for this machine.

    python bench/peers/install.py [--jobs N]

The peers of training (torch, transformers, PEFT) live in .parity; `make parity` creates it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peers"
LLAMACPP_PYTHON = FOLDER / "bin" / "python"
PEFT_PYTHON = ROOT / ".parity" / "bin" / "python"
#: Exact: a figure belongs to one version.
REQUIREMENTS = ("llama-cpp-python==0.3.36",)
#: All instruction sets of this machine; llama.cpp's own thread pool, because OpenMP's waiting threads take the cores of
#: whatever is measured next; no image models.
CMAKE_ARGS = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"


def install(folder: Path, jobs: int) -> None:
    """Raises CalledProcessError where a step fails; its own output says why."""
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    options = {"CMAKE_ARGS": CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "--no-binary", "llama-cpp-python", *REQUIREMENTS],
        env={**os.environ, **options},
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args()
    install(given.folder, given.jobs)
    print(f"ready: {given.folder}")


if __name__ == "__main__":
    main()
