"""A full model name, adapters included, as a loaded model and its stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nomoat.adapters.stack import open_stack, parse_model_name
from nomoat.adapters.store import resolve as resolve_adapter
from nomoat.hub.names import resolve

if TYPE_CHECKING:
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack


def open_model(name: str, *, download: bool = False, threads: int | None = None) -> tuple[Model, Stack | None]:
    """Load the base of `name` and the adapters behind it; None where it names none. `download` as in `hub.names.resolve`.

    Names are checked before weights are read. Raises NotFoundError, FileFormatError, ModelError, AdapterError, InputError.
    """
    from nomoat.engine.model import Model

    base, adapters = parse_model_name(name)
    for adapter, _ in adapters:
        resolve_adapter(adapter)
    model = Model.load(resolve(base, download=download), threads=threads)
    return model, stack_for(model, name)


def stack_for(model: Model, name: str) -> Stack | None:
    """The adapters of `name` for a model that is loaded already."""
    _, adapters = parse_model_name(name)
    return open_stack(name, model.spec, base=model.fingerprint) if adapters else None
