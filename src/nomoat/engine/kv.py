"""Page tables of the key/value cache. A page holds PAGE_TOKENS positions of every layer; sequences own lists of pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nomoat import _native

PAGE_TOKENS = _native.PAGE_TOKENS

#: What a model keeps keys and values in. int8: 8 bits and one scale for each key and value of a head, half of bf16's memory.
KvType = Literal["bf16", "int8"]
KV_TYPES: tuple[KvType, ...] = ("bf16", "int8")


@dataclass
class Sequence:
    """Tokens whose keys and values are in the cache, and the pages that hold them."""

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class KvPool:
    """Pages shared by sequences; the memory grows with the most pages ever in use."""

    def __init__(self, engine: _native.Engine, type: Literal["bf16", "int8", "f32"] = "bf16") -> None:
        self.native = _native.KvCache(engine, type)
        self._free: list[int] = []
        self._made = 0

    def grow(self, sequence: Sequence, positions: int) -> None:
        """Gives the sequence pages for its first `positions` positions."""
        while len(sequence.pages) * PAGE_TOKENS < positions:
            if not self._free:
                self._free.append(self._made)
                self._made += 1
            sequence.pages.append(self._free.pop())
        self.native.reserve(self._made)

    def cut(self, sequence: Sequence, positions: int) -> None:
        """Forgets everything from `positions` on and gives the pages back."""
        del sequence.tokens[positions:]
        keep = -(-positions // PAGE_TOKENS)
        self._free += sequence.pages[keep:]
        del sequence.pages[keep:]
