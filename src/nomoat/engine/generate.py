"""Generation: many prompts at once, or one as a stream. Greedy output does not depend on what runs beside it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from nomoat import _native
from nomoat.engine.kv import Sequence
from nomoat.engine.model import FORWARD_ROWS, Float32, Model
from nomoat.engine.speculate import MATCH, Draft, PromptLookup
from nomoat.engine.stack import Stack
from nomoat.errors import InputError, NonFiniteError
from nomoat.text.stream import StreamDecoder

Finish = Literal["stop", "length"]

#: Rows of a decode step up to which guesses are added: beyond it, a row costs about what it can win.
SPECULATIVE_ROWS = 13


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: penalties, then top_k, min_p, top_p, then temperature. Raises InputError E_LIMIT.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and the neutral penalties switch those off. The penalties look at the
    answer so far. `stop` strings end the answer and are not part of it; `stop_tokens` end it besides the model's own. An answer
    that `continues` the text of the prompt keeps a space at its beginning, also in models that put one before any text.
    `speculate` changes the speed, never the answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    speculate: bool = True
    stop_tokens: frozenset[int] = frozenset()
    continues: bool = False

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature, 0.0, 100.0),
            "top_k": (self.top_k, 0, 1 << 31),
            "top_p": (self.top_p, 0.0, 1.0),
            "min_p": (self.min_p, 0.0, 1.0),
            "repetition_penalty": (self.repetition_penalty, 0.01, 100.0),
            "presence_penalty": (self.presence_penalty, -100.0, 100.0),
            "frequency_penalty": (self.frequency_penalty, -100.0, 100.0),
            "seed": (self.seed, 0, (1 << 64) - 1),
            "max_tokens": (self.max_tokens, 1, 1 << 31),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:  # also refuses NaN
                raise InputError(f"{name} is {value}; expected {low} to {high}", code="E_LIMIT")
        if any(not text for text in self.stop):
            raise InputError("a stop string is empty; it would end every answer at once", code="E_LIMIT")

    def native(self) -> _native.Sampling:
        """The same as the engine takes it."""
        return _native.Sampling(
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.seed,
        )


def choose_tokens(options: SequenceOf[_native.Sampling], logits: Float32, said: SequenceOf[SequenceOf[int]]) -> list[int]:
    """A token for each row of logits [n, vocab]: what follows `said`, an answer so far.

    A draw depends on the seed and its place only, never on what else is in the batch. A logit that is NaN or infinite is chosen
    before all others, so that looking at that of the token is enough to see one.
    """
    seen = [own if option.penalizes else () for option, own in zip(options, said, strict=True)]
    return _native.sample(logits, options, seen, [len(own) for own in said])


def choose_token(options: _native.Sampling, logits: Float32, said: SequenceOf[int]) -> int:
    """The same for one row, logits [vocab]."""
    return choose_tokens([options], logits[None], [said])[0]


@dataclass(frozen=True)
class Completion:
    """`text` is what a person sees; `tokens` are all that were generated, the end token included."""

    tokens: list[int]
    text: str
    finish_reason: Finish
    prompt_tokens: int


@dataclass
class _Answer:
    """One answer while it is being written."""

    model: Model
    prompt: list[int]
    sampling: Sampling
    stack: Stack | None
    draft: Draft | None = None
    sequence: Sequence = field(default_factory=Sequence)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    given: int = 0  # characters of `text` that were handed out
    finish: Finish | None = None

    def __post_init__(self) -> None:
        room = self.model.spec.context - len(self.prompt)
        if not self.prompt:
            raise InputError("the prompt has no tokens", code="E_EMPTY")
        if room < 1:
            raise InputError(
                f"the prompt has {len(self.prompt):,} tokens; the model's context of {self.model.spec.context:,} leaves no room "
                "for an answer",
                code="E_LIMIT",
            )
        self.limit = min(self.sampling.max_tokens, room)
        self.options = self.sampling.native()
        self.decoder = StreamDecoder(self.model.tokenizer, continues=self.sampling.continues)
        self.lookup: PromptLookup | None = None  # made when there is room for a first guess
        if not self.sampling.speculate:
            self.draft = None
        self.drafted = False  # whether the draft model made the latest guesses

    def pending(self) -> list[int]:
        """Tokens that the model has not seen yet."""
        said = len(self.sequence.tokens) - len(self.prompt)
        return self.tokens[said:] if said >= 0 else self.prompt[said:] + self.tokens

    def guess(self, rows: int, *, alone: bool) -> list[int]:
        """At most `rows` tokens that may follow, none that could not be part of the answer.

        An answer that is written `alone` has a second row almost for nothing, so that little has to speak for a guess; not
        where the row may need experts of its own.
        """
        self.drafted = False
        rows = min(rows, self.limit - len(self.tokens) - 1)
        if not self.sampling.speculate or not self.tokens or rows <= 0:
            return []
        if self.lookup is None:
            self.lookup = PromptLookup(self.prompt + self.tokens)
        cheap = alone and self.draft is None and not self.model.spec.experts_used
        guessed = self.lookup.guess(rows, 1 if cheap else MATCH)
        if not guessed and self.draft is not None:  # what repeats costs nothing to guess, a model costs its steps
            self.drafted = True
            choose = functools.partial(choose_token, self.options)
            guessed = self.draft.guess(self.prompt, self.tokens, rows, choose)
        return guessed

    def take_all(self, tokens: list[int], logits: Float32, guessed: list[int]) -> None:
        """Takes the token chosen from each row of logits for as long as the row before it had the right input."""
        for right, token in enumerate(tokens):
            if not math.isfinite(logits[right, token]):
                raise NonFiniteError("the model's logits are NaN or infinite")
            self.take(token)
            if self.finish is not None or right == len(guessed) or token != guessed[right]:
                break
        if self.lookup is not None:
            self.lookup.extend(self.tokens[-right - 1 :])
        if self.draft is not None and self.drafted and guessed:
            self.draft.judged(len(guessed), right)

    def take(self, token: int) -> None:
        """Takes the next token and decides whether the answer ends."""
        self.tokens.append(token)
        if token in self.model.tokenizer.eos_ids or token in self.sampling.stop_tokens:
            self.finish = "stop"
        else:
            self._extend(self.decoder.push(token))
            if self.finish is None and len(self.tokens) >= self.limit:
                self.finish = "length"
        if self.finish is not None:
            self._extend(self.decoder.finish())

    def _extend(self, piece: str) -> None:
        begin = max(0, len(self.text) - max(map(len, self.sampling.stop), default=0))
        self.text += piece
        found = [at for at in (self.text.find(stop, begin) for stop in self.sampling.stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish = "stop"

    def give(self) -> str:
        """New text that can no longer become part of a stop string."""
        end = len(self.text)
        if self.finish is None:
            for stop in self.sampling.stop:
                for length in range(min(len(stop) - 1, len(self.text)), 0, -1):
                    if self.text.endswith(stop[:length]):
                        end = min(end, len(self.text) - length)
                        break
        piece = self.text[self.given : end]
        self.given = max(self.given, end)
        return piece

    def release(self) -> None:
        """Gives the cache pages back, and what guesses were made from."""
        self.model.pool().cut(self.sequence, 0)
        self.lookup = None
        if self.draft is not None:
            self.draft.release()

    def completion(self) -> Completion:
        return Completion(self.tokens, self.text, self.finish or "length", len(self.prompt))


def generate(
    model: Model,
    prompts: SequenceOf[SequenceOf[int]],
    sampling: Sampling | SequenceOf[Sampling],
    *,
    stacks: SequenceOf[Stack | None] | None = None,
    draft: Model | None = None,
    max_batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Answers every prompt; up to `max_batch` are in flight, each with its own adapters. `progress(done, total)`.

    `sampling` is one for all, or one for each prompt: with the same seed, places in different answers draw the same number.
    `draft` is a smaller model of the same vocabulary that guesses tokens; it changes the speed, never the answers.
    Raises InputError for an empty prompt or one that fills the context, ModelError for a draft of another vocabulary,
    NonFiniteError for a model that computes NaN.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    answers = [
        _Answer(model, list(prompt), each, stack, Draft(draft, model) if draft is not None else None)
        for prompt, each, stack in zip(prompts, samplings, stacks or [None] * len(prompts), strict=True)
    ]
    waiting = iter(answers)
    active: list[_Answer] = []
    done = 0
    try:
        while True:
            active += itertools.islice(waiting, max(1, max_batch) - len(active))
            if not active:
                return [answer.completion() for answer in answers]
            _step(model, active)
            for answer in [answer for answer in active if answer.finish is not None]:
                active.remove(answer)
                answer.release()
                done += 1
                if progress:
                    progress(done, len(answers))
    finally:
        for answer in active:
            answer.release()


def _step(model: Model, active: list[_Answer]) -> None:
    """One forward pass: a row for every answer that is being written, and prompt rows of others up to FORWARD_ROWS.

    An answer that is being written also gets rows for the tokens that are guessed to follow.
    """
    segments: list[tuple[_Answer, list[int], list[int]]] = []  # the answer, its tokens, the guesses behind them
    budget, spare = FORWARD_ROWS, max(0, SPECULATIVE_ROWS - len(active)) // len(active)
    for answer in sorted(active, key=lambda a: len(a.pending())):
        tokens = answer.pending()[: max(budget, 0)]
        if tokens:
            guessed = answer.guess(min(spare, budget - len(tokens)), alone=len(active) == 1)
            segments.append((answer, tokens, guessed))
            budget -= len(tokens) + len(guessed)
    # one adapter's rows side by side: its products are taken together
    segments.sort(key=lambda segment: id(segment[0].stack))
    rows: list[int] = []
    ready: list[tuple[_Answer, list[int]]] = []
    end = 0
    for answer, tokens, guessed in segments:
        end += len(tokens) + len(guessed)
        if len(answer.sequence.tokens) + len(tokens) == len(answer.prompt) + len(answer.tokens):
            rows += range(end - len(guessed) - 1, end)
            ready.append((answer, guessed))
    logits = model.step([(answer.sequence, tokens + guessed, answer.stack) for answer, tokens, guessed in segments], rows)
    # The guesses are right, or what is chosen behind them is not used.
    inputs = [(answer, answer.tokens + guessed[:i]) for answer, guessed in ready for i in range(len(guessed) + 1)]
    tokens = choose_tokens([answer.options for answer, _ in inputs], logits, [said for _, said in inputs])
    begin = 0
    for answer, guessed in ready:
        end = begin + len(guessed) + 1
        answer.take_all(tokens[begin:end], logits[begin:end], guessed)
        begin = end
        model.pool().cut(answer.sequence, min(len(answer.sequence.tokens), len(answer.prompt) + len(answer.tokens) - 1))


class Session:
    """Keys and values kept between the turns of one conversation. Release it when the conversation is over."""

    def __init__(self, model: Model, *, stack: Stack | None = None, draft: Model | None = None) -> None:
        self.model, self.stack = model, stack
        self.sequence = Sequence()
        self.draft = Draft(draft, model) if draft is not None else None

    def release(self) -> None:
        """Gives the cache pages back."""
        self.model.pool().cut(self.sequence, 0)
        if self.draft is not None:
            self.draft.release()


def stream(
    model: Model,
    prompt: SequenceOf[int],
    sampling: Sampling,
    *,
    stack: Stack | None = None,
    session: Session | None = None,
) -> Generator[str, None, Completion]:
    """Yields the answer piece by piece, whole characters only. A session's common prefix is not computed again.

    The generator's return value is the Completion. Raises as `generate` does.
    """
    answer = _Answer(model, list(prompt), sampling, stack, session.draft if session is not None else None)
    pool = model.pool()
    if session is not None:
        if session.stack is not stack:
            raise InputError("the session belongs to another adapter stack; start a new one")
        answer.sequence = session.sequence
        known = session.sequence.tokens
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(known, answer.prompt, strict=False)))
        pool.cut(session.sequence, min(common, len(answer.prompt) - 1))
    try:
        while answer.finish is None:
            _step(model, [answer])
            piece = answer.give()
            if piece:
                yield piece
    finally:
        if session is None:
            pool.cut(answer.sequence, 0)
    return answer.completion()
