"""Hyper-parameters out of an untrusted mapping (GGUF metadata or config.json): each value typed, finite and within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nomoat.errors import ModelError, printable
from nomoat.files.gguf import LazyArray

#: Upper limits: a few times the largest published model, low enough that no product of two of them overflows 64 bits.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 17
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_FFN = 1 << 20
MAX_VOCAB = 1 << 22
MAX_CONTEXT = 1 << 26
MAX_EXPERTS = 1024


class Fields:
    """Typed look-ups by key. A JSON null counts as absent.

    Raises ModelError: E_ARCH for an absent key or a value below its range, E_LIMIT above it, E_TYPE for the wrong type,
    E_SHAPE for an array of the wrong length, E_NONFINITE for NaN and infinity. `strict` wants a float where a float belongs
    (GGUF); JSON writes 10000 for 10000.0.
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
        shown = "an array" if isinstance(value, LazyArray) else printable(repr(value))
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ModelError(f"{self.where}: `{printable(self.prefix + key)}` is {shown}, expected {expected}", code=code)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in low..high."""
        if default is not None and not self.has(key):
            return default
        return self._whole(key, self._value(key), low, high)

    def integers(self, key: str, low: int, high: int, length: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """`length` whole numbers in low..high: an array of so many (else E_SHAPE), or one number that stands for all."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if not isinstance(value, list | tuple | LazyArray):
            return (self._whole(key, value, low, high),) * length
        return tuple(self._whole(f"{key}[{i}]", item, low, high) for i, item in enumerate(self._items(key, length)))

    def _whole(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, value, "a whole number", "E_TYPE")
        if not low <= value <= high:
            raise self.fail(key, value, f"a whole number from {low:,} to {high:,}", "E_ARCH" if value < low else "E_LIMIT")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in low..high."""
        if default is not None and not self.has(key):
            return default
        return self._real(key, self._value(key), low, high)

    def numbers(self, key: str, low: float, high: float, length: int) -> tuple[float, ...]:
        """An array of `length` finite numbers in low..high; E_SHAPE for another length."""
        return tuple(self._real(f"{key}[{i}]", item, low, high) for i, item in enumerate(self._items(key, length)))

    def _real(self, key: str, value: object, low: float, high: float) -> float:
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

    def flags(self, key: str, length: int) -> tuple[bool, ...]:
        """An array of `length` booleans; E_SHAPE for another length."""
        items = self._items(key, length)
        for item in items:
            if not isinstance(item, bool):
                raise self.fail(key, item, "true or false for each layer", "E_TYPE")
        return tuple(item is True for item in items)

    def choices(self, key: str, allowed: tuple[str, ...], length: int) -> tuple[str, ...]:
        """An array of `length` strings, each one of `allowed`; E_SHAPE for another length."""
        items = self._items(key, length)
        for item in items:
            if item not in allowed:
                raise self.fail(key, item, " or ".join(allowed), "E_ARCH" if isinstance(item, str) else "E_TYPE")
        return tuple(str(item) for item in items)

    def listed(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """An array of whole numbers in low..high, no more than there are of these; none where it is absent."""
        if not self.has(key):
            return ()
        value = self._value(key)
        if not isinstance(value, list | tuple):
            raise self.fail(key, value, "an array of whole numbers", "E_TYPE")
        found = tuple(self._whole(f"{key}[{i}]", item, low, high) for i, item in enumerate(value[: high - low + 2]))
        if len(found) > high - low + 1:
            raise self.fail(key, f"{len(value):,} values", f"at most {high - low + 1:,}", "E_LIMIT")
        return found

    def is_array(self, key: str) -> bool:
        """Whether the value is an array."""
        return isinstance(self.values.get(self.prefix + key), list | tuple | LazyArray)

    def _items(self, key: str, length: int) -> list[object]:
        value = self._value(key)
        if not isinstance(value, list | tuple | LazyArray):
            raise self.fail(key, value, f"an array of {length:,} values", "E_TYPE")
        if len(value) != length:
            raise self.fail(key, f"{len(value):,} values", f"an array of {length:,} values", "E_SHAPE")
        if isinstance(value, LazyArray):
            found: list[object] = value.numbers().tolist()
            return found
        return list(value)
