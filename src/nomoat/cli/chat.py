"""The interactive chat of `nomoat run`: line editing, history, several-line input, commands; Ctrl-C stops only the answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from nomoat.cli.conversation import Conversation
from nomoat.cli.terminal import TerminalText, plain
from nomoat.errors import InputError, NomoatError

HISTORY_LINES = 1000
PROMPT, MORE = ">>> ", "... "


class Leave(Exception):
    """The user wants out."""


class Chat:
    """Reads lines with `read(prompt)` (as `input`: EOFError ends the chat) and writes to `out`."""

    def __init__(self, conversation: Conversation, *, read: Callable[[str], str], out: TextIO, stats: bool = False) -> None:
        self.conversation = conversation
        self.read = read
        self.out = out
        self.stats = stats

    def loop(self) -> None:
        """Until Ctrl-D or /exit."""
        while True:
            try:
                text = self.read_message()
                if text.startswith("/"):
                    self.command(text)
                elif text.strip():
                    self.answer(text.strip())
            except EOFError:  # Ctrl-D leaves the cursor behind the prompt
                return self.say("")
            except Leave:
                return
            except KeyboardInterrupt:
                self.say("\n(Ctrl-D or /exit leaves)")
            except NomoatError as error:
                self.say(str(error))

    def read_message(self) -> str:
        '''One message: a line, or lines that end in a backslash, or everything between two """.'''
        line = self.read(PROMPT)
        if line.lstrip().startswith('"""'):
            text = line.lstrip()[3:]
            while '"""' not in text:
                text += "\n" + self.read(MORE)
            # A space in front: a block is always a message, whatever it starts with.
            return " " + text[: text.index('"""')].strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.read(MORE)
        return line

    def answer(self, question: str) -> None:
        """Stream the answer; Ctrl-C stops it and keeps what was said so far."""
        pieces, shown = self.conversation.ask(question), TerminalText()
        with contextlib.closing(pieces), ctrl_c_as_flag() as stopped:  # type: ignore[type-var]
            for piece in pieces:
                self.out.write(shown.push(piece))
                self.out.flush()
                if stopped():
                    break
        timing = self.conversation.timing
        if timing.finish_reason != "stop":
            limit = f"the limit of {timing.tokens:,} tokens is reached; --max-tokens N raises it"
            self.out.write(f"\n[{limit if timing.finish_reason == 'length' else 'stopped'}]")
        self.say("")
        if self.stats:
            self.say(timing.line())

    def command(self, text: str) -> None:
        """Run a slash-command; what is not one is never sent to the model."""
        name, _, argument = text.partition(" ")
        if name not in COMMANDS:
            known = " ".join(COMMANDS)
            raise InputError(f"unknown command {plain(name)}: expected one of {known} (a space in front sends the line as text)")
        COMMANDS[name][0](self, argument.strip())

    def say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()

    def _help(self, _argument: str) -> None:
        for name, (_, meaning) in COMMANDS.items():
            self.say(f"  {name:<9} {meaning}")
        self.say('\n  """ starts and ends a message of several lines; a line that ends in \\ goes on in the next.')
        self.say("  Ctrl-C stops an answer, Ctrl-D leaves.")

    def _clear(self, _argument: str) -> None:
        self.conversation.clear()
        self.say("Forgotten; the system message stays." if self.conversation.system else "Forgotten.")

    def _system(self, argument: str) -> None:
        if not argument:
            self.say(f"System message: {plain(self.conversation.system or '(none)')}")
            return
        self.conversation.system = None if argument == "none" else argument
        self.conversation.clear()
        self.say(f"Starting anew with{'' if self.conversation.system else 'out a'} system message.")

    def _stats(self, _argument: str) -> None:
        self.stats = not self.stats
        if self.stats and self.conversation.timing.tokens:
            self.say(self.conversation.timing.line())
        self.say(f"Speed after every answer: {'on' if self.stats else 'off'}.")

    def _save(self, argument: str) -> None:
        if not argument:
            raise InputError("/save needs a file name: it adds this conversation to that file, as `nomoat train` reads it")
        if not any(m["role"] == "assistant" for m in self.conversation.messages):
            raise InputError("nothing to save yet: the conversation has no answer")
        line = json.dumps({"messages": self.conversation.messages}, ensure_ascii=False) + "\n"
        path = Path(argument).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as fault:
            raise InputError(f"cannot write {plain(str(path))}: {fault.strerror}") from None
        self.say(f"Added to {plain(str(path))}.")

    def _exit(self, _argument: str) -> None:
        raise Leave


COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str]] = {
    "/help": (Chat._help, "show this"),
    "/clear": (Chat._clear, "forget the conversation"),
    "/system": (Chat._system, "TEXT: set the system message and start anew; `none` removes it; without TEXT show it"),
    "/stats": (Chat._stats, "tokens per second after every answer, on or off"),
    "/save": (Chat._save, "FILE: add the conversation to a .jsonl file, as training data"),
    "/exit": (Chat._exit, "leave (also Ctrl-D)"),
}


@contextlib.contextmanager
def ctrl_c_as_flag() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only sets a flag, so that the engine finishes the token it works on; the second interrupts."""
    pressed = False

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def start(conversation: Conversation, title: str, *, stats: bool, history: Path) -> None:
    """Chat on the terminal, with line editing where Python has it and a history file that only its owner can read."""
    with _line_editing(history):
        chat = Chat(conversation, read=input, out=sys.stdout, stats=stats)
        chat.say(f"{title}. /help shows commands, Ctrl-D leaves.")
        chat.loop()


@contextlib.contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer(_complete)
    readline.set_completer_delims("")
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a chat must not end in an error because its history cannot be kept
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(history)


def _complete(text: str, state: int) -> str | None:
    matches = [name for name in COMMANDS if text.startswith("/") and name.startswith(text)]
    return matches[state] if state < len(matches) else None
