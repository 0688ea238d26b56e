"""Pairs of key and value as a GGUF holds them; the layout is in files/gguf.py."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from nomoat.files.gguf import ValueType


def text(value: str) -> bytes:
    """A string: its length, then UTF-8."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, value: Any) -> bytes:
    """A pair in the type that converters use: bool, string, float32, array, else uint32 or (negative) int32."""
    return text(key) + _value(value)


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", ValueType.BOOL, value)
        case str():
            return struct.pack("<I", ValueType.STRING) + text(value)
        case float():
            return struct.pack("<If", ValueType.FLOAT32, value)
        case int():
            return struct.pack("<Ii", ValueType.INT32, value) if value < 0 else struct.pack("<II", ValueType.UINT32, value)
    return struct.pack("<I", ValueType.ARRAY) + _array(value)


def _array(values: Any) -> bytes:
    first = values[0] if len(values) else 0
    if isinstance(first, str):
        kind, data = ValueType.STRING, b"".join(map(text, values))
    elif isinstance(first, bool):
        kind, data = ValueType.BOOL, bytes(values)
    elif isinstance(first, float):
        kind, data = ValueType.FLOAT32, np.asarray(values, "<f4").tobytes()
    else:
        kind, data = ValueType.INT32, np.asarray(values, "<i4").tobytes()
    return struct.pack("<IQ", kind, len(values)) + data
