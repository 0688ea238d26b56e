"""A row -> token ids with a loss weight for each: only what the model should say is learned.

What may be learned: the text of assistant messages and the token that ends their turn. Instructions, questions, tool
results and the template's own words are context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nomoat.data.conversation import Message
from nomoat.data.readers import Row
from nomoat.data.tool_text import tools_as_text
from nomoat.errors import InputError, TemplateError

if TYPE_CHECKING:
    from nomoat.text.template import ChatTemplate
    from nomoat.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """`weights[t]` is the loss weight of predicting `tokens[t]` from the tokens before it; weights[0] is 0."""

    tokens: npt.NDArray[np.int32]  # [T]
    weights: npt.NDArray[np.float32]  # [T]
    truncated: bool = False


@dataclass(frozen=True)
class Skipped:
    """Why a row gives no example. `reason` is one of a few, for counting; `detail` has the numbers."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


TOO_LONG = "longer than the limit"
TEMPLATE_FAILS = "the chat template cannot write it"
NOTHING_LEARNED = "no token to learn"


def tokenize(
    row: Row,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_tokens: int,
    truncate: bool = False,
    raw: bool = False,
) -> Example | Skipped:
    """One example of at most `max_tokens` tokens, or the reason why there is none.

    `truncate` cuts a longer row at its end instead of skipping it. `raw` joins the contents of the messages without the
    chat template and ends with the end-of-text token; prompt/completion rows of a model without template are read so.
    Raises InputError E_TEMPLATE: the row needs a chat template and the model has none.
    """
    if row.text is not None:
        ids = tokenizer.encode(row.text)
        weights = np.ones(len(ids), np.float32)
    elif raw or (template is None and row.format == "prompt"):
        ids, weights = _plain(tools_as_text(row.messages, row.tools or []), tokenizer)
    else:
        try:
            ids, weights = _rendered(row, tokenizer, _needed(template))
        except TemplateError as fault:  # most templates refuse some order of roles
            return Skipped(TEMPLATE_FAILS, str(fault))
    weights[:1] = 0
    length = len(ids)
    if length > max_tokens and not truncate:
        return Skipped(TOO_LONG, f"{length:,} tokens, limit {max_tokens:,}")
    weights = weights[:max_tokens]
    if not weights.any():
        return Skipped(NOTHING_LEARNED, "no assistant message with text and weight 1 within the limit")
    return Example(np.array(ids[:max_tokens], np.int32), weights, length > max_tokens)


def prompt_tokens(
    messages: list[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """What the model reads before it answers: the same tokens that `tokenize` puts before a last assistant message.

    Without a template the contents are joined, as training on prompt/completion rows did. Raises TemplateError.
    """
    if template is None:
        return _plain(tools_as_text(messages, tools or []), tokenizer)[0]
    messages, tools = _for_template(messages, tools, template)
    return template.encode(tokenizer, [_bare(message) for message in messages], tools=tools)


def _needed(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        message = "this model has no chat template, so it cannot learn from conversations; use prompt and completion rows"
        raise InputError(message, code="E_TEMPLATE")
    return template


def _plain(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], npt.NDArray[np.float32]]:
    """The contents joined; each message is encoded apart, so that a prompt has the same tokens with and without its answer."""
    ids: list[int] = []
    weights: list[float] = []
    for at, message in enumerate(messages):
        piece = tokenizer.encode(message["content"], add_bos=None if at == 0 else False)
        learned = _weight(message)
        if message["role"] == "assistant" and at == len(messages) - 1 and tokenizer.eos_id is not None:
            piece.append(tokenizer.eos_id)
        ids += piece
        weights += [learned] * len(piece)
    return ids, np.array(weights, np.float32)


def _rendered(row: Row, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[list[int], npt.NDArray[np.float32]]:
    messages, tools = _for_template(row.messages, row.tools, template)
    segments = template.segments(tokenizer, [_bare(message) for message in messages], tools=tools)
    learned = [0.0 if part.message is None else _weight(messages[part.message]) for part in segments]
    ids = [token for part in segments for token in part.ids]
    return ids, np.repeat(np.array(learned, np.float32), [len(part.ids) for part in segments])


def _weight(message: Message) -> float:
    return float(message.get("weight", 1)) if message["role"] == "assistant" else 0.0


def _bare(message: Message) -> Message:
    """What the template sees: `weight` is ours."""
    return {key: value for key, value in message.items() if key != "weight"}


def _for_template(
    messages: list[Message], tools: list[dict[str, Any]] | None, template: ChatTemplate
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Tools and calls as text where the template would leave them out without a word."""
    if "tool_calls" in template.source and "tools" in template.source:
        return messages, tools
    if not tools and not any("tool_calls" in message or message["role"] == "tool" for message in messages):
        return messages, tools
    return tools_as_text(messages, tools or []), None
