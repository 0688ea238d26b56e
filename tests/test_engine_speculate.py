"""Guessed tokens change the number of steps, never the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_side import adapter_of
from nomoat.engine.speculate import LONGEST, MATCH, PLACES, PromptLookup
from reference import random_lora
from tiny import tiny_llama

pytest.importorskip("nomoat._native")

from nomoat.engine.generate import Sampling, Session, generate, stream
from nomoat.engine.model import Model, Segments
from nomoat.engine.stack import Stack
from nomoat.errors import ModelError

RNG = np.random.default_rng(5)
PATTERN = RNG.integers(3, 271, 7).tolist()
PROMPTS = [PATTERN * 5, RNG.integers(3, 271, 20).tolist(), PATTERN * 3 + [9, 8], [11]]
SAMPLINGS = {
    "greedy": Sampling(max_tokens=60),
    "sampled": Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=3, max_tokens=40),
    "penalized": Sampling(repetition_penalty=1.2, frequency_penalty=0.1, max_tokens=40),
    "stopped": Sampling(max_tokens=60, stop=("th", "e")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(tiny_llama(tmp_path_factory.mktemp("speculate") / "model.gguf", type="Q4_1"), threads=2)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_answers_are_those_without_guesses(model: Model, name: str, max_batch: int) -> None:
    sampling = SAMPLINGS[name]
    stack = Stack(model.spec, [(adapter_of(random_lora(model.spec, rank=4, seed=1)), 1.0)])
    stacks = [None, stack, stack, None]
    plain = [
        generate(model, [p], replace(sampling, speculate=False), stacks=[s])[0] for p, s in zip(PROMPTS, stacks, strict=True)
    ]
    assert generate(model, PROMPTS, sampling, stacks=stacks, max_batch=max_batch) == plain


def test_repetition_takes_fewer_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy tiny model falls into a loop, which is then guessed."""
    steps: list[int] = []
    step = Model.step

    def counted(self: Model, segments: Segments, rows: list[int]) -> object:
        steps.append(sum(len(tokens) for _, tokens, _ in segments))
        return step(self, segments, rows)

    monkeypatch.setattr(Model, "step", counted)
    sampling = Sampling(max_tokens=200)
    counts = {}
    for speculate in (False, True):
        steps.clear()
        generate(model, PROMPTS[:1], replace(sampling, speculate=speculate))
        counts[speculate] = len(steps)
    assert counts[False] == 200
    assert counts[True] < 100


def test_a_conversation_goes_on_from_what_was_said(model: Model) -> None:
    """Nothing that was only guessed stays in the cache of a session."""
    session = Session(model)
    asked = list(PROMPTS[0])
    for _ in range(3):
        pieces = stream(model, asked, SAMPLINGS["greedy"], session=session)
        text = "".join(pieces)
        answer = generate(model, [asked], replace(SAMPLINGS["greedy"], speculate=False))[0]
        assert text == answer.text
        assert session.sequence.tokens == (asked + answer.tokens)[:-1]
        asked = asked + answer.tokens + PATTERN
    session.release()


def test_answers_end_at_their_limit_and_at_the_context(tmp_path: Path) -> None:
    small = Model.load(tiny_llama(tmp_path / "model.gguf", context=64))
    for limit in (1, 2, 5):
        assert len(generate(small, [PATTERN * 4], Sampling(max_tokens=limit))[0].tokens) == limit
    full = generate(small, [PATTERN * 4], Sampling(max_tokens=1000))[0]
    assert full.prompt_tokens + len(full.tokens) <= 64
    assert full == generate(small, [PATTERN * 4], Sampling(max_tokens=1000, speculate=False))[0]


def test_what_followed_last_time_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.guess(10) == [4]
    assert lookup.guess(0) == []
    lookup.extend([4, 5])
    assert lookup.guess(10) == [6, 1, 2]  # five tokens repeat
    assert lookup.guess(2) == [6, 1]
    lookup.extend([9])
    assert lookup.guess(10) == []
    assert PromptLookup(range(MATCH)).guess(10) == PromptLookup([7]).guess(10) == PromptLookup().guess(10) == []


