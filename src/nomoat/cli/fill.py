"""`nomoat run --fim`: what belongs into the gap of a text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nomoat.cli.conversation import Timing, timed
from nomoat.errors import InputError, printable

if TYPE_CHECKING:
    from nomoat.engine.generate import Sampling
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack

MARKER = "<FILL>"
MAX_BYTES = 16 << 20  # as of a prompt: far more than any context holds


def read_gap(file: str, suffix: str | None) -> tuple[str, str]:
    """The texts before and after the gap. `file`: a path, or "-" for stdin. With `suffix` the whole file comes before the gap,
    else one MARKER says where it is. Raises InputError: not text, too long, no marker or several."""
    name = "stdin" if file == "-" else printable(file)
    with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as source:
        data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: more than {MAX_BYTES >> 20} MiB, expected a text with a gap", code="E_LIMIT")
    try:
        text = data.decode()
    except UnicodeDecodeError as fault:
        raise InputError(f"{name} is not UTF-8 text (byte {fault.start:,})", code="E_UTF8") from None
    if suffix is not None:
        return text, suffix
    parts = text.split(MARKER)
    if len(parts) != 2:
        raise InputError(
            f"{name} has {len(parts) - 1} markers {MARKER}: expected one, where the gap is; or give what follows the gap with"
            " --suffix",
            code="E_MARKER",
        )
    return parts[0], parts[1]


class Filler:
    """Fills gaps with a code model; `timing` is of the last one."""

    def __init__(self, model: Model, sampling: Sampling, *, stack: Stack | None = None, draft: Model | None = None) -> None:
        self.model = model
        self.sampling = sampling
        self.stack = stack
        self.draft = draft
        self.timing = Timing()

    def fill(self, prefix: str, suffix: str) -> Iterator[str]:
        """Stream what belongs between the two texts. Raises ModelError E_FIM if the model was not taught to."""
        from nomoat.engine.generate import Session
        from nomoat.text.fim import fim_prompt

        prompt = fim_prompt(self.model.tokenizer, prefix, suffix)
        fim = self.model.tokenizer.fim
        ends = fim.ends if fim is not None else frozenset()
        self.timing = Timing()
        sampling = replace(self.sampling, stop_tokens=ends, continues=True)
        return timed(Session(self.model, stack=self.stack, draft=self.draft), prompt, sampling, self.timing)
