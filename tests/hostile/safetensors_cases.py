"""Rows S01 to S18 and S21: single files that break the safetensors format. Each is one change of a small valid file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import safetensors

from hostile.case import Case, case

#: Files that the reference accepts and nomoat refuses, with the reason. test_safetensors.py fails for any other difference.
STRICTER = {
    "S04-starts-with-space": "the format says that the header begins with {",
    "S05-same-tensor-twice": "the reference keeps the last of two equal keys",
    "S05-metadata-key-twice": "the reference keeps the last of two equal keys",
    "S05-escaped-key-twice": "the reference keeps the last of two equal keys",
    "S06-70000-empty-tensors": "at most 65,536 tensors in one file",
    "S06-deep-unknown-field": "no unknown fields, nothing deep",
    "S07-unknown-field": "the reference ignores unknown fields",
    "S07-tensor-as-array": "the format says that a tensor is an object",
    "S09-65-dims": "at most 8 dimensions",
    "S09-2^63-times-0": "sizes fit into 63 bits, also beside a zero",
    "S02-9-MB-header": "headers of at most 8 MiB",
    "S15-9-MB-metadata": "headers of at most 8 MiB",
    "S16-513-characters": "names of at most 512 characters",
    "S16-1-MB": "names of at most 512 characters",
}


def entry(dtype: str = "F32", shape: Any = (2, 2), begin: int = 0, end: int = 16) -> dict[str, Any]:
    """The header of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file(header: dict[str, Any] | str | bytes, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    """A file; `length` lies about the header's length."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


GOOD = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("F16", (3,), 16, 22), "c": entry("BF16", (1,), 22, 24)}
DATA = bytes(range(24))


def read_by_the_library(data: bytes) -> dict[str, bytes]:
    """Names and bytes as the reference reads them. Raises SafetensorError."""
    found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return {name: bytes(tensor["data"]) for name, tensor in found}


def cases() -> Iterator[Case]:
    """Every case of these rows."""
    yield case("S00", "valid", file(GOOD, DATA))
    yield case("S00", "padded-with-spaces", file(json.dumps(GOOD) + " " * 7, DATA))
    yield from _lengths()
    yield from _json()
    yield from _duplicates()
    yield from _fields()
    yield from _shapes()
    yield from _offsets()
    yield from _texts()


def _lengths() -> Iterator[Case]:
    good = file(GOOD, DATA)
    for size in range(8):
        yield case("S01", f"{size}-bytes", good[:size], "E_TRUNCATED")
    yield case("S01", "length-only", good[:8], "E_TRUNCATED")
    for length in (0, 1):
        yield case("S02", f"N={length}", file("{}", b"", length), "E_LIMIT")
    for name, length in {"1e8+1": 100_000_001, "2^63": 2**63, "2^64-1": 2**64 - 1, "wraps": 2**64 - 4}.items():
        yield case("S02", f"N={name}", file(GOOD, DATA, length), "E_LIMIT")
    yield case("S02", "9-MB-header", file(json.dumps(GOOD) + " " * (9 << 20), DATA), "E_LIMIT")
    yield case("S03", "N-one-too-many", file("{}", b"", 3), "E_TRUNCATED")
    for size in range(8, len(good)):
        yield case("S03", f"cut-{size}", good[:size], "E_TRUNCATED")


def _json() -> Iterator[Case]:
    text = json.dumps(GOOD)
    starts = {"space": " ", "bom": "\ufeff", "bracket": "["}
    for name, start in starts.items():
        yield case("S04", f"starts-with-{name}", file(start + text, DATA), "E_JSON")
    yield case("S04", "not-utf8", file(text.encode().replace(b"pt", b"\xff\xfe"), DATA), "E_JSON")
    yield case("S04", "trailing-nul", file(text + "\0\0", DATA), "E_JSON")
    yield case("S04", "comment", file("{/* hi */" + text[1:], DATA), "E_JSON")
    yield case("S04", "trailing-comma", file(text[:-1] + ",}", DATA), "E_JSON")
    yield case("S04", "two-objects", file(text + text, DATA), "E_JSON")
    yield case("S04", "unterminated-string", file('{"' + '\\"' * 100_000, DATA), "E_JSON")
    for value in ("NaN", "Infinity", "-Infinity", "1e400", "1e3", "4.0"):
        one = f'{{"a":{{"dtype":"F32","shape":[{value}],"data_offsets":[0,16]}}}}'
        yield case("S04", f"shape-{value}", file(one), "E_JSON")
    for name, surrogate in {"high": "\\ud800", "low": "\\udc00"}.items():
        yield case("S04", f"lone-{name}-surrogate", file(f'{{"{surrogate}":{json.dumps(entry())}}}'), "E_JSON")
        yield case("S04", f"lone-{name}-in-metadata", file(f'{{"__metadata__":{{"k":"{surrogate}"}}}}', b""), "E_JSON")
    yield case("S04", "control-character", file('{"a\n":' + json.dumps(entry()) + "}"), "E_JSON")
    for name, magic in {
        "torch-zip": b"PK\3\4\x14\0\0\0",
        "pickle": b"\x80\x02}q\0X\1\0",
        "pickle4": b"\x80\x04\x95\x1c\0\0\0\1",
    }.items():
        yield case("S18", name, magic + b"\0" * 200, "E_JSON")
    yield case("S18", "zip-as-header", file(b"PK\3\4" + b"\0" * 100, b""), "E_JSON")
    yield case("S18", "gguf", b"GGUF\3\0\0\0" + b"\0" * 200, "E_JSON")


def _duplicates() -> Iterator[Case]:
    one = json.dumps(entry())
    other = json.dumps(entry(begin=16, end=32))
    yield case("S05", "same-tensor-twice", file(f'{{"a":{one},"a":{one}}}'), "E_DUP")
    yield case("S05", "two-tensors-of-one-name", file(f'{{"a":{one},"a":{other}}}', b"\0" * 32), "E_DUP")
    yield case("S05", "escaped-key-twice", file(f'{{"a":{one},"\\u0061":{one}}}'), "E_DUP")
    field = '"dtype":"F32"'
    yield case("S05", "field-twice", file(f'{{"a":{{{field},{one[1:]}}}'), "E_DUP")
    yield case("S05", "metadata-key-twice", file(f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{one}}}'), "E_DUP")
    yield case("S05", "metadata-twice", file(f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{one}}}'), "E_DUP")
    yield case("S06", "deep-arrays", file('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "E_LIMIT")
    yield case("S06", "deep-objects", file('{"a":' * 100_000 + "1" + "}" * 100_000), "E_LIMIT")
    yield case("S06", "deep-unknown-field", file(f'{{"a":{{"x":{"[" * 60}{"]" * 60},{one[1:]}}}'), "E_LIMIT")
    empty = '"shape":[0],"dtype":"U8","data_offsets":[0,0]'
    many = ",".join(f'"{i}":{{{empty}}}' for i in range(70_000))
    yield case("S06", "70000-empty-tensors", file("{" + many + "}", b""), "E_LIMIT")
    million = ",".join(f'"{i}":{{}}' for i in range(500_000))
    yield case("S06", "500000-nothings", file("{" + million + "}", b""), "E_LIMIT")
    yield case("S06", "commas", file('{"a":[' + "1," * 1_000_000 + "1]}", b""), "E_LIMIT")


def _fields() -> Iterator[Case]:
    good = entry()
    wrong: dict[str, Any] = {"null": None, "object": {}, "bool": True}
    for name in good:
        for what, value in wrong.items():
            yield case("S07", f"{name}-{what}", file({"a": good | {name: value}}), "E_JSON")
        yield case("S07", f"no-{name}", file({"a": {k: v for k, v in good.items() if k != name}}), "E_JSON")
    yield case("S07", "unknown-field", file({"a": good | {"x": 1}}), "E_JSON")
    yield case("S07", "tensor-null", file({"a": None}), "E_JSON")
    yield case("S07", "tensor-as-array", file('{"a":["F32",[2,2],[0,16]]}'), "E_JSON")
    yield case("S07", "dtype-number", file({"a": good | {"dtype": 32}}), "E_JSON")
    yield case("S07", "shape-of-strings", file({"a": good | {"shape": ["2", "2"]}}), "E_JSON")
    yield case("S07", "shape-of-bools", file({"a": good | {"shape": [True, 4]}}), "E_JSON")
    yield case("S07", "offsets-as-text", file({"a": good | {"data_offsets": "0,16"}}), "E_JSON")
    for dtype in ("F99", "f32", "", "F32\0", "x" * 10_240, "Q4_0"):
        yield case("S08", f"dtype-{dtype[:8]!r}", file({"a": entry(dtype)}), "E_DTYPE")


def _shapes() -> Iterator[Case]:
    def shaped(row: str, name: str, shape: object, *codes: str, dtype: str = "F32", end: int = 0) -> Case:
        return case(row, name, file({"a": entry(dtype, shape, 0, end)}, b"\0" * end), *codes)

    yield shaped("S09", "negative", [-1, 4], "E_SHAPE")
    yield shaped("S09", "two-negatives", [-2, -2], "E_SHAPE", end=16)
    yield case("S09", "minus-zero", file('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "E_SHAPE")
    yield shaped("S09", "2^64", [2**64], "E_OVERFLOW")
    yield shaped("S09", "10^5000", [10**4000], "E_OVERFLOW")
    yield shaped("S09", "2^53+1", [2**53 + 1], "E_OFFSET")
    yield shaped("S09", "65-dims", [1] * 65, "E_SHAPE", end=4)
    yield shaped("S09", "2^63-times-0", [2**59, 0], "E_OVERFLOW")
    yield shaped("S10", "wraps-to-0", [2**32, 2**32], "E_OVERFLOW")
    yield shaped("S10", "wraps-to-4", [2**32 + 1, 2**32 + 1, 1], "E_OVERFLOW", end=4)
    yield shaped("S11", "bits-wrap", [2**59], "E_OVERFLOW")
    yield shaped("S11", "4-bit-half-byte", [3], "E_SHAPE", dtype="F4", end=1)
    yield shaped("S11", "6-bit", [2], "E_SHAPE", dtype="F6_E2M3", end=1)
    yield shaped("S11", "4-bit-whole-is-fine", [4], dtype="F4", end=2)


def _offsets() -> Iterator[Case]:
    def offsets(name: str, value: object, *codes: str, shape: object = (2, 2)) -> Case:
        return case("S12", name, file({"a": entry(shape=shape) | {"data_offsets": value}}), *codes)

    yield offsets("begin-after-end", [16, 0], "E_OFFSET")
    yield offsets("end-past-buffer", [0, 17], "E_OFFSET")
    yield offsets("shifted-past-buffer", [1, 17], "E_OFFSET")
    yield offsets("empty-span", [0, 0], "E_OFFSET")
    yield offsets("three", [0, 16, 16], "E_OFFSET")
    yield offsets("one", [0], "E_OFFSET")
    yield offsets("none", [], "E_OFFSET")
    yield offsets("negative", [-16, 0], "E_OFFSET")
    yield offsets("wraps", [2**64 - 16, 2**64], "E_OFFSET")
    yield offsets("buffer-too-short", [0, 20], "E_TRUNCATED", shape=(5,))
    two = {"a": entry(), "b": entry(begin=12, end=28)}
    yield case("S13", "overlap", file(two, b"\0" * 28), "E_OFFSET")
    yield case("S13", "same-bytes", file({"a": entry(), "b": entry()}), "E_OFFSET")
    yield case("S13", "hole-at-start", file({"a": entry(begin=4, end=20)}, b"\0" * 20), "E_OFFSET")
    yield case("S13", "hole-in-middle", file({"a": entry(), "b": entry(begin=20, end=36)}, b"\0" * 36), "E_OFFSET")
    yield case("S13", "tail", file({"a": entry()}, b"\0" * 17), "E_OFFSET")
    yield case("S13", "zip-appended", file({"a": entry()}, b"\0" * 16 + b"PK\3\4" + b"z" * 40), "E_OFFSET")
    yield case("S13", "only-a-tail", file("{}", b"PK\3\4"), "E_OFFSET")
    empty = entry("F32", (0,), 16, 16)
    yield case("S14", "empty-at-end", file({"a": entry(), "z": empty}))
    yield case("S14", "empty-between", file({"a": entry(), "z": empty, "b": entry(begin=16, end=32)}, b"\0" * 32))
    yield case("S14", "empty-inside", file({"a": entry(), "z": entry("F32", (0,), 8, 8)}), "E_OFFSET")
    yield case("S14", "scalar", file({"a": entry(shape=(), end=4)}, b"\0" * 4))
    yield case("S14", "no-tensors", file("{}", b""))


def _texts() -> Iterator[Case]:
    values: dict[str, Any] = {"number": 1, "null": None, "list": ["x"], "object": {}}
    for name, value in values.items():
        yield case("S15", f"value-{name}", file({"__metadata__": {"k": value}, "a": entry()}), "E_JSON")
    for name in ("list", "string", "number"):
        value = {"list": [], "string": "x", "number": 1}[name]
        yield case("S15", f"metadata-{name}", file({"__metadata__": value, "a": entry()}), "E_JSON")
    yield case("S15", "metadata-null-is-none", file({"__metadata__": None, "a": entry()}))
    yield case("S15", "9-MB-metadata", file({"__metadata__": {"k": "x" * (9 << 20)}, "a": entry()}), "E_LIMIT")
    yield case("S15", "proto", file({"__metadata__": {"__proto__": "x", "\x1b[31m": "\x1b[0m"}, "a": entry()}))
    for name, text in {
        "dots": "../../a",
        "nul": "a\0b",
        "empty": "",
        "rtl": "\u202egnp",
        "512": "n" * 512,
        "ansi": "\x1b[2J",
    }.items():
        yield case("S16", f"{name}-is-only-a-name", file({text: entry()}))
    yield case("S16", "ansi-in-error", file({"\x1b[2J\n": entry("F99")}), "E_DTYPE")
    yield case("S16", "513-characters", file({"n" * 513: entry()}), "E_LIMIT")
    yield case("S16", "1-MB", file({"n" * 1_000_000: entry()}), "E_LIMIT")
