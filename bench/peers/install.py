"""Creates the peers' environments under build/, compiled for this machine: one each, because both bring a `libllama`.

    python bench/peers/install.py [--only llama.cpp ik_llama.cpp server bitsandbytes] [--jobs N] [--folder build/peers]

build/peers         llama.cpp by llama-cpp-python, from its source distribution
build/peers-ik      ik_llama.cpp by ik-llama-cpp-python, from its source distribution
build/peers-server  llama.cpp's server by xllamacpp, a wheel that chooses the processor's code as it starts

The peers of training (torch, transformers, PEFT) live in .parity, which `make parity` creates; bitsandbytes goes there too.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peers"
PARITY = ROOT / ".parity"
PEFT_PYTHON = PARITY / "bin" / "python"


@dataclass(frozen=True)
class Peer:
    """An environment. Versions are exact: a figure belongs to one. `suffix` None: it is .parity. `cmake` empty: a wheel, nothing
    is compiled. `targets`: what alone is built, and `without`: what is cut out of the package's CMakeLists.txt (regular
    expressions)."""

    suffix: str | None
    package: str
    version: str
    cmake: str = ""
    targets: str = ""
    without: tuple[str, ...] = ()

    def folder(self, folder: Path = FOLDER) -> Path:
        return PARITY if self.suffix is None else folder.with_name(folder.name + self.suffix)

    def python(self, folder: Path = FOLDER) -> Path:
        return self.folder(folder) / "bin" / "python"


#: All instruction sets of this machine.
NATIVE = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON"
#: But AMX in llama.cpp: compiled by GCC 12, this version ends with a segmentation fault at `ldtilecfg` in its first product.
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
NO_AMX = f" -DCMAKE_C_FLAGS='{WITHOUT_AMX}' -DCMAKE_CXX_FLAGS='{WITHOUT_AMX}'" if platform.machine() == "x86_64" else ""
PEERS = {
    # llama.cpp's own thread pool, because OpenMP's waiting threads take the cores of whatever is measured next; no image models
    "llama.cpp": Peer("", "llama-cpp-python", "0.3.36", f"{NATIVE}{NO_AMX} -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"),
    # no thread pool of its own: without OpenMP it starts and joins its threads for every graph; attention kernels for caches
    # of 4 bits, which take most of the time to compile, are not measured; the tool llama-quantize lacks a file in this version
    "ik_llama.cpp": Peer(
        "-ik",
        "ik-llama-cpp-python",
        "0.1.5",
        f"{NATIVE} -DGGML_OPENMP=ON -DGGML_IQK_FA_ALL_QUANTS=OFF",
        targets="llama;ggml",
        without=(r"add_subdirectory\(\S+/quantize\)", r"install\(\s+TARGETS llama-quantize\s[^)]*\)"),
    ),
    "server": Peer("-server", "xllamacpp", "2026.10.11549"),
    "bitsandbytes": Peer(None, "bitsandbytes", "0.50.2"),
}
LLAMACPP_PYTHON = PEERS["llama.cpp"].python()
IK_PYTHON = PEERS["ik_llama.cpp"].python()
SERVER_PYTHON = PEERS["server"].python()


def install(peer: Peer, folder: Path, jobs: int) -> None:
    """Raises CalledProcessError where a step fails; its own output says why."""
    python = peer.python(folder)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", peer.folder(folder)], check=True)
    options = {"CMAKE_ARGS": peer.cmake, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)} if peer.cmake else {}
    if peer.targets:
        options["SKBUILD_BUILD_TARGETS"] = peer.targets
    pip = [str(python), "-m", "pip"]
    compiled = ["--no-binary", peer.package] if peer.cmake else []
    name = f"{peer.package}=={peer.version}"
    with tempfile.TemporaryDirectory() as unpacked:
        if peer.without:
            subprocess.run([*pip, "download", "--no-deps", *compiled, "-d", unpacked, name], check=True)
            shutil.unpack_archive(next(Path(unpacked).glob("*.tar.gz")), unpacked, filter="data")
            rules = next(Path(unpacked).glob("*/CMakeLists.txt"))
            text = rules.read_text(encoding="utf-8")
            for part in peer.without:
                text, found = re.subn(part, "", text)
                if not found:
                    raise SystemExit(f"{rules.name} of {name} has no {part}: is it still to be cut?")
            rules.write_text(text, encoding="utf-8")
            name = str(rules.parent)
        # numpy: the sides hand logits over as its files
        subprocess.run([*pip, "install", *compiled, name, "numpy"], env={**os.environ, **options}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of llama.cpp; the others lie beside it")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    given = parser.parse_args()
    if "bitsandbytes" in given.only and not PEFT_PYTHON.exists():
        parser.error(
            "bitsandbytes goes into .parity, which does not exist; run `make parity` first, or choose the others: --only"
        )
    for name in given.only:
        install(PEERS[name], given.folder, given.jobs)
        print(f"ready: {PEERS[name].folder(given.folder)}")


if __name__ == "__main__":
    main()
