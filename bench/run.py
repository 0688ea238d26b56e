"""All comparisons with peers, one after the other.

    python bench/run.py [quality] [decode] [train-speed] [train] [abilities]

Without names: quality, decode and train-speed, some minutes. A comparison whose peer is not installed is an error that says
how to install it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.*, however this file is started

from bench.peers.install import IK_PYTHON, LLAMACPP_PYTHON, PEFT_PYTHON  # noqa: E402

INSTALL = "python bench/peers/install.py"
LLAMACPP, PEFT = (LLAMACPP_PYTHON, INSTALL), (PEFT_PYTHON, "make parity")
#: name: (arguments, the peer's interpreter and what installs it)
COMPARISONS: dict[str, tuple[list[str], tuple[Path, str] | None]] = {
    "quality": (["quality.py"], LLAMACPP),
    "decode": (["decode.py"], (IK_PYTHON, INSTALL)),
    "train-speed": (["train_vs_peft.py", "--speed-only"], PEFT),
    "train": (["train_vs_peft.py"], PEFT),
    "abilities": (["abilities.py"], None),
}
USUAL = ("quality", "decode", "train-speed")


def missing(names: list[str]) -> list[str]:
    """What to run first, for peers that are not there."""
    peers = [COMPARISONS[name][1] for name in names]
    return sorted({command for peer in peers if peer is not None for python, command in [peer] if not python.exists()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    names = parser.parse_args().names or list(USUAL)
    unknown = sorted(set(names) - set(COMPARISONS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; expected {', '.join(COMPARISONS)}")
    if commands := missing(names):
        raise SystemExit(f"a peer is not installed; first run: {' && '.join(commands)}")
    for name in names:
        print(f"\n== {name}", flush=True)
        script, *arguments = COMPARISONS[name][0]
        subprocess.run([sys.executable, str(ROOT / "bench" / script), *arguments], check=True)


if __name__ == "__main__":
    main()
