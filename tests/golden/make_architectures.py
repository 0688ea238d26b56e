"""Writes architectures/ROW.npz: logits of the tiny models of tests/architectures.py by transformers, in float64.

    PYTHONPATH=src:tests:. .parity/bin/python -m golden.make_architectures [ROW ...]

Run `make parity` afterwards: it compares every golden with a fresh one, and every GGUF with llama.cpp.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from architectures import POSITIONS, ROWS, TOKENS, folder_digest, gguf_digest, golden


def make(name: str) -> dict[str, npt.NDArray[Any]]:
    """`logits` [POSITIONS, V], and the digests as text arrays (gguf: empty where there is none)."""
    import torch

    from parity.peft_side import load_base

    row = ROWS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = row.folder(Path(temporary) / "model")
        model = load_base(folder, torch.float64)
        digest = folder_digest(folder)
        whole = gguf_digest(row.gguf_file(Path(temporary) / "model.gguf")) if row.gguf else ""
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, POSITIONS]
    return {"logits": logits.numpy().astype(np.float32), "folder": np.array(digest), "gguf": np.array(whole)}


if __name__ == "__main__":
    for name in sys.argv[1:] or ROWS:
        golden(name).parent.mkdir(exist_ok=True)
        np.savez_compressed(golden(name), allow_pickle=False, **make(name))
        print(golden(name).name, golden(name).stat().st_size, "bytes")
