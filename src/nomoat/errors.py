"""Every error that nomoat raises on purpose.

    NomoatError                 exit code 1
    |- InputError               2   what the user gave is wrong
    |  |- FileFormatError           a model, adapter or checkpoint file (has `path`, `offset`)
    |  |- DataError                 a row of a data set (has `path`, `line`, `field`)
    |  |- ModelError                a model that nomoat cannot run (architecture, missing tensor)
    |  |- AdapterError              an adapter that does not fit the base, or is malformed
    |  |- TemplateError             a chat template that fails, or exceeds its limits
    |  `- NotFoundError             a name that resolves to nothing
    |- ResourceError            3   it cannot fit: memory, disk
    |- NetworkError             4   a download failed, or `--offline` forbids it
    |- NonFiniteError           5   NaN or infinity where a number is needed
    `- SandboxError             6   nothing here can hold code that a model wrote: it was not run

`code` is a short stable word for scripts (`E_MAGIC`, `E_TRUNCATED`, ...); the message says what failed,
the value seen, what was expected, and what to do next.
"""

from __future__ import annotations

from pathlib import Path


class NomoatError(Exception):
    """Base of the tree. `code` is stable for scripts; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, *, code: str = "E_INTERNAL") -> None:
        super().__init__(message)
        self.code = code


class InputError(NomoatError):
    """What the user gave is wrong: nothing was written."""

    exit_code = 2

    def __init__(self, message: str, *, code: str = "E_INPUT") -> None:
        super().__init__(message, code=code)


class FileFormatError(InputError):
    """A file that breaks its format. `offset` is the byte where the fault was noticed, if one is known."""

    def __init__(self, message: str, *, code: str, path: Path | str | None = None, offset: int | None = None) -> None:
        where = f"{_printable(str(path))}: " if path is not None else ""
        at = f" (at byte {offset:,})" if offset is not None else ""
        super().__init__(f"{where}{message}{at}", code=code)
        self.path = path
        self.offset = offset


class DataError(InputError):
    """A data set row that cannot be used. `line` counts from 1."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "E_DATA",
        path: Path | str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        where = "" if path is None else f"{_printable(str(path))}{'' if line is None else f':{line}'}: "
        what = "" if field is None else f"field `{_printable(field)}`: "
        super().__init__(f"{where}{what}{message}", code=code)
        self.path = path
        self.line = line
        self.field = field


class ModelError(InputError):
    """A model that nomoat cannot run, with the reason."""

    def __init__(self, message: str, *, code: str = "E_ARCH") -> None:
        super().__init__(message, code=code)


class AdapterError(InputError):
    """An adapter that is malformed or does not fit the base model."""

    def __init__(self, message: str, *, code: str = "E_ADAPTER") -> None:
        super().__init__(message, code=code)


class TemplateError(InputError):
    """A chat template that cannot be compiled, raises, or exceeds its time, step or output limit."""

    def __init__(self, message: str, *, code: str = "E_TEMPLATE") -> None:
        super().__init__(message, code=code)


class NotFoundError(InputError):
    """A model, adapter or file name that resolves to nothing."""

    def __init__(self, message: str, *, code: str = "E_NOT_FOUND") -> None:
        super().__init__(message, code=code)


class ResourceError(NomoatError):
    """It does not fit into memory or onto the disk; the message holds the numbers."""

    exit_code = 3

    def __init__(self, message: str, *, code: str = "E_RESOURCE") -> None:
        super().__init__(message, code=code)


class NetworkError(NomoatError):
    """A download failed, or was forbidden by `--offline`."""

    exit_code = 4

    def __init__(self, message: str, *, code: str = "E_NETWORK") -> None:
        super().__init__(message, code=code)


class NonFiniteError(NomoatError):
    """NaN or infinity in weights, loss or logits."""

    exit_code = 5

    def __init__(self, message: str, *, code: str = "E_NONFINITE") -> None:
        super().__init__(message, code=code)


class SandboxError(NomoatError):
    """Code that a model wrote has to be run, and this machine has no sandbox that keeps its promises. It was not run."""

    exit_code = 6

    def __init__(self, message: str, *, code: str = "E_SANDBOX") -> None:
        super().__init__(message, code=code)


def _printable(text: str) -> str:
    """File-controlled text never reaches the terminal raw (ANSI escapes, newlines)."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


printable = _printable
