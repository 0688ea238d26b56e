"""A model whose answers are written down: for tests of what surrounds the engine."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from nomoat.engine.generate import Completion, Sampling
from nomoat.text.fim import Fim
from nomoat.text.template import ChatTemplate

BOS, EOS = 1, 2
FIRST_BYTE = 3  # token of byte b is b + FIRST_BYTE
END = "<end>"


class ByteTokenizer:
    """One token per byte, and one that ends an answer."""

    vocab_size = 256 + FIRST_BYTE
    bos_id = BOS
    eos_id = EOS
    eos_ids = frozenset({EOS})
    added = types.SimpleNamespace(control_strings=(END,))

    def __init__(self, *, add_bos: bool = False, fim: Fim | None = None) -> None:
        self.add_bos = add_bos
        self.fim = fim

    def encode(
        self, text: str, *, parse_special: bool = False, add_bos: bool | None = None, guard: str = "", **_: Any
    ) -> list[int]:
        ids = [BOS] if (self.add_bos if add_bos is None else add_bos) else []
        for at, part in enumerate(text.split(END) if parse_special else [text]):
            ids += [EOS] * (at > 0) + [b + FIRST_BYTE for b in part.replace(guard, "").encode()]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        return END if token == EOS else self.decode([token])

    def is_special(self, token: int) -> bool:
        return token < FIRST_BYTE


#: `role: content` lines; answers end with the ending token.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


if TYPE_CHECKING:

    class _Stand(Any):  # type: ignore[misc]
        """For the type checker, a scripted model stands in wherever a Model is wanted."""
else:
    _Stand = object


@dataclass
class ScriptedModel(_Stand):
    """`answer(prompt)` gives the answer, whole or in pieces; `logprob(previous token, token)` is what `logprobs` returns."""

    answer: Callable[[str], Iterable[str]] = lambda prompt: ""
    logprob: Callable[[int, int], float] = lambda previous, token: -1.0
    context: int = 4096
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    template: ChatTemplate | None = field(default_factory=lambda: ChatTemplate(TEMPLATE))
    prompts: list[str] = field(default_factory=list)

    @property
    def spec(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(context=self.context, vocab=self.tokenizer.vocab_size)

    def logprobs(self, pack: Any, *, stack: Any = None, precision: str = "int8") -> npt.NDArray[np.float32]:
        rows = np.flatnonzero(pack.weights)
        return np.array([self.logprob(int(pack.tokens[r]), int(pack.targets[r])) for r in rows], np.float32)


class Session:
    def __init__(self, model: ScriptedModel, *, stack: Any = None, draft: Any = None) -> None:
        self.model, self.stack, self.draft = model, stack, draft
        self.sequence = types.SimpleNamespace(tokens=[])


def generate(
    model: ScriptedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    stacks: Sequence[Any] | None = None,
    max_batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    done = []
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    for prompt, each in zip(prompts, samplings, strict=True):
        pieces = stream(model, prompt, each)
        try:
            while True:
                next(pieces)
        except StopIteration as end:
            done.append(end.value)
        if progress:
            progress(len(done), len(prompts))
    return done


def stream(
    model: ScriptedModel, prompt: Sequence[int], sampling: Sampling, *, stack: Any = None, session: Session | None = None
) -> Generator[str, None, Completion]:
    """The scripted answer, a byte-token at a time where the script is ASCII."""
    asked = model.tokenizer.decode(prompt)
    model.prompts.append(asked)
    text = ""
    for piece in itertools.islice(model.answer(asked), sampling.max_tokens):
        text += piece
        if session is not None:
            session.sequence.tokens = [*prompt, *model.tokenizer.encode(text, add_bos=False)[:-1]]
        yield piece
    return Completion(
        model.tokenizer.encode(text, add_bos=False), text, "length" if len(text) >= sampling.max_tokens else "stop", len(prompt)
    )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the scripted generation in place of the engine's."""
    for made in (Session, generate, stream):
        monkeypatch.setattr(f"nomoat.engine.generate.{made.__name__}", made)
