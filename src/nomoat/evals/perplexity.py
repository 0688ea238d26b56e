"""Perplexity of a text: exp of the mean negative log-probability per token, under one of two conventions.

`llama.cpp`  the text is cut into windows of `context` tokens; the last partial one is left out. Where the model's tokenizer
             starts texts with BOS, the first token of every window is replaced by it. Only the second half of a window is
             scored, so every scored token has seen at least half a window. Figures compare with `llama-perplexity`.
`strided`    windows start every `stride` tokens and score only what no earlier window has scored: every token but the first
             counts once, after at least `context - stride` others (where the text has that many).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nomoat.data.mask import Example
from nomoat.data.pack import pack
from nomoat.errors import InputError

if TYPE_CHECKING:
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack

CONVENTIONS = ("llama.cpp", "strided")


@dataclass(frozen=True)
class Perplexity:
    """`error` is one standard error of `perplexity`; `tokens` were scored, in `windows` windows of up to `context` tokens."""

    perplexity: float
    error: float
    nats_per_token: float
    tokens: int
    windows: int
    context: int
    convention: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens read (not only those scored) per second."""
        return self.windows * self.context / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Window:
    """`tokens` as the model reads them; those from index `first` on are scored, each from the ones before it."""

    tokens: list[int]
    first: int


def windows(
    tokens: Sequence[int], context: int, convention: str = "llama.cpp", *, stride: int | None = None, bos: int | None = None
) -> Iterator[Window]:
    """Cut a text. `bos` is the token that models of this family expect at the start of a text, None if there is none."""
    if convention == "llama.cpp":
        for begin in range(0, len(tokens) - context + 1, context):
            chunk = list(tokens[begin : begin + context])
            if bos is not None:
                chunk[0] = bos
            yield Window(chunk, context // 2 + 1)
        return
    step, scored = stride or context // 2, 1
    for begin in range(0, len(tokens), step):
        end = min(begin + context, len(tokens))
        if end > scored:
            yield Window(list(tokens[begin:end]), scored - begin)
            scored = end
        if end == len(tokens):
            return


def perplexity(
    model: Model,
    text: str,
    *,
    context: int = 512,
    convention: str = "llama.cpp",
    stride: int | None = None,
    limit: int | None = None,
    stack: Stack | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score `text`, or its first `limit` windows. Raises InputError for a text shorter than one window and for bad sizes."""
    if convention not in CONVENTIONS:
        raise InputError(f"unknown convention {convention!r}: expected {' or '.join(CONVENTIONS)}")
    if not 4 <= context <= model.spec.context:
        raise InputError(f"a window of {context:,} tokens: expected 4 to {model.spec.context:,}, the context of this model")
    if stride is not None and not 1 <= stride < context:
        raise InputError(f"a stride of {stride:,}: expected 1 to {context - 1:,}, less than the window of {context:,} tokens")
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    cut = list(windows(tokens, context, convention, stride=stride, bos=bos))[:limit]
    if not cut:
        raise InputError(
            f"the text has {len(tokens):,} tokens: expected at least one window of {context:,}. "
            "Use a longer text or a smaller --context"
        )
    began, total, squares, count = time.perf_counter(), 0.0, 0.0, 0
    for done, window in enumerate(cut, 1):
        nats = -_score(model, window, stack)
        total, squares, count = total + float(nats.sum()), squares + float((nats * nats).sum()), count + len(nats)
        if progress:
            progress(done, len(cut))
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    value = math.exp(mean)
    return Perplexity(
        perplexity=value,
        error=value * math.sqrt(variance / max(1, count - 1)),
        nats_per_token=mean,
        tokens=count,
        windows=len(cut),
        context=context,
        convention=convention,
        seconds=time.perf_counter() - began,
    )


def _score(model: Model, window: Window, stack: Stack | None) -> npt.NDArray[np.float64]:
    """Log-probabilities of a window's scored tokens, in order."""
    tokens = np.array(window.tokens, np.int32)
    weights = (np.arange(len(tokens)) >= window.first).astype(np.float32)
    (packed,) = pack([Example(tokens, weights)], len(tokens))
    return model.logprobs(packed, stack=stack, precision="int8").astype(np.float64)
