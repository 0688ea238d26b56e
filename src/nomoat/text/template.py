"""Chat templates: messages -> the text, and the token ids, that a model was taught to answer.

Templates are jinja2 programs that come out of model files; `sandbox.py` says how they are held. They see a fixed clock
(`strftime_now`), so the same messages always give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nomoat.errors import TemplateError, printable
from nomoat.text.guard import Guard, unused_characters

if TYPE_CHECKING:
    from nomoat.files.gguf import GgufFile
    from nomoat.text.sandbox import Budget
    from nomoat.text.tokenizer import Tokenizer

T = TypeVar("T")
Message = Mapping[str, Any]
CLOCK = datetime(2024, 7, 26)  # the date that Llama 3 templates print when they are given none
_FIXED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a conversation. `message`: index of the assistant message that they are the answer of, or None."""

    ids: list[int]
    message: int | None


class ChatTemplate:
    """A compiled template. Raises TemplateError if it does not compile, is too long, or reads other templates.

    `clock` is what `strftime_now` shows; a rendering may take `seconds`. Several threads may use one object.
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", clock: datetime = CLOCK, seconds: float = 1.0
    ) -> None:
        from nomoat.text.sandbox import MAX_SOURCE, Environment

        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source):,} characters: expected at most {MAX_SOURCE:,}", code="E_LIMIT"
            )
        if "\0" in source:
            raise TemplateError("the chat template has a NUL character")
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._seconds = seconds
        environment = Environment()
        environment.globals["strftime_now"] = _strftime(clock)
        self._template = _guarded(lambda: environment.from_string(source), "does not compile")
        self._marks_answers = environment.has_generation

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text. `variables` reach the template (`enable_thinking=False`).

        Raises TemplateError: malformed messages, an error in the template (also one that it raises itself), limits exceeded.
        """
        return self._render(messages, tools, add_generation_prompt, variables)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The conversation as token ids. Control tokens come from the template only: control strings inside messages, tools and
        variables are encoded as plain text. BOS is added only by the template."""
        (mark,) = unused_characters(1, self.source, messages, tools, variables)
        guard = Guard(tokenizer.added.control_strings, mark)
        text = self._render(guard(messages), guard(tools), add_generation_prompt, guard(variables), guard=mark)
        return tokenizer.encode(text, parse_special=True, add_bos=False, guard=mark)

    def segments(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[Segment]:
        """The whole conversation, without generation prompt, cut where an answer of the model begins and ends.

        An answer ends after its end-of-turn token. Its tokens are computed apart from the prompt's, so that training sees what
        inference will: `encode(messages[:i])`, then the answer. Where the answers are is what `{% generation %}` blocks in the
        template say; without them, what the template adds when message i follows a prompt made of the messages before it.
        Raises TemplateError E_PREFIX if the template does not render a conversation as an extension of its beginning.
        """
        _check_messages(messages)
        answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        mark, opening, closing = unused_characters(3, self.source, messages, tools, variables)
        guard = Guard(tokenizer.added.control_strings, mark)
        safe, safe_tools, safe_variables = guard(messages), guard(tools), guard(variables)

        @cache
        def text(count: int, prompt: bool, marks: tuple[str, str] = ("", "")) -> str:
            return self._render(safe[:count], safe_tools, prompt, safe_variables, marks=marks, guard=mark)

        cuts = None
        if self._marks_answers:
            full, cuts = _marked_cuts(text(len(safe), False, (opening, closing)), opening, closing, answers)
        if cuts is None:
            full = text(len(safe), False)
            ends = [tokenizer.token_text(i) for i in tokenizer.eos_ids if tokenizer.is_special(i)]
            cuts = [_answer_cut(full, i, text, ends) for i in answers]
        return _cut_segments(tokenizer, full, cuts, mark)

    def spans(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """(ids, mask) of the whole conversation; mask[t] is True where the model should say ids[t]. See `segments`."""
        parts = self.segments(tokenizer, messages, tools=tools, **variables)
        ids = [i for part in parts for i in part.ids]
        return ids, [part.message is not None for part in parts for _ in part.ids]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        *,
        marks: tuple[str, str] = ("", ""),
        guard: str = "",
    ) -> str:
        from nomoat.text.sandbox import Budget, check_size

        _check_messages(messages)
        for name in variables:
            if name in _FIXED:
                raise TemplateError(f"`{name}` cannot be passed as a template variable", code="E_TYPE")
        context = dict(variables)
        context.update(messages=list(messages), tools=list(tools) if tools else None, add_generation_prompt=add_generation_prompt)
        check_size(context)
        context.update(bos_token=self.bos_token, eos_token=self.eos_token)
        return _guarded(lambda: self._run(context, Budget(marks=marks, guard=guard, seconds=self._seconds)), "fails")

    def _run(self, context: dict[str, Any], budget: Budget) -> str:
        from nomoat.text.sandbox import MAX_SIZE, restore, spend

        token = spend(budget)
        try:
            chunks, size = [], 0
            for chunk in self._template.root_render_func(self._template.new_context(context)):
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_SIZE:
                    raise TemplateError(f"the chat template writes more than {MAX_SIZE:,} characters", code="E_BUDGET")
            return "".join(chunks)
        finally:
            restore(token)


def template_for(source: GgufFile | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a GGUF file (`tokenizer.chat_template`) or a Hugging Face folder (chat_template.jinja, else
    tokenizer_config.json); None if it has none. Raises TemplateError, FileFormatError."""
    from nomoat.text.tokenizer_json import template_source

    if isinstance(source, Path):
        text = template_source(source)
    else:
        text = source.get_str("tokenizer.chat_template", default="") or None
    if text is None:
        return None
    bos = tokenizer.token_text(tokenizer.bos_id) if tokenizer.bos_id is not None else ""
    eos = tokenizer.token_text(tokenizer.eos_id) if tokenizer.eos_id is not None else ""
    return ChatTemplate(text, bos_token=bos, eos_token=eos)


