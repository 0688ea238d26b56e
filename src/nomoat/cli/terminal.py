"""What a model says is shown as text: it cannot colour, move, clear or retitle the terminal."""

from __future__ import annotations

_ESCAPE = "\x1b"
_CSI = "\x9b"
_STRINGS = "\x90\x98\x9d\x9e\x9f"  # DCS SOS OSC PM APC: run until BEL or ST
_STRINGS_7BIT = "PX]^_"  # the same after ESC
#: Controls (C0 but newline and tab, DEL, C1) and the two bidirectional overrides, which make text read as another text.
_DROPPED = frozenset(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x202D, 0x202E])) - {"\n", "\t"}
_LONGEST = 256  # an unfinished sequence swallows at most so many characters


class TerminalText:
    """Removes escape sequences and control characters from text that comes in pieces; a sequence may be split anywhere.

    A newline ends every sequence, so hostile output can hide no more than the rest of its own line.
    """

    def __init__(self) -> None:
        self._state = "text"
        self._held = 0

    def push(self, text: str) -> str:
        """The part of `text` that may be shown."""
        if self._state == "text" and text.isprintable():
            return text
        return "".join(c for c in text if self._shown(c))

    def _shown(self, c: str) -> bool:
        if self._state == "text":
            self._state = _enter(c)
            self._held = 0
            return c not in _DROPPED
        self._held += 1
        if c == "\n" or self._held > _LONGEST:
            self._state = "text"
            return c == "\n"
        if self._state == "escape":
            self._state = "csi" if c == "[" else "string" if c in _STRINGS_7BIT else "escape" if " " <= c <= "/" else "text"
        elif self._state == "csi":
            if "@" <= c <= "~":
                self._state = "text"
        elif c in "\x07\x9c" or (self._state == "string_end" and c == "\\"):
            self._state = "text"
        else:
            self._state = "string_end" if c == _ESCAPE else "string"
        return False


def _enter(c: str) -> str:
    """State after `c` was seen in plain text."""
    if c == _ESCAPE:
        return "escape"
    if c == _CSI:
        return "csi"
    return "string" if c in _STRINGS else "text"


def plain(text: str) -> str:
    """`text` as a terminal may show it."""
    return TerminalText().push(text)
