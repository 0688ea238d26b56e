"""Examples -> micro-batches without padding.

A Pack is a flat run of tokens cut into segments, one an example. Attention stays inside a segment, so an example gives
the same result wherever it is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nomoat.errors import InputError

if TYPE_CHECKING:
    from nomoat.data.mask import Example

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pack:
    """M rows in S segments. Row m is the token at a position; it predicts `targets[m]`, the next token of its example.

    Rows behind the last target that carries loss are left out: attention looks back only, so they change nothing.
    """

    tokens: I32  # [M]
    starts: I32  # [S + 1] row where each segment begins; the last entry is M
    targets: I32  # [M] next token of the same example
    weights: F32  # [M] loss weight of that target
    examples: tuple[int, ...]  # [S] index of each segment's example

    @property
    def rows(self) -> int:
        return len(self.tokens)


def useful_rows(example: Example) -> int:
    """Rows of an example that the loss depends on: up to the one that predicts its last weighted token."""
    weighted = np.flatnonzero(example.weights)
    return int(weighted[-1]) if len(weighted) else 0


def pack(examples: Sequence[Example], max_tokens: int, *, order: Sequence[int] | None = None) -> list[Pack]:
    """Whole examples, in `order` (indices; default as given), put together while they fit into `max_tokens` rows.

    An example longer than `max_tokens` gets a pack of its own. Raises InputError E_LIMIT (max_tokens < 1) and E_EMPTY
    (an example without weighted tokens, whose mean loss would be 0/0).
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens = {max_tokens}; expected at least 1", code="E_LIMIT")
    made: list[Pack] = []
    group: list[int] = []
    rows = 0
    for index in range(len(examples)) if order is None else order:
        length = useful_rows(examples[index])
        if length == 0:
            raise InputError(f"example {index} has no token to learn; leave it out before packing", code="E_EMPTY")
        if group and rows + length > max_tokens:
            made.append(_join(examples, group))
            group, rows = [], 0
        group.append(int(index))
        rows += length
    if group:
        made.append(_join(examples, group))
    return made


def _join(examples: Sequence[Example], group: list[int]) -> Pack:
    lengths = [useful_rows(examples[index]) for index in group]
    pairs = [(examples[index], length) for index, length in zip(group, lengths, strict=True)]
    return Pack(
        tokens=np.concatenate([example.tokens[:length] for example, length in pairs]).astype(np.int32),
        starts=np.cumsum([0, *lengths], dtype=np.int32),
        targets=np.concatenate([example.tokens[1 : length + 1] for example, length in pairs]).astype(np.int32),
        weights=np.concatenate([example.weights[1 : length + 1] for example, length in pairs]).astype(np.float32),
        examples=tuple(group),
    )


def shuffled_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of range(count) that depends on (seed, epoch) only.

    Sorts PCG64's raw words, whose stream numpy guarantees; `Generator.permutation` may change between its versions.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(words, kind="stable")


def batches(examples: Sequence[Example], batch_sequences: int, max_tokens: int, seed: int, epoch: int) -> list[list[Pack]]:
    """One epoch: optimizer steps of `batch_sequences` examples (the last may have fewer), each a list of packs.

    Raises InputError E_LIMIT for a batch size, seed or epoch out of range.
    """
    if batch_sequences < 1:
        raise InputError(f"batch size {batch_sequences}; expected at least 1 example a step", code="E_LIMIT")
    if seed < 0 or epoch < 0:
        raise InputError(f"seed {seed}, epoch {epoch}; expected whole numbers from 0", code="E_LIMIT")
    order = shuffled_order(len(examples), seed, epoch).tolist()
    return [
        pack(examples, max_tokens, order=order[begin : begin + batch_sequences])
        for begin in range(0, len(order), batch_sequences)
    ]
