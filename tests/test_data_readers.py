"""Every known training format arrives as the same rows; faults name their line and field."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nomoat.data.readers import FORMATS, TEXT_BLOCK_CHARACTERS, ReadLog, Row, read_examples, stream_examples
from nomoat.data.source import check_unchanged, file_digest
from nomoat.errors import DataError, InputError

ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def write(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(folder: Path, row: Any, **options: Any) -> Row:
    (made,) = read_examples(write(folder, "rows.jsonl", row), **options)
    return made


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("messages", {"messages": [ASK, ANSWER]}, [ASK, ANSWER]),
        ("prompt", {"prompt": "2+2?", "completion": "4"}, [ASK, ANSWER]),
        ("prompt", {"prompt": [ASK], "completion": [ANSWER]}, [ASK, ANSWER]),
        ("prompt", {"system": "Add.", "prompt": "2+2?", "completion": "4"}, [{"role": "system", "content": "Add."}, ASK, ANSWER]),
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, [ASK, ANSWER]),
        ("alpaca", {"instruction": "2+2?", "input": "", "output": "4"}, [ASK, ANSWER]),
        ("alpaca", {"instruction": "Add", "input": "2+2?", "output": "4"}, [{"role": "user", "content": "Add\n2+2?"}, ANSWER]),
        (
            "alpaca",
            {"instruction": "2+2?", "output": "4", "system": "Add.", "history": [["1+1?", "2"]]},
            [
                {"role": "system", "content": "Add."},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "2"},
                ASK,
                ANSWER,
            ],
        ),
    ],
)
def test_formats_are_recognised_by_their_keys(tmp_path: Path, name: str, row: Any, expected: Any) -> None:
    made = one(tmp_path, row)
    assert (made.messages, made.format, made.text, made.line) == (expected, name, None, 1)


def test_text_rows(tmp_path: Path) -> None:
    made = one(tmp_path, {"text": "once upon a time"})
    assert (made.text, made.messages, made.format) == ("once upon a time", [], "text")


def test_every_format_has_a_reading_test() -> None:
    """A new row of FORMATS must come with a case above."""
    assert set(FORMATS) == {"messages", "prompt", "sharegpt", "alpaca", "text"}


def test_openai_tool_calls_become_objects(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": [2]}'}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    messages = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
        ANSWER,
    ]
    made = one(tmp_path, {"messages": messages, "tools": tools})
    function = {"name": "add", "arguments": {"a": 2, "b": [2]}}
    assert made.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    assert made.messages[2] == {"role": "tool", "content": "4", "tool_call_id": "c1"}
    assert made.tools == tools


def test_sharegpt_function_calls(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ]
    made = one(tmp_path, {"conversations": turns, "system": "Use tools.", "tools": '[{"name": "add"}]'})
    assert [message["role"] for message in made.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert made.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    assert made.tools == [{"type": "function", "function": {"name": "add"}}]


def test_weights_and_content_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    messages = [
        {"role": "developer", "content": "Add."},
        {"role": "user", "content": parts},
        {**ANSWER, "weight": 0},
        ASK,
        ANSWER,
    ]
    made = one(tmp_path, {"messages": messages})
    assert made.messages == [{"role": "system", "content": "Add."}, ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]


def test_answers_inside_a_prompt_are_not_learned(tmp_path: Path) -> None:
    made = one(tmp_path, {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})
    assert [message.get("weight") for message in made.messages] == [None, 0, None, None]


def test_csv_with_map_and_quoted_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer,id\r\n"2+2,\r\nplease?",4,a\r\n\r\n3+3?,"""6""",b\r\n')
    log = ReadLog()
    made = read_examples(path, map={"prompt": "question", "completion": "answer"}, log=log)
    assert [[message["content"] for message in row.messages] for row in made] == [["2+2,\nplease?", "4"], ["3+3?", '"6"']]
    assert [row.line for row in made] == [2, 5]
    assert log.ignored_fields == {"id": 2}


def test_tsv_without_map_is_read_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("prompt\tcompletion\n2+2?\t4\n", encoding="utf-8")
    assert read_examples(path)[0].messages == [ASK, ANSWER]


def test_map_works_on_json_lines(tmp_path: Path) -> None:
    made = one(tmp_path, {"q": "2+2?", "a": "4", "id": 7}, map={"prompt": "q", "completion": "a"})
    assert made.messages == [ASK, ANSWER]


def test_map_refuses_unknown_targets_and_missing_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a field that nomoat reads"):
        one(tmp_path, {"q": "1"}, map={"promt": "q"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field `a`: --map names this field") as fault:
        one(tmp_path, {"q": "1"}, map={"prompt": "q", "completion": "a"})
    assert fault.value.field == "a"


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_json_arrays_give_the_rows_of_json_lines(tmp_path: Path, indent: int | None) -> None:
    rows = [{"prompt": f'say "{i}" \\ [{{', "completion": "é" * i} for i in range(50)]
    array = tmp_path / "rows.json"
    array.write_text("\n " + json.dumps(rows, indent=indent) + "\n", encoding="utf-8")
    lines = read_examples(write(tmp_path, "rows.jsonl", *rows))
    made = read_examples(array)
    assert [row.messages for row in made] == [row.messages for row in lines]
    text = array.read_text(encoding="utf-8").split("\n")
    assert all(indent is None or "{" in text[row.line - 1] for row in made)


def test_array_elements_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nomoat.data import source

    rows = [{"prompt": 'a\\"b\\\\', "completion": "ü]},{"}] * 5
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    whole = read_examples(path)
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(source, "_CHUNK_BYTES", size)
        assert read_examples(path, format="prompt") == whole


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path, "rows.json", {"text": "a"}, {"text": "b"}))) == 2


@pytest.mark.parametrize("text", ["[1 2]", '[{"text":"a"},]', "[,]", '[{"text":"a"}] x', '[{"text":"a"}', '[{"text":"a"]', "[]]"])
def test_broken_arrays_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as fault:
        read_examples(path)
    assert fault.value.code in ("E_JSON", "E_TRUNCATED", "E_TYPE")


def test_plain_text_is_cut_into_blocks_without_losing_a_word(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * (i * 7 % 150) for i in range(60)] + ["x" * 5000, "long line " * 700]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    made = read_examples(path)
    assert all(row.text and len(row.text) <= TEXT_BLOCK_CHARACTERS + 1 for row in made)
    assert "".join("".join(row.text or "" for row in made).split()) == "".join("".join(paragraphs).split())
    assert sum(len(row.text or "") for row in made[:10]) > 5 * TEXT_BLOCK_CHARACTERS
    assert made[0].line == 1 and all(a.line <= b.line for a, b in pairwise(made))


def test_bom_crlf_and_a_last_line_without_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [(row.line, row.text) for row in read_examples(path)] == [(1, "a"), (3, "b")]


def test_skip_bad_counts_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [ASK, ANSWER]})
    path.write_text("\n".join([good, "{oops", good, '{"messages": []}', good]), encoding="utf-8")
    with pytest.raises(DataError) as fault:
        read_examples(path)
    assert (fault.value.line, fault.value.code) == (2, "E_JSON")
    log = ReadLog()
    assert len(read_examples(path, skip_bad=True, log=log)) == 3
    assert (log.rows, log.skipped_rows, [line for line, _ in log.skipped]) == (3, 2, [2, 4])


def test_ignored_fields_are_counted(tmp_path: Path) -> None:
    log = ReadLog()
    one(tmp_path, {"messages": [{**ASK, "wieght": 1}, ANSWER], "id": 3, "source": "x"}, log=log)
    assert log.ignored_fields == {"messages[].wieght": 1, "id": 1, "source": 1}


def test_a_stream_holds_one_row_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", {"text": "a"}, {"text": "b"})
    rows = stream_examples(path)
    assert next(rows).text == "a"
    assert [row.text for row in rows] == ["b"]


def test_the_digest_is_that_of_the_file_and_finds_changes(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.json"):
        path = write(tmp_path, name, {"text": "a"})
        if name.endswith(".json"):
            path.write_text('[{"text": "a"}]  \n')
        log = ReadLog()
        read_examples(path, log=log)
        assert log.sha256 == file_digest(path)
        check_unchanged(path, log.sha256)
        path.write_text('{"text": "b"}')
        with pytest.raises(DataError, match="changed since it was read") as fault:
            check_unchanged(path, log.sha256)
        assert fault.value.code == "E_HASH"


def test_real_files(shared_data: Path) -> None:
    glaive = read_examples(shared_data / "glaive_toolcall/glaive_toolcall_en_demo.json")
    assert len(glaive) == 300 and glaive[0].format == "sharegpt" and glaive[0].tools is not None
    assert sum("tool_calls" in message for row in glaive for message in row.messages) == 211
    gsm8k = read_examples(shared_data / "gsm8k/test.jsonl", map={"prompt": "question", "completion": "answer"})
    assert len(gsm8k) == 1319
    assert len(read_examples(shared_data / "wikisql_mlx/train.jsonl")) == 1000
