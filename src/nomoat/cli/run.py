"""`nomoat run`: chat with a model, or answer one prompt."""

from __future__ import annotations

import os
import stat
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from nomoat.cli.memory import kv_type, larger_than_memory, say
from nomoat.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nomoat.cli.conversation import Timing
    from nomoat.engine.kv import KvType
    from nomoat.engine.model import Model

#: Characters read from a pipe: far more than any context holds, and a bound on memory.
MAX_STDIN = 16 << 20


@click.command("run")
@click.argument("model")
@click.argument("prompt", nargs=-1)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--temperature",
    type=click.FloatRange(0.0, 10.0),
    help="0 takes the likeliest token. [default: 0.7; with an adapter 0, as in training and eval; with --fim 0]",
)
@click.option("--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=0.95, show_default=True, help="Nucleus.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Only the K likeliest tokens; 0 = all.")
@click.option("--min-p", type=click.FloatRange(0.0, 1.0), default=0.0, help="Drop tokens below this share of the likeliest.")
@click.option(
    "--repetition-penalty", type=click.FloatRange(0.0, 10.0, min_open=True), default=1.0, help="Above 1: fewer repeats."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Same seed, same answer. [default: a new one each time]")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Longest answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated.")
@click.option("--draft", metavar="MODEL", help="A smaller model of the same vocabulary that guesses ahead; same answers.")
@kv_type
@larger_than_memory
@click.option(
    "--fim",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Fill the gap that <FILL> marks in FILE (- is stdin), and print only that.",
)
@click.option("--suffix", metavar="TEXT", help="With --fim: what follows the gap; FILE is what comes before it.")
@click.option("--stats", is_flag=True, help="Show tokens per second (one prompt: on stderr).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, tokens and timings.")
def command(
    model: str,
    prompt: tuple[str, ...],
    system: str | None,
    temperature: float | None,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    max_tokens: int,
    stop: tuple[str, ...],
    draft: str | None,
    kv_type: KvType,
    larger_than_memory: bool,
    fim: str | None,
    suffix: str | None,
    stats: bool,
    as_json: bool,
) -> None:
    """Chat with MODEL, or answer PROMPT.

    MODEL is a name, a file or a folder, with adapters behind it: smollm2:135m+tickets@0.8+polite.
    Text that is piped in follows PROMPT, or is the prompt.

    \b
    nomoat run smollm2:135m
    nomoat run smollm2:135m "Why is the sky blue?"
    cat letter.txt | nomoat run smollm2:135m "Summarise this letter:"
    nomoat run ./qwen2.5-coder.gguf --fim half_written.py
    """
    began = time.perf_counter()
    gap = _gap(fim, suffix, prompt, system)
    question = _question(prompt) if gap is None else None
    if question is None and gap is None and as_json:
        raise click.UsageError("--json needs a PROMPT or text on stdin")
    from nomoat.adapters.open import open_model
    from nomoat.cli.conversation import Conversation
    from nomoat.cli.fetch import fetch_missing
    from nomoat.cli.fill import Filler
    from nomoat.engine.generate import Sampling

    fetch_missing(model)
    opened, stack = open_model(model, kv_type=kv_type, larger_than_memory=larger_than_memory, tell=say)
    guesser = _draft(draft, kv_type, larger_than_memory)
    if temperature is None:
        temperature = 0.7 if stack is None and gap is None else 0.0
    seed = int.from_bytes(os.urandom(4)) >> 1 if seed is None else seed
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop,
    )
    asked: Conversation | Filler
    if gap is not None:
        asked = Filler(opened, sampling, stack=stack, draft=guesser)
        answer = asked.fill(*gap)
    else:
        asked = Conversation(opened, sampling, stack=stack, draft=guesser, system=system)
        if question is None:
            from nomoat.cli.chat import start
            from nomoat.settings import history_file

            start(asked, f"{model}, context {opened.spec.context:,} tokens", stats=stats, history=history_file())
            return
        answer = asked.ask(question)
    load_seconds = time.perf_counter() - began
    if as_json:
        text = "".join(answer)
        _print_json({"model": model, "text": text, "seed": seed, "load_seconds": round(load_seconds, 4)}, asked.timing)
    else:
        _print_text(answer)
        if stats:
            click.echo(asked.timing.line(), err=True)


def _draft(name: str | None, kv_type: KvType, larger_than_memory: bool) -> Model | None:
    if name is None:
        return None
    from nomoat.adapters.open import open_model
    from nomoat.cli.fetch import fetch_missing

    fetch_missing(name)
    model, stack = open_model(name, kv_type=kv_type, larger_than_memory=larger_than_memory, tell=say)
    if stack is not None:
        raise InputError(f"--draft {name}: a draft model runs without adapters; name the model alone")
    return model


def _gap(fim: str | None, suffix: str | None, prompt: tuple[str, ...], system: str | None) -> tuple[str, str] | None:
    """What stands before and after the gap that is to be filled; None without --fim."""
    if fim is None:
        if suffix is not None:
            raise click.UsageError("--suffix needs --fim FILE")
        return None
    if prompt or system is not None:
        raise click.UsageError("--fim takes all of its text from FILE: it goes with neither PROMPT nor --system")
    from nomoat.cli.fill import read_gap

    return read_gap(fim, suffix)


def _question(prompt: tuple[str, ...]) -> str | None:
    """The prompt from the arguments and what is piped in; None if there is neither, and a person sits at the terminal."""
    words = " ".join(prompt)
    if sys.stdin is None or sys.stdin.isatty():
        return words or None
    # With a PROMPT only pipes and files are read: a service manager's or an editor's open socket would never end.
    if not words or _is_pipe_or_file():
        piped = sys.stdin.buffer.read(MAX_STDIN + 1)
        if len(piped) > MAX_STDIN:
            raise InputError(f"more than {MAX_STDIN >> 20} MiB on stdin: expected a prompt", code="E_LIMIT")
        try:
            text = piped.decode().strip()
        except UnicodeDecodeError as fault:
            raise InputError(f"stdin is not UTF-8 text (byte {fault.start:,})", code="E_UTF8") from None
        words = f"{words}\n\n{text}" if words and text else words or text
    if not words:
        raise InputError('no prompt: stdin is empty. Give one (nomoat run MODEL "Hello") or pipe text in', code="E_EMPTY")
    return words


def _is_pipe_or_file() -> bool:
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _print_text(answer: Iterator[str]) -> None:
    from nomoat.cli.terminal import TerminalText

    shown, last = TerminalText(), "\n"
    for piece in answer:
        text = shown.push(piece)
        sys.stdout.write(text)
        sys.stdout.flush()
        last = text[-1:] or last
    if last != "\n":
        sys.stdout.write("\n")


def _print_json(body: dict[str, Any], timing: Timing) -> None:
    import json

    click.echo(json.dumps(body | timing.as_dict()))  # ASCII: control characters of the answer stay escaped
