"""Hyper-parameters out of an untrusted mapping (GGUF metadata or config.json): each value typed, finite and within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nomoat.errors import ModelError, printable

#: Upper limits: a few times the largest published model, low enough that no product of two of them overflows 64 bits.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 17
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_FFN = 1 << 20
MAX_VOCAB = 1 << 22
MAX_CONTEXT = 1 << 26


class Fields:
    """Typed look-ups by key. A JSON null counts as absent.

    Raises ModelError: E_ARCH for an absent key or a value below its range, E_LIMIT above it, E_TYPE for the wrong type,
    E_NONFINITE for NaN and infinity. `strict` wants a float where a float belongs (GGUF); JSON writes 10000 for 10000.0.
    """

    def __init__(self, values: Mapping[str, object], where: str, *, prefix: str = "", strict: bool = False) -> None:
        self.values = values
        self.where = printable(where)
        self.prefix = prefix
        self.strict = strict

    def has(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def _value(self, key: str) -> object:
        value = self.values.get(self.prefix + key)
        if value is None:
            raise ModelError(
                f"{self.where}: the key `{self.prefix + key}` is missing; "
                "the file is damaged or was made by an incomplete converter"
            )
        return value

    def fail(self, key: str, value: object, expected: str, code: str) -> ModelError:
        """The error for a value: what it is, what was expected."""
        shown = printable(repr(value))
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ModelError(f"{self.where}: `{printable(self.prefix + key)}` is {shown}, expected {expected}", code=code)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in low..high."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, value, "a whole number", "E_TYPE")
        if not low <= value <= high:
            raise self.fail(key, value, f"a whole number from {low:,} to {high:,}", "E_ARCH" if value < low else "E_LIMIT")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in low..high."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, (float,) if self.strict else (float, int)):
            raise self.fail(key, value, "a floating-point number" if self.strict else "a number", "E_TYPE")
        try:
            number = float(value)
        except OverflowError:
            raise self.fail(key, "a huge integer", f"a number from {low:g} to {high:g}", "E_LIMIT") from None
        if not math.isfinite(number):
            raise self.fail(key, number, "a finite number", "E_NONFINITE")
        if not low <= number <= high:
            raise self.fail(key, number, f"a number from {low:g} to {high:g}", "E_LIMIT")
        return number

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if not isinstance(value, str):
            raise self.fail(key, value, "a string", "E_TYPE")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false", "E_TYPE")
        return value
