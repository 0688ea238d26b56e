"""Streaming gives the same text as decoding at once, and never half a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomoat.files.gguf import open_gguf
from nomoat.text.stream import StreamDecoder
from nomoat.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["gpt-2", "llama-spm", "starcoder"])
def tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    with open_gguf(shared_data / "llamacpp_vocabs" / f"ggml-vocab-{request.param}.gguf") as file:
        return Tokenizer.from_gguf(file)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_equals_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """For random ids, which are rarely valid UTF-8, against Python's own decoder on all bytes."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 300), max_size=30))
    for skip in (True, False):
        decoder = StreamDecoder(tokenizer, skip_special=skip)
        parts = [decoder.push(i) for i in ids] + [decoder.finish()]
        assert "".join(parts) == tokenizer.decode(ids, skip_special=skip)
    raw = b"".join(tokenizer.token_bytes(i) for i in ids)
    if tokenizer.drops_first_space:
        raw = raw.removeprefix(b" ")
    assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")


def test_a_character_comes_whole(tokenizer: Tokenizer) -> None:
    text = "a🦙é"
    ids = tokenizer.encode(text, add_bos=False)
    assert len(ids) > len(text)
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    assert sum("🦙" in part for part in parts) == 1
    assert decoder.finish() == ""


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦙", add_bos=False)[:-1]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in ids] == [""] * len(ids)
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""
