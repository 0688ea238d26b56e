"""The work that two trainers share, as one file: token ids, loss weights, which rows make each step, and the test prompts.

NumPy only, because both sides' environments import this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """Row i has `tokens[i]` and, for each, the loss weight of predicting it. `batches` are row numbers, one list a step."""

    tokens: list[Ints]
    weights: list[Floats]
    batches: list[list[int]]
    prompts: list[Ints]

    def step_tokens(self, step: int) -> int:
        """Tokens of a step's rows that are not padding."""
        return sum(len(self.tokens[row]) for row in self.batches[step])

    def loss_tokens(self, step: int) -> int:
        return sum(int(np.count_nonzero(self.weights[row])) for row in self.batches[step])

    def save(self, path: Path) -> None:
        lists: dict[str, Sequence[Any]] = {
            "tokens": self.tokens,
            "weights": self.weights,
            "batches": self.batches,
            "prompts": self.prompts,
        }
        arrays: dict[str, Any] = {}
        for name, parts in lists.items():
            kind = np.float32 if name == "weights" else np.int32
            arrays[name] = np.concatenate([np.asarray(part, kind) for part in parts])
            arrays[f"{name}_ends"] = np.cumsum([len(part) for part in parts])
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Plan:
        with np.load(path) as file:
            lists = {
                name: np.split(file[name], file[f"{name}_ends"][:-1]) for name in ("tokens", "weights", "batches", "prompts")
            }
        return cls(lists["tokens"], lists["weights"], [batch.tolist() for batch in lists["batches"]], lists["prompts"])


def padded(tokens: Sequence[Ints], weights: Sequence[Floats], filler: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Rows as rectangles [rows, longest]: token ids; 1 where there is one; the ids where they are learned, else -100."""
    longest = max(map(len, tokens))
    ids = np.full((len(tokens), longest), filler, np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, -100)
    for row, (own, weight) in enumerate(zip(tokens, weights, strict=True)):
        ids[row, : len(own)] = own
        mask[row, : len(own)] = 1
        labels[row, : len(own)] = np.where(weight != 0, own, -100)
    return ids, mask, labels
