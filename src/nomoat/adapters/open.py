"""A full model name, adapters included, as a loaded model and its stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nomoat.adapters.stack import open_stack, parse_model_name
from nomoat.adapters.store import resolve as resolve_adapter
from nomoat.hub.names import resolve

if TYPE_CHECKING:
    from nomoat.engine.kv import KvType
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack


def open_model(
    name: str,
    *,
    download: bool = False,
    threads: int | None = None,
    kv_type: KvType = "bf16",
    larger_than_memory: bool = False,
    tell: Callable[[str], None] | None = None,
) -> tuple[Model, Stack | None]:
    """Load the base of `name` and the adapters behind it; None where it names none. `download` as in `hub.names.resolve`.

    Names and memory are checked before weights are read; `tell` gets a sentence where weights will be slow for lack of memory.
    Raises NotFoundError, FileFormatError, ModelError, AdapterError, InputError; ResourceError where the weights exceed this
    machine's memory, unless `larger_than_memory` accepts it.
    """
    from nomoat.engine.model import Model
    from nomoat.hub.fit import check_weights
    from nomoat.memory import this_memory

    base, adapters = parse_model_name(name)
    for adapter, _ in adapters:
        resolve_adapter(adapter)

    def admit(packed_bytes: int) -> None:
        slow = check_weights(packed_bytes, this_memory(), larger_than_memory=larger_than_memory)
        if slow and tell:
            tell(slow)

    model = Model.load(resolve(base, download=download), threads=threads, kv_type=kv_type, admit=admit)
    return model, stack_for(model, name)


def stack_for(model: Model, name: str) -> Stack | None:
    """The adapters of `name` for a model that is loaded already."""
    _, adapters = parse_model_name(name)
    return open_stack(name, model.spec, base=model.fingerprint) if adapters else None
