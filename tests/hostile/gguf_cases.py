"""Rows G01 to G38: files that break the GGUF format itself. Each is one change of a small valid file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

from hostile.case import Case, case
from hostile.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    array_head,
    key,
    small,
    string,
)

HUGE = {"2^64-1": 2**64 - 1, "2^63": 2**63, "2^32": 2**32, "2^31": 2**31, "1e9": 10**9}
EMBED, NORM, QUERY = "token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"


def cases() -> Iterator[Case]:
    """Every case of these rows."""
    yield case("G00", "valid", small().build())
    yield from _start()
    yield from _keys()
    yield from _values()
    yield from _arrays()
    yield from _tensor_names()
    yield from _shapes()
    yield from _layout()


def _start() -> Iterator[Case]:
    good = small()
    data = good.build()
    for size in (0, 1, 2, 3):
        yield case("G01", f"{size}-bytes", data[:size], "E_TRUNCATED")
    for magic in (b"FUGG", b"gguf", b"GGML", b"GGJT", b"lmgg", b"tjgg", b"PK\3\4", b"\x7fELF", b"\0\0\0\0", b"<!DO"):
        yield case("G02", repr(magic), replace(good, magic=magic).build(), "E_MAGIC")
    for version in (0, 1, 4, 0xFFFFFFFF):
        yield case("G03", f"version-{version}", replace(good, version=version).build(), "E_VERSION")
    for version in (2, 3):
        yield case("G04", f"big-endian-{version}", replace(good, version=version << 24).build(), "E_VERSION")
        yield case("G03", f"version-{version}-is-fine", replace(good, version=version).build())
    header = good.header()
    for size in range(4, len(header)):
        yield case("G05", f"cut-{size}", header[:size], "E_TRUNCATED")
    for name, count in HUGE.items():
        yield case("G06", f"tensors-{name}", data[:8] + struct.pack("<Q", count) + data[16:200], "E_LIMIT")
        yield case("G07", f"keys-{name}", data[:16] + struct.pack("<Q", count) + data[24:200], "E_LIMIT")
    # One more: what follows the directory is padding, read as a name of length 0, or as whatever else it is not.
    yield case("G08", "one-more-tensor", replace(good, tensor_count=4).build(), "E_TRUNCATED", "E_OFFSET", "E_LIMIT", "E_SHAPE")
    yield case("G08", "one-fewer-tensor", replace(good, tensor_count=2).build(), "E_OFFSET")
    yield case("G08", "one-more-key", replace(good, key_count=len(good.keys) + 1).build(), "E_TRUNCATED", "E_TYPE", "E_LIMIT")
    yield case("G08", "one-fewer-key", replace(good, key_count=len(good.keys) - 1).build(), "E_SHAPE")


def _keys() -> Iterator[Case]:
    good = small()
    size = len(good.build())
    for name, length in {**HUGE, "file+1": size + 100}.items():
        yield case("G09", f"length-{name}", good.with_raw("x", string("x", length) + b"\0" * 8).build(), "E_LIMIT")
    # 36 bytes in all: one key whose length is beyond anything.
    yield case("G09", "36-bytes", b"GGUF" + struct.pack("<IQQQI", 3, 0, 1, 2**62, 0), "E_LIMIT")
    yield case("G10", "empty", good.with_key("", U8).build(), "E_TYPE")
    yield case("G10", "64-KiB", good.with_key("k" * 65_536, U8).build(), "E_LIMIT")
    for name, text in {"nul": "a\0b", "newline": "a\nb", "escape": "\x1b]0;owned\x07\x1b[31m", "bidi": "a\u202eb"}.items():
        yield case("G10", name, good.with_key(text, U8).build(), "E_TYPE")
    for name, raw in {
        "invalid": b"\xff\xfe",
        "overlong": b"a\xc0\xaf",
        "surrogate": b"\xed\xa0\x80",
        "half": b"\xe2\x82",
    }.items():
        yield case("G11", name, good.with_raw("x", key(raw, U8)).build(), "E_UTF8")
    yield case("G12", "same-type", good.with_raw("x", key("general.name", STRING, "again")).build(), "E_DUP")
    yield case("G12", "other-type", good.with_raw("x", key("general.name", U8, 1)).build(), "E_DUP")
    yield case("G12", "alignment", good.with_raw("x", key("general.alignment", U32, 32)).build(), "E_DUP")
    many = {f"{i}": key(f"{i:06x}", U8, i & 255) for i in range(5_000)}
    yield case("G13", "5000-keys", replace(good, keys=good.keys | many).build(), "E_LIMIT")
    yield case("G13", "4000-keys", replace(good, keys=good.keys | dict(list(many.items())[:4_000])).build())


def _values() -> Iterator[Case]:
    good = small()
    for kind in (13, 14, 255, 2**32 - 1):
        yield case("G14", f"type-{kind}", good.with_key("x", kind).build(), "E_TYPE")
        yield case("G14", f"array-of-{kind}", good.with_raw("x", key("x", 9, [], element=kind)).build(), "E_TYPE")
    yield case("G18", "longer-than-file", good.with_raw("x", string("x") + struct.pack("<I", STRING) + string("", 10**6)).build(),
               "E_TRUNCATED")  # fmt: skip
    yield case(
        "G18", "2^64-1", good.with_raw("x", string("x") + struct.pack("<I", STRING) + string("", 2**64 - 1)).build(), "E_LIMIT"
    )
    yield case("G18", "empty", good.with_key("x", STRING, "").build())
    last = replace(good, tensors=(), tensor_count=0).with_key("x", STRING, "to the last byte")
    yield case("G18", "all-bytes-left", last.header())
    yield case("G18", "value-not-utf8", good.with_key("x", STRING, b"\xff").build(), "E_UTF8")
    for value in (2, 0xFF):
        yield case("G19", f"bool-{value}", good.with_key("x", BOOL, value).build(), "E_TYPE")
    for value in (0, 1, 2, 3, 4, 13, 48, 2**17, 2**31, 2**32 - 1):
        yield case("G20", f"{value}", good.with_key("general.alignment", U32, value).build(), "E_LIMIT")
    for kind, name in ((I32, "int32"), (U64, "uint64"), (U16, "uint16"), (F32, "float")):
        yield case("G20", name, good.with_key("general.alignment", kind, 32).build(), "E_TYPE")
    yield case("G20", "string", good.with_key("general.alignment", STRING, "32").build(), "E_TYPE")
    yield case("G20", "array", good.with_key("general.alignment", ARRAY, [32]).build(), "E_TYPE")
    for value in (8, 64, 65_536):
        aligned = replace(good.with_key("general.alignment", U32, value), alignment=value)
        yield case("G20", f"{value}-is-fine", aligned.build())


def _arrays() -> Iterator[Case]:
    good = small()

    def array(payload: bytes) -> bytes:
        return good.with_raw("x", string("x") + struct.pack("<I", ARRAY) + payload).build()

    for depth in (1, 1_000, 100_000):
        yield case("G15", f"nested-{depth}", array(array_head(ARRAY, 1) * depth + array_head(U8, 0)), "E_TYPE")
    for name, kind in {"u8": U8, "u32": U32, "u64": U64, "string": STRING}.items():
        yield case("G16", f"2^64-1-{name}", array(array_head(kind, 2**64 - 1)), "E_OVERFLOW")
    yield case("G16", "wraps-to-8", array(array_head(U64, 0x2000000000000001) + b"\0" * 8), "E_OVERFLOW")
    for name, count in {"2^26": 2**26, "2^40": 2**40}.items():
        yield case("G17", f"{name}-strings", array(array_head(STRING, count))[: len(good.header()) + 100], "E_LIMIT")
    yield case("G17", "1000-strings-of-none", array(array_head(STRING, 100_000)), "E_TRUNCATED", "E_LIMIT")
    yield case("G17", "numbers-past-the-end", array(array_head(U64, 10_000)), "E_TRUNCATED")
    yield case("G17", "string-in-array-too-long", array(array_head(STRING, 2) + string("a") + string("b", 2**63)), "E_TRUNCATED")
    long = array_head(STRING, 3) + string("a") + string("b" * 70_000) + string("c")
    yield case("G17", "long-string-is-fine", array(long))


def _tensor_names() -> Iterator[Case]:
    good = small()
    yield case("G26", "empty", good.with_tensor(NORM, name="").build(), "E_LIMIT")
    yield case("G26", "63-is-fine", good.with_tensor(NORM, name="n" * 63).build())
    for length in (64, 65):
        yield case("G26", f"{length}", good.with_tensor(NORM, name="n" * length).build(), "E_LIMIT")
    for length in (2**32, 2**64 - 1):
        yield case("G26", f"length-{length}", good.with_tensor(NORM, name_length=length).build(), "E_LIMIT")
    for name in ("../x", "/etc/passwd", "a\0b", "a\x1b[2J"):
        yield case("G26", repr(name), good.with_tensor(NORM, name=name).build(), "E_PATH")
    yield case("G26", "not-utf8", good.with_tensor(NORM, name=b"\xff\xff").build(), "E_UTF8")
    yield case("G27", "twice", good.with_tensor(NORM, name=EMBED).build(), "E_DUP")
    many = tuple(Tensor(f"t{i:05}", (1,), data=b"1234") for i in range(33_000))
    yield case("G27", "33000-tensors", replace(good, tensors=many).build(), "E_LIMIT")


def _shapes() -> Iterator[Case]:
    good = small()
    for dims in (0, 5, 2**32 - 1):
        yield case("G28", f"{dims}-dims", good.with_tensor(NORM, n_dims=dims).build(), "E_SHAPE")

    def shaped(row: str, name: str, *codes: str, dims: tuple[int, ...], type: int = 0, data: bytes = b"") -> Case:
        return case(row, name, good.with_tensor(NORM, dims=dims, type=type, data=data).build(), *codes)

    yield shaped("G29", "zero", "E_SHAPE", dims=(0,))
    yield shaped("G29", "zero-hides-overflow", "E_SHAPE", "E_OVERFLOW", dims=(2**63, 2**63, 0))
    yield shaped("G29", "negative", "E_OVERFLOW", dims=(2**63,))
    yield shaped("G29", "int64-max", "E_OVERFLOW", dims=(2**63 - 1, 2, 1, 1))
    yield shaped("G29", "2^42+1", "E_OVERFLOW", dims=(2**42 + 1, 2**22, 1, 1))
    yield shaped("G29", "2^32-squared", "E_OVERFLOW", dims=(2**32, 2**32))
    yield shaped("G30", "elements-fit-bytes-do-not", "E_OVERFLOW", dims=(2**61, 3))
    yield shaped("G31", "quarter-of-size-max", "E_OVERFLOW", dims=((2**64 - 1) // 4,))
    yield shaped("G31", "padding-wraps", "E_OVERFLOW", dims=((2**63 - 1) // 4,))
    huge = 0x7FFFFFFFFFFFFFC0 // 4
    two = (Tensor("a", (huge,), data=b""), Tensor("b", (huge,), data=b""))
    yield case("G32", "sum-wraps", replace(good, tensors=two).build(), "E_OVERFLOW")
    three = tuple(Tensor(name, (2**60,), data=b"") for name in "abc")
    yield case("G32", "three-quarters", replace(good, tensors=three).build(), "E_OVERFLOW")
    for kind in (4, 5, 31, 32, 33, 36, 37, 38, 42, 255, -1):
        yield case("G33", f"type-{kind}", good.with_tensor(NORM, type=kind, data=b"\0" * 128).build(), "E_DTYPE")
    for kind in (9, 15, 16, 19, 24, 28, 34, 40):
        yield case("G33", f"unsupported-{kind}", good.with_tensor(NORM, type=kind, data=b"\0" * 128).build(), "E_DTYPE")
    yield shaped("G34", "q8_0-row-33", "E_SHAPE", dims=(33, 2), type=8, data=b"\0" * 68)
    yield shaped("G34", "mxfp4-row-48", "E_SHAPE", dims=(48, 2), type=39, data=b"\0" * 51)
    yield shaped("G34", "q2_K-row-128", "E_SHAPE", dims=(128, 2), type=10, data=b"\0" * 84)
    yield shaped("G34", "q4_K-row-128", "E_SHAPE", dims=(128, 2), type=12, data=b"\0" * 144)


def _layout() -> Iterator[Case]:
    good = small()
    data = good.build()
    size = len(data)
    embed = len(good.tensors[0].bytes())
    norm_at = embed + -embed % 32
    for name, offset in {"past-end": size + 32 - size % 32, "2^64-32": 2**64 - 32, "2^63": 2**63}.items():
        yield case("G35", name, good.with_tensor(QUERY, offset=offset).build(), "E_OFFSET")
    yield case("G35", "2^64-1", good.with_tensor(QUERY, offset=2**64 - 1).build(), "E_OFFSET")
    yield case("G35", "end-one-step-past", good.with_tensor(QUERY, offset=norm_at + 128 + 32).build(), "E_OFFSET")
    yield case("G36", "overlap", good.with_tensor(NORM, offset=norm_at - 32).build(), "E_OFFSET")
    yield case("G36", "same-offset", good.with_tensor(NORM, offset=0).build(), "E_OFFSET")
    yield case("G36", "not-aligned", good.with_tensor(NORM, offset=norm_at + 4).build(), "E_OFFSET")
    yield case("G36", "hole", good.with_tensor(QUERY, offset=norm_at + 128 + 64).build() + b"\0" * 64, "E_OFFSET")
    yield case(
        "G36", "hole-at-start", replace(good, tensors=(replace(good.tensors[0], offset=32),)).build() + b"\0" * 32, "E_OFFSET"
    )
    swapped = good.with_tensor(EMBED, offset=norm_at).with_tensor(NORM, offset=0)
    yield case("G36", "swapped-sizes-differ", swapped.build(), "E_OFFSET")
    equal = (Tensor("a", (8,), offset=32), Tensor("b", (8,), offset=0))
    yield case("G36", "out-of-order-without-gap-is-fine", replace(good, tensors=equal).build())
    endings = {"32": b"\0" * 32, "zip": b"PK\3\4" + b"z" * 60, "elf": b"\x7fELF" + b"e" * 60, "1-MB": b"\0" * 1_000_000}
    for name, tail in endings.items():
        yield case("G37", f"tail-{name}", replace(good, tail=tail).build(), "E_OFFSET")
    yield case("G37", "tail-under-alignment-is-fine", data + b"\0" * 31)
    end = data[: size - (-len(good.tensors[2].bytes()) % 32)]
    yield case("G37", "no-final-padding-is-fine", end)
    yield case("G38", "one-byte-short", end[:-1], "E_TRUNCATED")
    yield case("G38", "half", data[: len(good.header()) + (size - len(good.header())) // 2], "E_TRUNCATED")
    yield case("G38", "no-data", good.header(), "E_TRUNCATED")
