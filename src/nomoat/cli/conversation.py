"""A conversation with a model: messages, the prompt made of them, the answer as a stream, and its timings."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from nomoat.errors import InputError

if TYPE_CHECKING:
    from nomoat.engine.generate import Sampling, Session
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack


@dataclass
class Timing:
    """One answer in numbers. Seconds count from the question; `tokens` are new ones, the one that ends the answer included."""

    prompt_tokens: int = 0
    tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    finish_reason: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, whose time is the prompt's."""
        later = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / later if self.tokens > 1 and later > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()} | {
            "tokens_per_second": round(self.tokens_per_second, 1)
        }

    def line(self) -> str:
        """`[42 tokens, 153.1 tokens/s; 31 prompt tokens, first token after 0.08 s]`."""
        return (
            f"[{self.tokens:,} tokens, {self.tokens_per_second:,.1f} tokens/s; "
            f"{self.prompt_tokens:,} prompt tokens, first token after {self.first_token_seconds:.2f} s]"
        )


class Conversation:
    """Keeps what was said. What an earlier turn has in the KV cache is not computed again."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        *,
        stack: Stack | None = None,
        draft: Model | None = None,
        system: str | None = None,
    ) -> None:
        from nomoat.engine.generate import Session

        self.model = model
        self.sampling = sampling
        self.stack = stack
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.timing = Timing()
        self._session = Session(model, stack=stack, draft=draft)
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer to `question`, and remember both, also when the caller stops early (closes the iterator).

        Raises InputError, and forgets the question, if the conversation no longer fits into the model's context.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            prompt = self._prompt()
        except BaseException:
            self.messages.pop()
            raise
        return self._answer(prompt)

    def _prompt(self) -> list[int]:
        from nomoat.data.mask import prompt_tokens

        tokens = prompt_tokens(self.messages, self.model.tokenizer, self.model.template)
        if len(tokens) >= self.model.spec.context:
            raise InputError(
                f"the conversation is {len(tokens):,} tokens and the context of this model {self.model.spec.context:,}: "
                "nothing is cut off silently. Start anew (/clear) or ask something shorter",
                code="E_CONTEXT",
            )
        return tokens

    def _answer(self, prompt: list[int]) -> Iterator[str]:
        room = self.model.spec.context - len(prompt)
        sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))
        self.timing, said = Timing(), []
        try:
            with closing(timed(self._session, prompt, sampling, self.timing)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})


def timed(session: Session, prompt: list[int], sampling: Sampling, timing: Timing) -> Generator[str]:
    """`engine.generate.stream` in `session`; fills `timing`, also when the caller stops early (closes the iterator)."""
    from nomoat.engine.generate import stream

    timing.prompt_tokens, timing.finish_reason = len(prompt), "stopped"
    began = time.perf_counter()
    pieces = stream(session.model, prompt, sampling, stack=session.stack, session=session)
    try:
        while True:
            piece = next(pieces)
            timing.first_token_seconds = timing.first_token_seconds or time.perf_counter() - began
            yield piece
    except StopIteration as end:
        timing.tokens, timing.finish_reason = len(end.value.tokens), end.value.finish_reason
    finally:
        timing.seconds = time.perf_counter() - began
        if timing.finish_reason == "stopped":  # the cache holds every token but the last
            timing.tokens = len(session.sequence.tokens) - len(prompt) + 1
