"""Hostile data sets: one typed error each (exit code 2), nothing written, at most 16 MiB of memory, and no waiting."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nomoat.data.readers import read_examples
from nomoat.data.source import MAX_ROW_BYTES
from nomoat.data.strict_json import MAX_DEPTH, MAX_VALUES
from nomoat.errors import DataError

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
MEMORY_LIMIT = 16 << 20
SECONDS_LIMIT = 3.0  # of processor time, with the tracing that memory is measured by

Write = Callable[[Path], Path]


def content(data: bytes, name: str = "rows.jsonl") -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    return write


def row(value: Any) -> Write:
    return content(json.dumps(value).encode() + b"\n")


def after_good(line: bytes) -> Write:
    """The fault is on line 2."""
    return content(GOOD + line + b"\n" + GOOD)


def message(**changes: Any) -> Write:
    """Line 1 holds one message that differs from a good one."""
    good = {"role": "assistant", "content": "x"}
    return row({"messages": [{key: value for key, value in (good | changes).items() if value != "DELETE"}]})


def sparse(name: str, head: bytes, size: int) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)
        return path

    return write


def special(make: Callable[[Path], None]) -> Write:
    def write(folder: Path) -> Path:
        make(folder / "rows.jsonl")
        return folder / "rows.jsonl"

    return write


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the absolute path may exceed the 108 bytes that a socket name has


def deep(levels: int, opening: bytes, closing: bytes) -> bytes:
    return b'{"text": ' + opening * levels + b"1" + closing * levels + b"}"


CASES: list[tuple[str, Write, str, int | None]] = [
    # D01 nothing to learn from
    ("empty", content(b""), "E_EMPTY", None),
    ("blank lines", content(b"\n \r\n\t\n"), "E_EMPTY", None),
    ("empty array", content(b" [ ] ", "rows.json"), "E_EMPTY", None),
    ("empty json", content(b"", "rows.json"), "E_EMPTY", None),
    ("empty text", content(b"\n\n", "rows.txt"), "E_EMPTY", None),
    ("header only", content(b"prompt,completion\n", "rows.csv"), "E_EMPTY", None),
    ("byte-order mark only", content(b"\xef\xbb\xbf"), "E_EMPTY", None),
    # D02 one bad line among many
    ("bad line among 5,000", content(GOOD * 5_000 + b"{bad\n" + GOOD), "E_JSON", 5_001),
    ("cut last line", content(GOOD + GOOD[:40]), "E_JSON", 2),
    ("two objects on a line", after_good(b'{"text": "a"} {"text": "b"}'), "E_JSON", 2),
    # D03 encodings
    ("utf-16 le", content(GOOD.decode().encode("utf-16")), "E_UTF8", 1),
    ("utf-16 be", content(b"\xfe\xff" + GOOD.decode().encode("utf-16-be")), "E_UTF8", 1),
    ("utf-16 without mark", content(GOOD.decode().encode("utf-16-le")), "E_UTF8", 1),
    ("utf-32", content(GOOD.decode().encode("utf-32")), "E_UTF8", 1),
    ("latin-1", after_good('{"text": "caf\xe9"}'.encode("latin-1")), "E_UTF8", 2),
    ("latin-1 in an array", content('[\n{"text": "a"},\n{"text":\n"caf\xe9"}]'.encode("latin-1"), "rows.json"), "E_UTF8", 4),
    ("latin-1 in csv", content("text\na\ncaf\xe9\n".encode("latin-1"), "rows.csv"), "E_UTF8", 3),
    ("latin-1 text", content("one\ncaf\xe9\n".encode("latin-1"), "rows.txt"), "E_UTF8", 2),
    ("NUL", after_good(b'{"text": "a\0b"}'), "E_UTF8", 2),
    ("surrogate bytes", after_good(b'{"text": "\xed\xa0\x80"}'), "E_UTF8", 2),
    ("overlong encoding", after_good(b'{"text": "\xc0\xaf"}'), "E_UTF8", 2),
    ("half a surrogate pair", after_good(rb'{"text": "\ud83d oops"}'), "E_UTF8", 2),
    ("half a pair in a key", after_good(rb'{"text": "a", "\udc00": 1}'), "E_UTF8", 2),
    # D04 size and depth
    ("1 GB line", sparse("rows.jsonl", b'{"text": "', 1 << 30), "E_LIMIT", 1),
    ("1 GB line of text", sparse("rows.txt", b"a", 1 << 30), "E_LIMIT", 1),
    ("1 GB cell", sparse("rows.csv", b'text\n"a', 1 << 30), "E_LIMIT", 2),
    ("1 GB element", sparse("rows.json", b'[{"text": "', 1 << 30), "E_LIMIT", 1),
    ("1 GB of blanks", content(b" " * (4 << 20), "rows.json"), "E_LIMIT", 1),
    ("line over the limit", content(b'{"text": "' + b"a" * MAX_ROW_BYTES + b'"}\n'), "E_LIMIT", 1),
    ("unclosed quote", content(b'text\n"' + b"a\n" * 80_000, "rows.csv"), "E_LIMIT", None),
    ("500,000 lists", content(deep(500_000, b"[", b"]")), "E_LIMIT", 1),
    ("200,000 objects, unclosed", content(b'{"a":' * 200_000), "E_LIMIT", 1),
    ("10^6 lists in an array file", content(b"[" * 1_000_000, "rows.json"), "E_LIMIT", 1),
    ("one level too deep", content(deep(MAX_DEPTH, b"[", b"]")), "E_LIMIT", 1),
    ("300,000 empty lists", content(b'{"text": [' + b"[]," * 300_000 + b"1]}"), "E_LIMIT", 1),
    ("half a million zeros", content(b'{"text": [' + b"0," * 500_000 + b"0]}"), "E_LIMIT", 1),
    ("values over the limit", content(b'{"text": [' + b"{}," * MAX_VALUES + b"0]}"), "E_LIMIT", 1),
    ("deep tool arguments", message(tool_calls=[{"function": {"name": "f", "arguments": "[" * 100_000}}]), "E_LIMIT", 1),
    ("wide characters, wrong type", content(('{"messages": "😀' + "a" * 1_000_000 + '"}').encode()), "E_TYPE", 1),
    ("duplicate key", after_good(b'{"text": "a", "text": "b"}'), "E_JSON", 2),
    ("duplicate key inside", after_good(b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}'), "E_JSON", 2),
    ("1e999", after_good(b'{"text": 1e999}'), "E_JSON", 2),
    ("-1e999", after_good(b'{"text": -1e999}'), "E_JSON", 2),
    ("NaN", after_good(b'{"text": NaN}'), "E_JSON", 2),
    ("Infinity", after_good(b'{"text": -Infinity}'), "E_JSON", 2),
    ("900,000 digits", after_good(b'{"text": ' + b"9" * 900_000 + b"}"), "E_JSON", 2),
    ("single quotes", after_good(b"{'text': 'a'}"), "E_JSON", 2),
    ("comment", after_good(b'{"text": "a"} // note'), "E_JSON", 2),
    ("trailing comma", after_good(b'{"text": "a",}'), "E_JSON", 2),
    # D05 wrong shapes
    ("a list as row", after_good(b"[1]"), "E_TYPE", 2),
    ("a number as row", after_good(b"7"), "E_TYPE", 2),
    ("null as row", content(b"null\n"), "E_TYPE", 1),
    ("no known fields", row({"foo": 1}), "E_TYPE", 1),
    ("prompt alone", row({"prompt": "a"}), "E_TYPE", 1),
    ("preference pairs", row({"prompt": "a", "chosen": "b", "rejected": "c"}), "E_TYPE", 1),
    ("mixed formats", after_good(b'{"text": "a"}'), "E_TYPE", 2),
    ("messages null", row({"messages": None}), "E_TYPE", 1),
    ("messages text", row({"messages": "hi"}), "E_TYPE", 1),
    ("messages empty", row({"messages": []}), "E_TYPE", 1),
    ("message a number", row({"messages": [3]}), "E_TYPE", 1),
    ("role missing", message(role="DELETE"), "E_TYPE", 1),
    ("role unknown", message(role="wizard"), "E_TYPE", 1),
    ("role a list", message(role=["user"]), "E_TYPE", 1),
    ("content missing", message(content="DELETE"), "E_TYPE", 1),
    ("content null", message(content=None), "E_TYPE", 1),
    ("content a number", message(content=4), "E_TYPE", 1),
    ("content an object", message(content={"a": 1}), "E_TYPE", 1),
    ("weight 2", message(weight=2), "E_TYPE", 1),
    ("weight true", message(weight=True), "E_TYPE", 1),
    ("weight text", message(weight="1"), "E_TYPE", 1),
    ("weight on a question", message(role="user", weight=1), "E_TYPE", 1),
    ("tool_calls text", message(tool_calls="f()"), "E_TYPE", 1),
    ("tool_calls of a user", message(role="user", tool_calls=[{"function": {"name": "f"}}]), "E_TYPE", 1),
    ("tool call without name", message(tool_calls=[{"function": {"arguments": "{}"}}]), "E_TYPE", 1),
    ("arguments not JSON", message(tool_calls=[{"function": {"name": "f", "arguments": "{a:1}"}}]), "E_JSON", 1),
    ("arguments a list", message(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "E_TYPE", 1),
    ("tools an object", row({"messages": [{"role": "assistant", "content": "x"}], "tools": {"a": 1}}), "E_TYPE", 1),
    ("tools nameless", row({"messages": [{"role": "assistant", "content": "x"}], "tools": [{}]}), "E_TYPE", 1),
    ("sharegpt unknown speaker", row({"conversations": [{"from": "cat", "value": "meow"}]}), "E_TYPE", 1),
    ("sharegpt call not JSON", row({"conversations": [{"from": "function_call", "value": "f()"}]}), "E_JSON", 1),
    ("alpaca output null", row({"instruction": "a", "output": None}), "E_TYPE", 1),
    ("alpaca history", row({"instruction": "a", "output": "b", "history": ["x"]}), "E_TYPE", 1),
    ("text a number", row({"text": 5}), "E_TYPE", 1),
    ("completion an object", row({"prompt": "a", "completion": {"b": 1}}), "E_TYPE", 1),
    ("csv short row", content(b"prompt,completion\na,b\nc\n", "rows.csv"), "E_TYPE", 3),
    ("csv long row", content(b"prompt,completion\na,b,c\n", "rows.csv"), "E_TYPE", 2),
    ("csv same column twice", content(b"text,text\na,b\n", "rows.csv"), "E_TYPE", 1),
    ("csv stray quote", content(b'text\n"a"b\n', "rows.csv"), "E_CSV", 2),
    ("csv quote open at the end", content(b'text\n"a\n', "rows.csv"), "E_CSV", 2),
    # D09 not a data file
    ("missing", lambda folder: folder / "rows.jsonl", "E_PATH", None),
    ("glob without files", lambda folder: folder / "*.jsonl", "E_PATH", None),
    ("NUL in the name", lambda folder: folder / "a\0b.jsonl", "E_PATH", None),
    ("name too long", lambda folder: folder / ("a" * 5000), "E_PATH", None),
    ("folder", lambda folder: folder, "E_PATH", None),
    ("device", lambda folder: Path("/dev/zero"), "E_PATH", None),
    ("FIFO", special(os.mkfifo), "E_PATH", None),
    ("socket", special(_socket), "E_PATH", None),
    ("dangling link", special(lambda path: path.symlink_to("nowhere")), "E_PATH", None),
    ("link to itself", special(lambda path: path.symlink_to(path)), "E_PATH", None),
    ("link to a device", special(lambda path: path.symlink_to("/dev/urandom")), "E_PATH", None),
    ("file as folder", lambda folder: content(GOOD)(folder) / "rows.jsonl", "E_PATH", None),
    ("gzip bomb", content(gzip.compress(b"\0" * (8 << 20)), "rows.jsonl.gz"), "E_TYPE", None),
    ("gzip named jsonl", content(gzip.compress(GOOD)), "E_TYPE", None),
    ("zip", content(b"PK\x03\x04" + b"\0" * 60, "rows.csv"), "E_TYPE", None),
    ("parquet with pickled columns", content(b"PAR1" + b"\x15\x04" * 20 + b"PAR1", "rows.parquet"), "E_TYPE", None),
    ("pickle", content(pickle.dumps([{"text": "a"}], protocol=4), "rows.jsonl"), "E_TYPE", None),
    ("model as data", content(b"GGUF\x03\0\0\0", "rows.jsonl"), "E_TYPE", None),
    ("unknown suffix", content(GOOD, "rows.docx"), "E_TYPE", None),
    # D10 references are never followed
    (
        "image part",
        message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        "E_TYPE",
        1,
    ),
    ("unknown part", message(content=[{"type": "file", "path": "/etc/passwd"}]), "E_TYPE", 1),
]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize(("write", "code", "line"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused_with_one_typed_error(in_folder: Path, write: Write, code: str, line: int | None) -> None:
    path = write(in_folder)
    before = snapshot(in_folder)
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(DataError) as fault:
            read_examples(path)
        spent, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (fault.value.code, fault.value.exit_code) == (code, 2)
    assert line is None or fault.value.line == line
    assert peak <= MEMORY_LIMIT
    assert spent <= SECONDS_LIMIT
    assert snapshot(in_folder) == before
    assert len(str(fault.value)) < 1000 + len(str(path)), "one sentence, not the file"
    assert str(fault.value).isprintable()


def test_ids_are_unique() -> None:
    assert len({case[0] for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "field",
    ["messages[0].role", "messages[0].content", "messages[0].weight", "messages[0].tool_calls[0].function.arguments"],
)
def test_the_field_is_named(tmp_path: Path, field: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "messages[0].role": {"role": None},
        "messages[0].content": {"content": 1},
        "messages[0].weight": {"weight": 3},
        "messages[0].tool_calls[0].function.arguments": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
    }
    with pytest.raises(DataError) as fault:
        read_examples(message(**changes[field])(tmp_path))
    assert fault.value.field == field and f"field `{field}`" in str(fault.value)


def test_in_an_array_the_element_is_named(tmp_path: Path) -> None:
    """One line may hold the whole file."""
    good = json.loads(GOOD)
    bad = {"messages": [{"role": "wizard", "content": "x"}]}
    path = content(json.dumps([good] * 7 + [bad]).encode(), "rows.json")(tmp_path)
    with pytest.raises(DataError) as fault:
        read_examples(path)
    assert (fault.value.line, fault.value.field) == (1, "[7].messages[0].role")
    path.write_text(json.dumps([good] * 3)[:-1] + ", {oops}]")
    with pytest.raises(DataError) as fault:
        read_examples(path)
    assert (fault.value.code, fault.value.field) == ("E_JSON", "[3]")


def test_terminal_escapes_in_a_row_do_not_reach_the_terminal(tmp_path: Path) -> None:
    for value in ({"\x1b[2J": 1}, {"messages": [{"role": "\x1b]0;x\x07", "content": "a"}]}):
        with pytest.raises(DataError) as fault:
            read_examples(row(value)(tmp_path))
        assert str(fault.value).isprintable()


# An audit hook cannot be removed, so one is added for good and listens only while a test asks it to.
_opened: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        _opened.append(str(arguments[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    global _opened
    sys.addaudithook(_hook)
    _opened = []
    yield _opened
    _opened = None


def test_paths_and_urls_in_rows_are_only_text(tmp_path: Path, opened: list[str]) -> None:
    """D10."""
    lure = "see file:///etc/passwd, /etc/hostname, <img src='http://127.0.0.1:9/x'> and {{ include('/etc/passwd') }}"
    value = {"messages": [{"role": "user", "content": lure}, {"role": "assistant", "content": lure}], "image": "/etc/passwd"}
    path = row(value)(tmp_path)
    opened.clear()
    (made,) = read_examples(path)
    assert made.messages[1]["content"] == lure
    assert opened and set(opened) == {str(path)}


def test_a_link_to_a_data_file_is_read(tmp_path: Path) -> None:
    content(GOOD, "real.jsonl")(tmp_path)
    link = tmp_path / "link.jsonl"
    link.symlink_to("real.jsonl")
    assert len(read_examples(link)) == 1


@pytest.mark.parametrize("levels", [1, MAX_DEPTH - 1])
def test_what_is_within_the_limits_is_parsed(levels: int) -> None:
    from nomoat.data.strict_json import parse

    value = parse(deep(levels, b"[", b"]").decode())["text"]
    for _ in range(levels):
        (value,) = value
    assert value == 1
    many = parse('{"text": ["' + '[{,\\"' * 50_000 + '"]}')  # brackets inside text do not count
    assert len(many["text"][0]) == 4 * 50_000