def _marked_cuts(marked: str, opening: str, closing: str, answers: list[int]) -> tuple[str, list[tuple[int, int, int]] | None]:
    """The text without marks, and (begin, end, message) of every answer; None if the blocks are not one for each answer."""
    parts = marked.replace(closing, opening).split(opening)
    text = "".join(parts)
    if len(parts) != 2 * len(answers) + 1:
        return text, None
    cuts, at = [], 0
    for before, answer, message in zip(parts[0::2], parts[1::2], answers, strict=False):
        at += len(before)
        cuts.append((at, at + len(answer), message))
        at += len(answer)
    return text, cuts


def _answer_cut(full: str, i: int, text: Callable[[int, bool], str], ends: list[str]) -> tuple[int, int, int]:
    """(begin, end, message) of assistant message `i`: what follows the generation prompt, up to its last end-of-turn string."""
    prompt, until = text(i, True), text(i + 1, False)
    for part, what in ((prompt, f"the prompt before message {i}"), (until, f"the conversation up to message {i}")):
        if not full.startswith(part):
            at = next((k for k, (a, b) in enumerate(zip(part, full, strict=False)) if a != b), min(len(part), len(full)))
            raise TemplateError(
                f"this chat template writes {what} differently when more follows (first difference at character {at:,}:"
                f" `{printable(part[at : at + 30])}` became `{printable(full[at : at + 30])}`), so the answer cannot be told from"
                " the prompt; use a template with {% generation %} blocks, or train on conversations with one answer",
                code="E_PREFIX",
            )
    if len(until) < len(prompt):
        raise TemplateError(
            f"this chat template writes nothing for assistant message {i} after its generation prompt", code="E_PREFIX"
        )
    answer = full[len(prompt) : len(until)]
    closed = max((answer.rfind(end) + len(end) for end in ends if end in answer), default=len(answer))
    return len(prompt), len(prompt) + closed, i


def _cut_segments(tokenizer: Tokenizer, text: str, cuts: list[tuple[int, int, int]], mark: str) -> list[Segment]:
    segments, at = [], 0
    pieces: list[tuple[int, int, int | None]] = []
    for begin, end, message in cuts:
        pieces += [(at, begin, None), (begin, end, message)]
        at = end
    for begin, end, answer in [*pieces, (at, len(text), None)]:
        if begin < end:
            ids = tokenizer.encode(text[begin:end], parse_special=True, add_bos=False, continues=begin > 0, guard=mark)
            segments.append(Segment(ids, answer))
    return segments


def _check_messages(messages: Sequence[Message]) -> None:
    """Raises TemplateError E_TYPE with the path of the first field that no template could use."""
    if not isinstance(messages, (list, tuple)):
        raise TemplateError(f"messages: expected a list, not {type(messages).__name__}", code="E_TYPE")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(f"messages[{i}]: expected an object, not {type(message).__name__}", code="E_TYPE")
        if not isinstance(message.get("role"), str):
            raise TemplateError(f"messages[{i}].role: expected a text, not {type(message.get('role')).__name__}", code="E_TYPE")
        if not isinstance(message.get("content", ""), (str, list, type(None))):
            kind = type(message["content"]).__name__
            raise TemplateError(f"messages[{i}].content: expected a text or a list of parts, not {kind}", code="E_TYPE")


def _guarded(work: Callable[[], T], what: str) -> T:
    """`work()`; whatever a template can make it raise becomes a TemplateError."""
    try:
        return work()
    except TemplateError as error:
        raise TemplateError(printable(str(error)), code=error.code) from None
    except RecursionError:
        raise TemplateError(f"the chat template {what}: it is nested too deeply", code="E_BUDGET") from None
    except MemoryError:
        raise TemplateError(f"the chat template {what}: out of memory", code="E_BUDGET") from None
    except Exception as error:  # a template can raise anything: TypeError, KeyError, jinja2's own
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        detail = printable(str(error)[:500])
        raise TemplateError(f"the chat template {what}{where}: {type(error).__name__}: {detail}") from None


def _strftime(clock: datetime) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        if not isinstance(format, str) or len(format) > 64:
            raise TemplateError("strftime_now: expected a format of at most 64 characters", code="E_BUDGET")
        return clock.strftime(format)

    return strftime_now
