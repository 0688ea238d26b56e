"""Write a model of any architecture with seeded random weights: at the shape of a published one, or tiny.

    python tools/make_model.py qwen3 qwen3-4b Q4_K_M -o qwen3-4b.gguf
    python tools/make_model.py gemma2 tiny hf-f32 -o gemma2-tiny

ARCH is a `model_type` of Hugging Face, SIZE one of its sizes below, TYPE a type of llama.cpp (F16, Q8_0, Q4_K_M ...) for a GGUF,
or hf-f32, hf-bf16, hf-f16 for a folder. The same seed gives the same bytes on every machine. A model that says nothing takes as
much memory, and time, as one that does.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for tools.*, however this file is started

from tools.synthetic import gguf_file, hf_folder  # noqa: E402
from tools.synthetic.sizes import FAMILIES, configuration, sizes  # noqa: E402


def make(
    path: Path, architecture: str, size: str, type: str, *, seed: int = 0, layers: int | None = None, holes: bool = False
) -> Path:
    """Writes a model and returns its path. Raises ValueError for an unknown architecture, size or type."""
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = configuration(architecture, size, **changes)
    if type.startswith("hf-"):
        return hf_folder.write(path, config, type.removeprefix("hf-").upper(), seed)
    return gguf_file.write(path, config, type, seed, holes)


def main() -> None:
    known = "\n".join(f"  {name:12} {' '.join(sizes(name))}" for name in FAMILIES)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"sizes:\n{known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", metavar="ARCH")
    parser.add_argument("size", metavar="SIZE")
    parser.add_argument("type", metavar="TYPE")
    parser.add_argument("-o", "--out", type=Path, help="file or folder; default: SIZE-TYPE here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument(
        "--holes", action="store_true", help="GGUF: zeros that take no room, for what is refused before it is read"
    )
    given = parser.parse_args()
    name = f"{given.architecture}-tiny" if given.size == "tiny" else given.size
    suffix = "" if given.type.startswith("hf-") else ".gguf"
    began = time.perf_counter()
    try:
        out = given.out or Path(f"{name}-{given.type}{suffix}")
        path = make(out, given.architecture, given.size, given.type, seed=given.seed, layers=given.layers, holes=given.holes)
    except ValueError as error:
        parser.error(str(error))
    size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    print(f"{path}: {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
