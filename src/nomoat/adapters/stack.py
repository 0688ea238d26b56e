"""Names of stacks: `smollm2:135m+tickets@0.8+polite`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nomoat.adapters.package import load_adapter
from nomoat.adapters.store import resolve
from nomoat.engine.stack import Stack
from nomoat.errors import InputError, printable
from nomoat.models.spec import ModelSpec


def parse_model_name(name: str) -> tuple[str, list[tuple[str, float]]]:
    """Splits "base+adapter@weight+..." into (base, [(adapter, weight)]); a weight left out is 1.

    Adapters are installed names or paths. A path that exists may contain `+` or `@`. Raises InputError E_INPUT.
    """
    pieces = _split(name)
    if not all(pieces):
        raise InputError(f"{printable(name)!r}: expected BASE, or BASE+ADAPTER, or BASE+ADAPTER@WEIGHT+...")
    return pieces[0], [_weighted(piece) for piece in pieces[1:]]


def _split(name: str) -> list[str]:
    """At `+`, except inside the longest leading part that is an existing path (with or without a weight behind it)."""
    parts = name.split("+")
    pieces = []
    while parts:
        whole = next((n for n in range(len(parts), 1, -1) if _is_path("+".join(parts[:n]))), 1)
        pieces.append("+".join(parts[:whole]))
        parts = parts[whole:]
    return pieces


def _is_path(text: str) -> bool:
    if "/" not in text:
        return False
    stem, _, weight = text.rpartition("@")
    return Path(text).exists() or (bool(stem) and "+" not in weight and Path(stem).exists())


def _weighted(piece: str) -> tuple[str, float]:
    adapter, mark, text = piece.rpartition("@")
    if not mark or ("/" in piece and Path(piece).exists()):
        return piece, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not adapter or not math.isfinite(weight):
        raise InputError(f"{printable(piece)!r}: expected ADAPTER@WEIGHT with a number as weight, for example tickets@0.8")
    return adapter, weight


def open_stack(name: str, spec: ModelSpec, *, base: Mapping[str, Any] | None = None) -> Stack | None:
    """Loads the adapters of a full model name; None where it names none. `base` is as in `load_adapter`.

    Raises what `parse_model_name`, `store.resolve` and `load_adapter` raise.
    """
    _, adapters = parse_model_name(name)
    if not adapters:
        return None
    return Stack(spec, [(load_adapter(resolve(adapter), spec, base=base)[0], weight) for adapter, weight in adapters])
