"""JSON as RFC 8259 has it, with limits: a line of a data set is input from strangers.

Python's own parser accepts duplicate keys, NaN and 1e999, recurses as deep as the text nests, and turns two bytes of
text into tens of bytes of objects. So nesting and the number of values are counted before anything is built.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from nomoat.errors import DataError, printable

MAX_DEPTH = 64
MAX_VALUES = 32_768  # per text; an empty object costs 64 bytes, so about 8 MiB at the worst

_STRUCTURE = re.compile(r'["\\\[\]{},]')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Fault(ValueError):
    """Carries a code out of the parser's callbacks."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def parse(text: str, *, path: Path | str | None = None, line: int | None = None, field: str | None = None) -> Any:
    """The value of one JSON text.

    Raises DataError: E_LIMIT (deeper than MAX_DEPTH, more than MAX_VALUES), E_JSON (not JSON, duplicate key, number
    out of range), E_UTF8 (half of a surrogate pair). `path`, `line` and `field` only say where in the message.
    """
    try:
        _check_size(text)
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_no_constant)
        if _SURROGATE.search(text):
            _check_surrogates(value)
    except _Fault as fault:
        raise DataError(str(fault), code=fault.code, path=path, line=line, field=field) from None
    except json.JSONDecodeError as fault:
        near = printable(text[max(0, fault.pos - 20) : fault.pos + 20])
        message = f"not valid JSON: {fault.msg} at character {fault.pos + 1:,}, near {near!r}"
        raise DataError(message, code="E_JSON", path=path, line=line, field=field) from None
    except ValueError:  # int() refuses literals of more than 4,300 digits
        message = "a whole number has thousands of digits; expected numbers that fit 64 bits"
        raise DataError(message, code="E_JSON", path=path, line=line, field=field) from None
    return value


def _check_size(text: str) -> None:
    """Nesting and number of values, in one linear scan that builds nothing."""
    opened = text.count("[") + text.count("{")
    if opened <= MAX_DEPTH and opened + text.count(",") <= MAX_VALUES:
        return  # cannot break either limit, whatever is inside strings
    depth = values = skip = 0
    in_string = False
    for match in _STRUCTURE.finditer(text):
        at, sign = match.start(), match[0]
        if at < skip:
            continue  # an escaped character
        if sign == "\\":
            skip = at + 2
        elif sign == '"':
            in_string = not in_string
        elif in_string:
            continue
        elif sign in "]}":
            depth -= 1
        else:
            values += 1
            depth += sign != ","
            if depth > MAX_DEPTH:
                raise _Fault(f"nested deeper than {MAX_DEPTH} levels", "E_LIMIT")
            if values > MAX_VALUES:
                raise _Fault(f"more than {MAX_VALUES:,} values in one row", "E_LIMIT")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Fault(f"the key {printable(key[:80])!r} occurs twice in one object", "E_JSON")
            seen.add(key)
    return made


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise _Fault(f"the number {printable(literal[:40])} is out of range", "E_JSON")
    return value


def _no_constant(literal: str) -> float:
    raise _Fault(f"{literal} is not JSON; expected a finite number or null", "E_JSON")


def _check_surrogates(value: Any) -> None:
    """Iterative: the depth is bounded, but a frame a level is not needed."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as fault:
                broken = item[fault.start]
                raise _Fault(f"\\u{ord(broken):04x} is half of a surrogate pair: no such character", "E_UTF8") from None
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
