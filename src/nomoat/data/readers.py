"""Data files of every form people have -> rows of messages, or of plain text.

The container follows the file name (.jsonl .ndjson .json .csv .tsv .txt), the format follows the keys of the first row:

    messages     {"messages": [{"role", "content", "weight"?, "tool_calls"?, ...}], "tools"?}      OpenAI
    prompt       {"prompt", "completion", "system"?}    text, or lists of messages                  OpenAI legacy, TRL, MLX
    sharegpt     {"conversations": [{"from", "value"}], "system"?, "tools"?}                        LLaMA-Factory, Axolotl
    alpaca       {"instruction", "input"?, "output", "system"?, "history"?}
    text         {"text"}; or a .txt file, cut into blocks

`map` renames first: {"prompt": "question"} reads the column `question` as `prompt`. Every row of a file has the format
of its first row. Paths and URLs inside rows are text like any other: nothing is opened.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from nomoat.data import source
from nomoat.data.conversation import Message, Place, openai_messages, sharegpt_messages, text_of, tool_list
from nomoat.errors import DataError, InputError, printable

TEXT_BLOCK_CHARACTERS = 2_000  # of a .txt file: about 500 tokens
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """One example. `messages` in the form that chat templates take (tool arguments as objects, `weight` 0 or 1 on an
    assistant message that must not or must be learned), or, where `text` is not None, plain text."""

    messages: list[Message]
    line: int
    format: str
    tools: list[dict[str, Any]] | None = None
    text: str | None = None


@dataclass
class ReadLog:
    """What a reader noticed. `skipped` holds at most KEEP examples of (line, message); `skipped_rows` counts all."""

    KEEP = 20
    format: str = ""
    rows: int = 0
    skipped_rows: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    sha256: str = ""

    def skip(self, line: int, reason: str) -> None:
        self.skipped_rows += 1
        if len(self.skipped) < self.KEEP:
            self.skipped.append((line, reason))


def read_examples(
    path: Path | str,
    *,
    map: Mapping[str, str] | None = None,
    format: str | None = None,
    skip_bad: bool = False,
    log: ReadLog | None = None,
) -> list[Row]:
    """All rows of a file, which is checked to its end before the first row is kept: a bad last line costs no memory.

    `map` renames fields (target -> source), `format` names one of FORMATS instead of detecting it, `skip_bad` leaves
    out rows that are not usable and counts them in `log`.
    Raises DataError (E_PATH, E_TYPE, E_UTF8, E_JSON, E_LIMIT, E_EMPTY, ...) with the line and field.
    """
    for _ in stream_examples(path, map=map, format=format, skip_bad=skip_bad):
        pass
    return list(stream_examples(path, map=map, format=format, skip_bad=skip_bad, log=log))


def stream_examples(
    path: Path | str,
    *,
    map: Mapping[str, str] | None = None,
    format: str | None = None,
    skip_bad: bool = False,
    log: ReadLog | None = None,
) -> Iterator[Row]:
    """`read_examples` one row at a time, in constant memory. `log` is complete when the iterator ends."""
    path = Path(path)
    log = ReadLog() if log is None else log
    rename = dict(map or {})
    if format is not None and format not in FORMATS:
        raise InputError(f"unknown data format {printable(format)!r}; known: {', '.join(FORMATS)}")
    unknown = sorted(set(rename) - _KNOWN_FIELDS)
    if unknown:
        known = ", ".join(sorted(_KNOWN_FIELDS))
        raise InputError(f"--map {printable(unknown[0])}=...: not a field that nomoat reads; known: {known}")
    digest = hashlib.sha256()
    log.format = format or ""
    with source.open_data(path) as file:
        for place, value in _values(file, path, digest, rename, skip_bad, log):
            try:
                row = _row(value, place, log)
            except DataError as fault:
                if not skip_bad:
                    raise
                log.skip(place.line, str(fault))
                continue
            log.rows += 1
            yield row
    log.sha256 = digest.hexdigest()
    if not log.rows:
        left_out = f" ({log.skipped_rows:,} bad rows left out)" if log.skipped_rows else ""
        raise DataError(f"no rows in this file{left_out}; expected at least one example", code="E_EMPTY", path=path)


Fields = dict[str, Any]


def _values(
    file: BinaryIO, path: Path, digest: source.Digest, rename: Fields, skip_bad: bool, log: ReadLog
) -> Iterator[tuple[Place, Any]]:
    """(where it stands, value that should be an object) of each row, whatever the container."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        log.format = "text"
        yield from ((Place(path, line), {"text": block}) for line, block in _text_blocks(source.lines(file, path, digest)))
    elif suffix in _DELIMITERS:
        for line, record in _csv_records(file, path, digest, _DELIMITERS[suffix], skip_bad, log):
            place = Place(path, line)
            yield place, _renamed(record, rename, place, log)
    elif suffix in _JSON_SUFFIXES or log.format:
        array = source.starts_array(file)
        for at, (line, text) in enumerate((source.array_elements if array else source.lines)(file, path, digest)):
            if not text.strip():
                continue  # a blank line
            place = Place(path, line, at if array else None)
            try:
                yield place, _renamed(place.parse(text), rename, place, log)
            except DataError as fault:
                if not skip_bad:
                    raise
                log.skip(line, str(fault))
    else:
        known = ", ".join([*_JSON_SUFFIXES, *_DELIMITERS, ".txt"])
        message = f"cannot tell the format of a {printable(suffix) or 'nameless'} file; known: {known}"
        raise DataError(message, code="E_TYPE", path=path)