def test_the_longest_match_counts_then_the_latest() -> None:
    lookup = PromptLookup([9, 8, 1, 2, 3, 4, 5, 7, 1, 2, 3, 6, 6, 9, 8, 1, 2, 3])
    assert lookup.guess(10) == [4, 5, 7]
    lookup = PromptLookup([5, 1, 2, 3, 4, 6, 1, 2, 3, 7, 8, 1, 2, 3])
    assert lookup.guess(10) == [7]


def test_fewer_repeated_tokens_give_one_guess_if_that_is_enough() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 2])
    assert lookup.guess(10) == [3]
    assert lookup.guess(10, MATCH) == []
    assert PromptLookup([7, 7]).guess(10) == [7]


def test_guesses_of_a_loop_grow_to_the_longest() -> None:
    lookup = PromptLookup([1, 2, 3] * 20)
    assert lookup.guess(100) == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1][:LONGEST]
    assert PromptLookup([1, 2, 3] * 2).guess(100) == [1]


def test_the_latest_places_are_compared() -> None:
    said = [6, 1, 2, 3, 4, 5]
    for other in range(10, 10 + PLACES - 1):
        said += [other, 1, 2, 3, 7]
    assert PromptLookup([*said, 6, 1, 2, 3]).guess(10) == [4, 5]
    assert PromptLookup([*said, 99, 1, 2, 3, 7, 6, 1, 2, 3]).guess(10) == [7]  # the one place too many


def test_a_single_repeated_token_is_enough_for_an_answer_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()

    def guess(self: PromptLookup, limit: int, least: int = 1) -> list[int]:
        asked.add(least)
        return []

    monkeypatch.setattr(PromptLookup, "guess", guess)
    for prompts, draft, least in ((PROMPTS[:1], None, 1), (PROMPTS[:2], None, MATCH), (PROMPTS[:1], model, MATCH)):
        asked.clear()
        generate(model, prompts, Sampling(max_tokens=5), draft=draft)
        assert asked == {least}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another model of the same vocabulary, with a context that ends before the answers do."""
    return Model.load(tiny_llama(tmp_path_factory.mktemp("draft") / "small.gguf", type="Q8_0", context=48), threads=2)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("max_batch", [1, 3])
def test_a_draft_model_does_not_change_answers(model: Model, small: Model, name: str, max_batch: int) -> None:
    sampling = SAMPLINGS[name]
    plain = generate(model, PROMPTS, replace(sampling, speculate=False))
    for draft in (small, model):  # the model itself guesses right, always
        assert generate(model, PROMPTS, sampling, draft=draft, max_batch=max_batch) == plain
    assert len(small.pool()._free) == small.pool()._made  # no page is lost


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_what_a_draft_model_guesses_right_takes_fewer_steps(model: Model, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same weights as a draft draw the same tokens: every guess is kept, sampled ones too."""
    twin = Model.load(model.path, threads=2)
    steps: list[int] = []
    step = Model.step

    def counted(self: Model, segments: Segments, rows: list[int]) -> object:
        if self is model:
            steps.append(len(segments[0][1]))
        return step(self, segments, rows)

    monkeypatch.setattr(Model, "step", counted)
    monkeypatch.setattr(PromptLookup, "guess", lambda self, limit, least=1: [])
    prompt = PROMPTS[1]
    answer = generate(model, [prompt], SAMPLINGS[name], draft=twin)[0]
    assert len(steps) <= 1 + 1 + len(answer.tokens) // 4
    assert sum(steps) == len(prompt) + len(answer.tokens) - 1  # no row was computed for nothing


def test_a_conversation_keeps_what_its_draft_model_has_seen(model: Model, small: Model) -> None:
    session = Session(model, draft=small)
    asked = list(PROMPTS[1])
    for _ in range(3):
        text = "".join(stream(model, asked, SAMPLINGS["sampled"], session=session))
        answer = generate(model, [asked], replace(SAMPLINGS["sampled"], speculate=False))[0]
        assert text == answer.text
        asked = asked + answer.tokens + [7]
    session.release()
    assert session.draft is not None
    assert session.draft._sequence.pages == []


def test_a_draft_model_of_another_vocabulary_is_refused(model: Model, tmp_path: Path) -> None:
    other = Model.load(tiny_llama(tmp_path / "other.gguf", vocab=300))
    with pytest.raises(ModelError, match="has another vocabulary") as fault:
        generate(model, PROMPTS[:1], SAMPLINGS["greedy"], draft=other)
    assert fault.value.code == "E_TOKENIZER"
