"""Perplexity: which tokens are scored under each convention, and the arithmetic on a model that is known exactly."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomoat.errors import InputError
from nomoat.evals.perplexity import perplexity, windows
from scripted import BOS, FIRST_BYTE, ByteTokenizer, ScriptedModel


def test_llama_cpp_windows_score_the_second_half_and_start_with_bos() -> None:
    cut = list(windows(range(100, 121), 8, bos=BOS))
    assert [w.tokens for w in cut] == [[BOS, *range(101, 108)], [BOS, *range(109, 116)]]
    # llama.cpp scores n_ctx - n_ctx / 2 - 1 tokens of every window.
    assert {len(w.tokens) - w.first for w in cut} == {8 - 4 - 1}
    assert next(windows(range(100, 108), 8)).tokens == list(range(100, 108))


@given(st.integers(0, 60), st.integers(4, 16), st.data())
def test_strided_windows_score_every_token_but_the_first_exactly_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored: list[int] = []
    for w in windows(range(length), context, "strided", stride=stride):
        assert len(w.tokens) <= context
        assert w.first >= 1
        # Enough context in front, unless the text has no more.
        assert w.first >= min(context - stride, w.tokens[w.first])
        scored += w.tokens[w.first :]
    assert scored == list(range(1, length))


def repeats(previous: int, token: int) -> float:
    """Half the mass on repeating the last byte."""
    return math.log(0.5) if previous == token else math.log(0.5 / 255)


@pytest.mark.parametrize("convention", ["llama.cpp", "strided"])
def test_perplexity_of_a_known_model(convention: str) -> None:
    text = "aaaabbbb" * 40
    result = perplexity(ScriptedModel(logprob=repeats), text, context=32, convention=convention)
    if convention == "strided":
        same = sum(x == y for x, y in itertools.pairwise(text))
        nats = -(same * math.log(0.5) + (len(text) - 1 - same) * math.log(0.5 / 255)) / (len(text) - 1)
        assert result.tokens == len(text) - 1
    else:  # tokens 17 to 31 of every window of 32: positions 1..15 of the 8-periodic text, 3 of 15 follow another byte
        nats = -(12 * math.log(0.5) + 3 * math.log(0.5 / 255)) / 15
        assert (result.tokens, result.windows) == (150, 10)
    assert result.perplexity == pytest.approx(math.exp(nats), rel=1e-5)
    assert result.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert 0 < result.error < result.perplexity


def test_bos_replaces_the_first_token_only_where_the_model_uses_it() -> None:
    seen: list[int] = []

    def note(previous: int, token: int) -> float:
        seen.append(previous)
        return -1.0

    model = ScriptedModel(logprob=note, tokenizer=ByteTokenizer(add_bos=True))
    assert perplexity(model, "x" * 63, context=4).perplexity == pytest.approx(math.e)
    assert set(seen) == {ord("x") + FIRST_BYTE}  # BOS stands at index 0, token 3 is scored from token 2
    assert len(seen) == 16


def test_limit_and_progress() -> None:
    steps: list[tuple[int, int]] = []
    model = ScriptedModel()
    result = perplexity(model, "y" * 100, context=10, limit=3, progress=lambda *step: steps.append(step))
    assert result.windows == 3
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_refusals() -> None:
    model = ScriptedModel(context=64)
    for text, arguments, message in (
        ("short", {"context": 32}, "the text has 5 tokens: expected at least one window of 32"),
        ("x" * 99, {"context": 65}, "expected 4 to 64"),
        ("x" * 99, {"context": 32, "convention": "other"}, "unknown convention"),
        ("x" * 99, {"context": 32, "convention": "strided", "stride": 32}, "expected 1 to 31"),
    ):
        with pytest.raises(InputError, match=message):
            perplexity(model, text, **arguments)