def _renamed(value: Any, rename: Mapping[str, str], place: Place, log: ReadLog) -> Any:
    """The fields that `map` names, under their new names."""
    if not rename or not isinstance(value, dict):
        return value
    for wanted in rename.values():
        if wanted not in value:
            found = ", ".join(printable(str(key)[:40]) for key in list(value)[:20])
            raise place.fault(f"--map names this field, but the row has only: {found}", field=wanted)
    log.ignored_fields.update(key for key in value if key not in rename.values())
    return {target: value[wanted] for target, wanted in rename.items()}


def _row(value: Any, place: Place, log: ReadLog) -> Row:
    if not isinstance(value, dict):
        raise place.fault(f"this row is {_kind(value)}; expected an object", code="E_TYPE")
    log.format = log.format or _detect(value, place)
    layout = FORMATS[log.format]
    for key in layout.required:
        if key not in value:
            found = ", ".join(printable(str(key)[:40]) for key in list(value)[:20]) or "nothing"
            raise place.fault(f"missing, but every `{log.format}` row needs it; this row has: {found}", field=key)
    log.ignored_fields.update(key for key in value if key not in layout.required and key not in layout.optional)
    return layout.read(value, place, log)


def _detect(fields: Fields, place: Place) -> str:
    for name, layout in FORMATS.items():
        if all(key in fields for key in layout.required):
            return name
    found = ", ".join(printable(str(key)[:40]) for key in list(fields)[:20]) or "none"
    if {"chosen", "preferred_output"} & fields.keys():
        raise place.fault(f"preference pairs (fields: {found}); supervised training needs one answer a row, as in `messages`")
    known = "; ".join("+".join(layout.required) for layout in FORMATS.values())
    hint = "Name the columns with --map prompt=COLUMN --map completion=COLUMN"
    raise place.fault(f"no known format has the fields: {found}. Known: {known}. {hint}")


