"""Where the events of a run go: a live line on a terminal, a plain line now and then elsewhere, JSON lines for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from nomoat.errors import printable

if TYPE_CHECKING:
    from rich.live import Live

Event = dict[str, Any]

PLAIN_SECONDS = 10.0


class JsonLines:
    """Every event as one line of JSON on `stream`, at once."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, event: Event) -> None:
        self.stream.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.flush()


class Lines:
    """Sentences for a person; steps as a line every ten seconds, or as one live line on a terminal."""

    def __init__(self, stream: TextIO, *, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.wanted_live = live
        self.live: Live | None = None
        self.validation: float | None = None
        self.told = clock()

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "validation":
            self.validation = event["loss"]
        if kind == "scoring" and self.wanted_live:
            self._show(f"{event['when']}: {event['done']}/{event['total']} rows")
            return
        if kind in ("step", "validation"):
            self._progress(event)
            return
        text = sentence(event)
        if text is not None:
            self._print(text)

    def _progress(self, event: Event) -> None:
        done = event["step"] == event["steps"]
        if event["event"] == "step":
            line = progress_line(event, self.validation)
            if self.wanted_live:
                self._show(line)
            elif self.clock() - self.told >= PLAIN_SECONDS or event["step"] == 1 or done:
                self.told = self.clock()
                self._print(line)
        elif not self.wanted_live:
            self._print(sentence(event) or "")
        if done and event["event"] == "validation":
            self.close()

    def _show(self, line: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        if self.live is None:
            self.live = Live(console=Console(file=self.stream), refresh_per_second=8, transient=False)
            self.live.start()
        self.live.update(Text(line))

    def _print(self, text: str) -> None:
        self.close()
        self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Leaves the live line as it is and gives the terminal back."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def progress_line(event: Event, validation: float | None) -> str:
    """`step 40/188  loss 0.812  validation 0.790  1,204 tokens/s  1:52 left  480 MB`."""
    parts = [f"step {event['step']}/{event['steps']}", f"loss {_loss(event['loss'])}"]
    if validation is not None:
        parts.append(f"validation {_loss(validation)}")
    parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event.get("eta_seconds") is not None:
        parts.append(f"{duration(event['eta_seconds'])} left")
    if event.get("memory_mb") is not None:
        parts.append(f"{event['memory_mb']:,.0f} MB")
    return "  ".join(parts)


def sentence(event: Event) -> str | None:
    """What a person reads for an event; None for events that are only for programs."""
    match event["event"]:
        case "inspected" | "plan" | "note":
            return str(event["text"])
        case "before" | "after":
            return f"{event['event']}: {event['text']}"
        case "learning_rate":
            return f"learning rate {event['learning_rate']:g} ({event['reason']})"
        case "probe":
            return (
                f"  learning rate {event['learning_rate']:g}: validation loss {_loss(event['loss'])} after {event['steps']} steps"
            )
        case "validation":
            return f"step {event['step']}/{event['steps']}  validation loss {_loss(event['loss'])}"
        case "skipped":
            return (
                f"step {event['step']}: not applied, its loss ({_loss(event['loss'])}) or gradient "
                f"({_loss(event['gradient_norm'])}) is not finite or far too large"
            )
        case "resumed":
            return f"going on from step {event['step']}"
        case "checkpoint_failed":
            return f"step {event['step']}: the checkpoint could not be written ({printable(event['error'])}); trying again later"
        case "interrupted":
            return f"stopped at step {event['step']}; the same command with --resume goes on from there"
        case _:
            return None


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_display(as_json: bool) -> JsonLines | Lines:
    """JSON on stdout, or lines for people on stdout; the live line only where stdout is a terminal."""
    return JsonLines(sys.stdout) if as_json else Lines(sys.stdout, live=sys.stdout.isatty())
