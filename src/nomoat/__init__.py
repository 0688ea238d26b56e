"""Teach an open language model your own task on the computer you own.

    model = nomoat.load("smollm2:135m")          a catalogue name, a GGUF file or a Hugging Face folder
    nomoat.train(...)  nomoat.evaluate(...)      what `nomoat train` and `nomoat eval` do

Importing this package imports nothing heavy; a public name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Adapter", "Model", "__version__", "evaluate", "load", "train"]

if TYPE_CHECKING:
    from nomoat.engine.kv import KvType
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Adapter
    from nomoat.evals.run import evaluate
    from nomoat.train.run import train

# public name: the module that defines it
_PUBLIC = {
    "Adapter": "nomoat.engine.stack",
    "Model": "nomoat.engine.model",
    "evaluate": "nomoat.evals.run",
    "train": "nomoat.train.run",
}


def load(name: str, *, threads: int | None = None, kv_type: KvType = "bf16") -> Model:
    """Load a model by catalogue name, path or store name (`smollm2:135m`, `./model.gguf`, `ollama:NAME`).

    `kv_type="int8"` halves the memory of keys and values, see `Model.load`.

    Raises NotFoundError for a name that resolves to nothing, and FileFormatError or ModelError for a file that cannot be used.
    """
    from nomoat.engine.model import Model
    from nomoat.hub.names import resolve

    return Model.load(resolve(name), threads=threads, kv_type=kv_type)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module `nomoat` has no attribute `{name}`; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