def _text_blocks(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Whole lines up to TEXT_BLOCK_CHARACTERS, cut early at a blank line once half full; longer lines at a space."""
    block: list[str] = []
    first = size = 0
    for number, line in lines:
        for piece in _cut(line):
            full = size + len(piece) > TEXT_BLOCK_CHARACTERS or (size > TEXT_BLOCK_CHARACTERS // 2 and not line.strip())
            if full and block:
                yield first, "\n".join(block)
                block, size = [], 0
            if block or piece.strip():  # a block starts with text
                first = first if block else number
                block.append(piece)
                size += len(piece) + 1
    if block:
        yield first, "\n".join(block).rstrip()


def _cut(line: str) -> Iterator[str]:
    begin = 0
    while len(line) - begin > TEXT_BLOCK_CHARACTERS:
        end = line.rfind(" ", begin + 1, begin + TEXT_BLOCK_CHARACTERS)
        end = begin + TEXT_BLOCK_CHARACTERS if end < 0 else end
        yield line[begin:end]
        begin = end + (line[end] == " ")
    yield line[begin:]


def _csv_records(
    file: BinaryIO, path: Path, digest: source.Digest, delimiter: str, skip_bad: bool, log: ReadLog
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows under the header line. A cell may hold line ends; it is limited to csv.field_size_limit() characters."""
    reader = csv.reader((text + "\n" for _, text in source.lines(file, path, digest)), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:  # the reader cannot go on: where the record ends is unknown
            code = "E_LIMIT" if "limit" in str(fault) else "E_CSV"
            raise DataError(f"not valid CSV: {fault}", code=code, path=path, line=line) from None
        if not any(cell.strip() for cell in cells):
            continue  # a blank line
        if not header:
            header = [cell.strip() for cell in cells]
            if len(set(header)) != len(header):
                raise DataError("two columns have the same name", code="E_TYPE", path=path, line=line)
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        else:
            ragged = DataError(f"{len(cells)} cells under {len(header)} columns", code="E_TYPE", path=path, line=line)
            if not skip_bad:
                raise ragged
            log.skip(line, str(ragged))


def _from_messages(fields: Fields, place: Place, log: ReadLog) -> Row:
    messages = openai_messages(fields["messages"], place, log.ignored_fields)
    return Row(messages, place.line, "messages", tools=tool_list(fields.get("tools"), place))


def _from_prompt(fields: Fields, place: Place, log: ReadLog) -> Row:
    sides: list[list[Message]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(fields[key], list):
            sides.append(openai_messages(fields[key], place, log.ignored_fields, key))
        else:
            sides.append([{"role": role, "content": text_of(fields[key], place, key)}])
    for message in sides[0]:  # an answer inside the prompt is context
        if message["role"] == "assistant":
            message["weight"] = 0
    system = _system(fields, place)
    return Row(system + sides[0] + sides[1], place.line, "prompt", tools=tool_list(fields.get("tools"), place))


def _from_sharegpt(fields: Fields, place: Place, log: ReadLog) -> Row:
    messages = sharegpt_messages(fields["conversations"], place, log.ignored_fields)
    return Row(_system(fields, place) + messages, place.line, "sharegpt", tools=tool_list(fields.get("tools"), place))


def _from_alpaca(fields: Fields, place: Place, log: ReadLog) -> Row:
    messages = _system(fields, place)
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise place.fault(f"{_kind(history)}; expected a list of [question, answer] pairs", field="history")
    for at, turn in enumerate(history):
        where = f"history[{at}]"
        if not isinstance(turn, list) or len(turn) != 2:
            raise place.fault("expected a [question, answer] pair", field=where)
        messages.append({"role": "user", "content": text_of(turn[0], place, where)})
        messages.append({"role": "assistant", "content": text_of(turn[1], place, where)})
    instruction = text_of(fields["instruction"], place, "instruction")
    context = text_of(fields.get("input") or "", place, "input")
    messages.append({"role": "user", "content": f"{instruction}\n{context}" if context else instruction})
    messages.append({"role": "assistant", "content": text_of(fields["output"], place, "output")})
    return Row(messages, place.line, "alpaca")


def _from_text(fields: Fields, place: Place, log: ReadLog) -> Row:
    return Row([], place.line, "text", text=text_of(fields["text"], place, "text"))


def _system(fields: Fields, place: Place) -> list[Message]:
    system = text_of(fields.get("system") or "", place, "system")
    return [{"role": "system", "content": system}] if system else []


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


@dataclass(frozen=True)
class Format:
    """A row format: the keys it is known by, the keys it may have, and its reader."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields, Place, ReadLog], Row]


# In the order of detection: a row may have `text` beside the keys of another format.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("tools", "parallel_tool_calls"), _from_messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), _from_sharegpt),
    "prompt": Format(("prompt", "completion"), ("system", "tools"), _from_prompt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _from_alpaca),
    "text": Format(("text",), (), _from_text),
}
_KNOWN_FIELDS = {key for layout in FORMATS.values() for key in layout.required + layout.optional}
