"""Every hostile safetensors file gives one typed error, and the reference's verdict unless nomoat is stricter on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors

from hostile import safetensors_cases
from hostile.case import check
from hostile.safetensors_cases import DATA, GOOD, STRICTER, entry, file, read_by_the_library
from nomoat.errors import FileFormatError, InputError, NotFoundError
from nomoat.files.safetensors import open_safetensors

CASES = list(safetensors_cases.cases())
ROWS = sorted({case.row for case in CASES})


def read_all(path: Path) -> None:
    """Open and touch everything."""
    with open_safetensors(path) as opened:
        for name, slot in opened.tensors.items():
            assert opened.raw(name).nbytes == slot.nbytes


def test_rows_are_complete() -> None:
    """S17, S19, S21 and S22 need more than one file, or a use of it: below. S20 belongs to adapters."""
    assert set(ROWS) == {f"S{i:02}" for i in (*range(17), 18)}
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str, tmp_path: Path) -> None:
    for case in CASES:
        if case.row == row:
            path = tmp_path / "m.safetensors"
            path.write_bytes(case.data)
            try:
                check(path, case.codes, read_all)
            except AssertionError as error:
                raise AssertionError(f"{case.id}: {error}") from error
            path.unlink()


def test_same_verdict_as_the_reference() -> None:
    """S23. A file that the reference refuses must be refused; one that it accepts must be accepted or be listed as stricter."""
    stricter = set()
    for case in CASES:
        try:
            read_by_the_library(case.data)
        except safetensors.SafetensorError:
            assert case.codes, f"{case.id}: the reference refuses it"
        else:
            if case.codes:
                stricter.add(case.id)
    assert stricter == set(STRICTER)


def test_every_bit_of_the_header_flipped(tmp_path: Path) -> None:
    """Each file loads or gives one typed error, and whatever loads, loads in the reference with the same names and bytes."""
    header = json.dumps(GOOD).encode()
    data = bytearray(file(header, DATA))
    path = tmp_path / "m.safetensors"
    accepted = 0
    for bit in range(8 * (8 + len(header))):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            with open_safetensors(path) as opened:
                found = {name: opened.raw(name).tobytes() for name in opened.tensors}
        except InputError:
            pass
        else:
            assert found == read_by_the_library(bytes(data))
            accepted += 1
        data[bit // 8] ^= 1 << bit % 8
    assert 0 < accepted < 2 * len(header)


@pytest.mark.parametrize("dtype", ["F64", "I64", "BOOL", "F8_E4M3", "U8", "C64"])
def test_other_dtypes_are_no_weights(dtype: str, tmp_path: Path) -> None:
    """S21: their bytes can be had, their values as weights cannot."""
    size = 8 if dtype.endswith("64") else 1
    path = tmp_path / "m.safetensors"
    path.write_bytes(file({"a": entry(dtype, (3,), 0, 3 * size)}, b"\1" * 3 * size))
    with open_safetensors(path) as opened:
        assert opened.raw("a").nbytes == 3 * size
        with pytest.raises(FileFormatError, match=dtype) as caught:
            opened.array("a")
        assert caught.value.code == "E_DTYPE"


def test_pickles_are_named_and_refused(tmp_path: Path) -> None:
    """S19: no fall-back from a missing safetensors file to a pickle beside it."""
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02}.")
    check(tmp_path, ("E_PATH",), read_all)
    with pytest.raises(FileFormatError, match="pickle"):
        open_safetensors(tmp_path)


def test_folder_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_safetensors(tmp_path)
    with pytest.raises(NotFoundError):
        open_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(InputError):
        open_safetensors("a\0b")


# -- sharded ------------------------------------------------------------------------------------------------------------------


def write_sharded(folder: Path, weight_map: object, shards: dict[str, list[str]] | None = None) -> Path:
    """An index and its shards, each with the tensors named."""
    for name, tensors in (shards or {"x-1.safetensors": ["a"], "x-2.safetensors": ["b"]}).items():
        header = {tensor: entry(begin=16 * i, end=16 * i + 16) for i, tensor in enumerate(tensors)}
        (folder / name).write_bytes(file(header, bytes(range(16 * len(tensors)))))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32.0}, "weight_map": weight_map}))
    return index


GOOD_MAP = {"a": "x-1.safetensors", "b": "x-2.safetensors"}


def test_sharded_model_opens_by_folder_and_by_index(tmp_path: Path) -> None:
    index = write_sharded(tmp_path, GOOD_MAP)
    for path in (tmp_path, index):
        with open_safetensors(path) as opened:
            assert set(opened.tensors) == {"a", "b"}
            assert opened.raw("b").tobytes() == bytes(range(16))
            assert [p.name for p in opened.paths] == ["x-1.safetensors", "x-2.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "code"),
    [
        (GOOD_MAP | {"b": "x-3.safetensors"}, "E_PATH"),
        (GOOD_MAP | {"b": "../../etc/passwd"}, "E_PATH"),
        (GOOD_MAP | {"b": "../x-2.safetensors"}, "E_PATH"),
        (GOOD_MAP | {"b": "/etc/x-2.safetensors"}, "E_PATH"),
        (GOOD_MAP | {"b": "https://example.org/x-2.safetensors"}, "E_PATH"),
        (GOOD_MAP | {"b": "x-2.safetensors\n"}, "E_PATH"),
        (GOOD_MAP | {"b": ""}, "E_PATH"),
        (GOOD_MAP | {"b": "x-2.bin"}, "E_PATH"),
        (GOOD_MAP | {"c": "x-2.safetensors"}, "E_HASH"),
        (GOOD_MAP | {"a": "x-2.safetensors", "b": "x-1.safetensors"}, "E_HASH"),
        (GOOD_MAP | {"b": 2}, "E_JSON"),
        (GOOD_MAP | {"b": None}, "E_JSON"),
        ([], "E_JSON"),
        (None, "E_JSON"),
        ({str(i): f"{i}.safetensors" for i in range(2_000)}, "E_LIMIT"),
    ],
)
def test_bad_indexes(weight_map: object, code: str, tmp_path: Path) -> None:
    check(write_sharded(tmp_path, weight_map), (code,), read_all)


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"x-1.safetensors": ["a"], "x-2.safetensors": ["b", "a"]}
    check(write_sharded(tmp_path, GOOD_MAP, shards), ("E_DUP",), read_all)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"weight_map":{"a":"x-1.safetensors","a":"x-2.safetensors"}}', "E_DUP"),
        ("[" * 100_000, "E_JSON"),
        ('{"weight_map":' + "[" * 100_000, "E_LIMIT"),
        ('{"weight_map":{' + ",".join(f'"{i}":"x"' for i in range(1_000_000)) + "}}", "E_LIMIT"),
        ("", "E_JSON"),
        ("{", "E_JSON"),
        ('{"metadata":{"total_size":NaN},"weight_map":{}}', "E_JSON"),
        (" " * (33 << 20), "E_LIMIT"),
    ],
    ids=["twice", "not-an-object", "deep", "million", "empty", "cut", "nan", "33-MB"],
)
def test_hostile_index_text(text: str, code: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    check(index, (code,), read_all)


def test_what_is_read_is_what_was_opened(tmp_path: Path) -> None:
    """S22: a file replaced after it was opened changes nothing, and an array is a copy: what happens to the file is past it."""
    path = tmp_path / "m.safetensors"
    ones = file({"a": entry()}, b"\0\0\x80\x3f" * 4)
    path.write_bytes(ones)
    with open_safetensors(path) as opened, path.open("r+b") as same:
        other = tmp_path / "other"
        other.write_bytes(file({"a": entry()}, b"\0" * 16))
        other.replace(path)
        array = opened.array("a")
        same.seek(len(ones) - 16)
        same.write(b"\0" * 16)
        same.flush()
        assert opened.array("a").tolist() == [[0, 0], [0, 0]]
    assert array.tolist() == [[1, 1], [1, 1]]
