"""Every hostile GGUF file gives one typed error, at once, in little memory, with nothing written."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from hostile import gguf_cases
from hostile.case import Case, check
from hostile.gguf_bytes import STRING, U16, Gguf, Tensor, key, small
from nomoat.errors import FileFormatError, InputError, NomoatError, NotFoundError
from nomoat.files.gguf import LazyArray, ValueType, open_gguf

CASES = list(gguf_cases.cases())
ROWS = sorted({case.row for case in CASES})


def read_all(path: Path) -> None:
    """Open and touch everything: every array and every tensor."""
    with open_gguf(path) as file:
        for value in file.metadata.values():
            if isinstance(value, LazyArray):
                assert len(value.strings() if value.type is ValueType.STRING else value.numbers()) == len(value)
        for name, info in file.tensors.items():
            assert int(file.data(name).nbytes) == info.nbytes


def test_rows_are_complete() -> None:
    """Rows G21 to G25 belong to the model (test_model.py)."""
    assert set(ROWS) == {f"G{i:02}" for i in (*range(21), *range(26, 39))}
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str, tmp_path: Path) -> None:
    for case in CASES:
        if case.row == row:
            path = tmp_path / f"{len(case.id)}.gguf"
            path.write_bytes(case.data)
            try:
                check(path, case.codes, read_all)
            except AssertionError as error:
                raise AssertionError(f"{case.id}: {error}") from error
            path.unlink()


def test_errors_carry_path_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(small().build()[:30])
    with pytest.raises(FileFormatError) as caught:
        open_gguf(path)
    assert caught.value.path == path
    assert caught.value.offset is not None
    assert 24 <= caught.value.offset <= 32


def test_every_bit_of_the_header_flipped(tmp_path: Path) -> None:
    """G49: each of some ten thousand files loads or gives one typed error."""
    good = small()
    data, header = good.build(), len(good.header())
    path = tmp_path / "flip.gguf"
    path.write_bytes(data)
    read_all(path)
    accepted = refused = raw = 0
    with path.open("r+b") as file:
        for byte in range(header):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([data[byte] ^ 1 << bit]), byte)
                try:
                    read_all(path)
                    accepted += 1
                except InputError as error:
                    refused += 1
                    raw += not str(error).isprintable()
            os.pwrite(file.fileno(), data[byte : byte + 1], byte)
    assert accepted + refused == 8 * header
    assert raw == 0, "text of the file reached a message raw"
    assert refused > accepted / 4  # lengths, counts, types, offsets: a reader that accepts all of them checks nothing
    assert accepted > header  # letters of names and values: a reader that refuses these refuses real files


# -- what is not a regular file -----------------------------------------------------------------------------------------------


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "fifo.gguf"
    os.mkfifo(path)
    outcome: list[object] = []

    def run() -> None:
        with pytest.raises(FileFormatError) as caught:
            open_gguf(path)
        outcome.append(caught.value.code)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    assert outcome == ["E_PATH"]


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/random", "/dev/null", "/dev", "/proc"])
def test_devices_and_folders_are_refused(device: str) -> None:
    if not os.path.exists(device):
        pytest.skip(f"no {device} on this system")
    check_path(Path(device), "E_PATH")


def test_socket_is_refused(tmp_path: Path) -> None:
    path = Path("/tmp") / f"nomoat-test-{os.getpid()}.sock"  # tmp_path may be longer than a socket's name can be
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        try:
            check_path(path, "E_PATH")
        finally:
            path.unlink()


def check_path(path: Path, code: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        open_gguf(path)
    assert caught.value.code == code


def test_other_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_gguf(tmp_path / "none.gguf")
    check_path(Path("a\0b"), "E_PATH")
    check_path(tmp_path / ("x" * 300), "E_PATH")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    check_path(tmp_path / "loop", "E_PATH")


def test_symlink_swapped_after_open(tmp_path: Path) -> None:
    """G48: the file that was checked stays the file that is read."""
    for name, value in (("a", 1), ("b", 2)):
        tensor = Tensor("t", (8,), data=bytes([value]) * 32)
        (tmp_path / f"{name}.gguf").write_bytes(Gguf(small().keys, (tensor,)).build())
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "a.gguf")
    with open_gguf(link) as file:
        link.unlink()
        link.symlink_to(tmp_path / "b.gguf")
        assert set(file.data("t").tolist()) == {1}


# -- files that change while open ---------------------------------------------------------------------------------------------


def test_file_that_shrinks_before_it_is_mapped(tmp_path: Path) -> None:
    """G38: an error, not a signal."""
    path = tmp_path / "m.gguf"
    path.write_bytes(small().build())
    with open_gguf(path) as file:
        tokens = file.get_array("tokenizer.ggml.tokens")
        os.truncate(path, 100)
        for touch in (lambda: file.data("output_norm.weight"), tokens.strings):
            with pytest.raises(FileFormatError) as caught:
                touch()
            assert caught.value.code == "E_TRUNCATED"


def test_array_whose_lengths_change_while_open(tmp_path: Path) -> None:
    good = small()
    path = tmp_path / "m.gguf"
    path.write_bytes(good.build())
    with open_gguf(path) as file:
        tokens = file.get_array("tokenizer.ggml.tokens")
        with path.open("r+b") as other:
            os.pwrite(other.fileno(), struct.pack("<Q", 10**9), good.build().index(b"<unk>") - 8)
        with pytest.raises(FileFormatError) as caught:
            tokens.strings()
        assert caught.value.code == "E_TRUNCATED"


def test_views_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small().build())
    with open_gguf(path) as file:
        view = file.data("output_norm.weight")
    path.unlink()
    assert view.tobytes() == small().tensors[1].bytes()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


# -- split files --------------------------------------------------------------------------------------------------------------


def write_split(folder: Path, numbers: tuple[int, ...] = (0, 1, 2), counts: tuple[int, ...] = (3, 3, 3), total: int = 3) -> Path:
    """Three shards with one tensor each; `numbers` and `counts` are what they say about themselves."""
    tensors = small().tensors
    for i, (number, count) in enumerate(zip(numbers, counts, strict=True)):
        keys = small().keys if i == 0 else {}
        split = {"split.no": number, "split.count": count, "split.tensors.count": total}
        keys = keys | {name: key(name, U16, value) for name, value in split.items()}
        (folder / f"m-{i + 1:05}-of-00003.gguf").write_bytes(Gguf(keys, (tensors[i],)).build())
    return folder / "m-00001-of-00003.gguf"


def test_split_file_opens_from_any_part(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    for path in (first, tmp_path / "m-00003-of-00003.gguf"):
        with open_gguf(path) as file:
            assert list(file.tensors) == [t.name for t in small().tensors]
            assert [t.shard for t in file.tensors.values()] == [0, 1, 2]
            assert file.get_str("general.architecture") == "llama"
            assert [p.name for p in file.paths] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
            for tensor in small().tensors:
                assert file.data(str(tensor.name)).tobytes() == tensor.bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"numbers": (0, 2, 1)}, "E_HASH"),
        ({"numbers": (0, 1, 1)}, "E_HASH"),
        ({"numbers": (1, 1, 2)}, "E_HASH"),
        ({"counts": (3, 3, 4)}, "E_HASH"),
        ({"counts": (4, 3, 3)}, "E_HASH"),
        ({"counts": (60000, 3, 3)}, "E_LIMIT"),
        ({"total": 4}, "E_HASH"),
    ],
)
def test_split_parts_that_disagree(change: dict[str, tuple[int, ...]], code: str, tmp_path: Path) -> None:
    check(write_split(tmp_path, **change), (code,), read_all)  # type: ignore[arg-type]


def test_split_parts_missing_or_mixed_up(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    second, third = (tmp_path / f"m-{i:05}-of-00003.gguf" for i in (2, 3))
    data = second.read_bytes()
    second.unlink()
    check(first, ("E_PATH",), read_all)
    second.write_bytes(third.read_bytes())
    check(first, ("E_HASH",), read_all)
    second.write_bytes(data)
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(first.read_bytes())
    check(alone, ("E_PATH",), read_all)
    outside = tmp_path / "m-00001-of-00003.gguf"
    outside.write_bytes(small().with_key("split.count", STRING, "../../x").build())
    check(outside, ("E_TYPE",), read_all)


def test_split_with_the_same_tensor_twice(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    keys = {name: key(name, U16, value) for name, value in {"split.no": 1, "split.count": 3}.items()}
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(Gguf(keys, (small().tensors[0],)).build())
    check(first, ("E_DUP",), read_all)


def test_no_file_stays_open_after_an_error(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc to count descriptors in")
    path = write_split(tmp_path, numbers=(0, 2, 1))
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        with pytest.raises(NomoatError):
            open_gguf(path)
    assert len(list(descriptors.iterdir())) == before


@pytest.mark.parametrize("case", [c for c in CASES if c.row in ("G36", "G37")], ids=lambda c: c.id)
def test_loose_layout_accepts_only_holes_and_tails(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(case.data)
    if not case.codes or "hole" in case.name or "tail" in case.name:
        open_gguf(path, require_contiguous=False).close()
    else:
        with pytest.raises(FileFormatError):
            open_gguf(path, require_contiguous=False)
