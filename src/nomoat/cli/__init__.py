"""The `nomoat` command: one module per sub-command, imported on use.

Exit codes are those of the exception tree in `nomoat.errors`; a wrong command line gives 2, Ctrl-C 130 and a
closed pipe 141. With `--json` among the arguments, an error is one JSON object on stderr.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
from collections.abc import Sequence

import click

import nomoat
from nomoat.errors import NomoatError, printable

# name: (module that holds `command`, one line of help). Shown in this order, the order of a user's day.
COMMANDS: dict[str, tuple[str, str]] = {
    "pull": ("nomoat.cli.pull", "Download a model into the store."),
    "models": ("nomoat.cli.models", "List the models on this machine, those of other tools included."),
    "show": ("nomoat.cli.show", "Explain a model: architecture, size, formats, template, licence."),
    "quantize": ("nomoat.cli.quantize", "Write a model as a GGUF of another type."),
    "rm": ("nomoat.cli.rm", "Remove a model from the store."),
    "fit": ("nomoat.cli.fit", "Say whether a model fits this machine, for chat and for training."),
    "train": ("nomoat.cli.train", "Teach a model your task; saves an adapter."),
    "eval": ("nomoat.cli.eval", "Score a model on rows of your own."),
    "run": ("nomoat.cli.run", "Chat with a model, or answer one prompt."),
    "adapters": ("nomoat.cli.adapters", "List, show and remove adapters."),
    "bench": ("nomoat.cli.bench", "Time this machine, and the engine on it."),
}

INTERRUPTED = 128 + 2  # SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE
OUT_OF_RESOURCES = 3  # as nomoat.errors.ResourceError


class ClosedPipeError(Exception):
    """The reader of our output has gone (`nomoat models | head`). Not an OSError, which click would turn into exit code 1."""


class LazyGroup(click.Group):
    """A group whose sub-commands are imported when they are called, not when help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            outcome: object = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise ClosedPipeError from error
        return outcome

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(nomoat.__version__, prog_name="nomoat")
@click.option("--offline", is_flag=True, help="Never open a socket (same as NOMOAT_OFFLINE=1).")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Worker threads (same as NOMOAT_THREADS=N).")
def nomoat_command(offline: bool, threads: int | None) -> None:
    """Teach an open language model your own task on the computer you own.

    \b
    nomoat run smollm2:135m                     chat
    nomoat train smollm2:135m rows.jsonl        learn from examples
    nomoat run smollm2:135m+NAME                chat with what was learned
    """
    if offline:
        os.environ["NOMOAT_OFFLINE"] = "1"
    if threads is not None:
        os.environ["NOMOAT_THREADS"] = str(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises for a fault that a user can cause."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        outcome = nomoat_command.main(args=given, prog_name="nomoat", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0  # a command may return an exit code
    except NomoatError as error:
        return _report(given, error.code, str(error), error.exit_code)
    except click.ClickException as error:
        if not _wants_json(given):
            error.show()
            return error.exit_code
        return _report(given, "E_USAGE", error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except ClosedPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except MemoryError:
        return _report(
            given, "E_RESOURCE", "out of memory; `nomoat fit MODEL` shows what this machine can hold", OUT_OF_RESOURCES
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _report(given, "E_RESOURCE", f"no space left on the disk: {printable(str(error.filename))}", OUT_OF_RESOURCES)


def _wants_json(arguments: Sequence[str]) -> bool:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def _report(arguments: Sequence[str], code: str, message: str, exit_code: int) -> int:
    if _wants_json(arguments):
        click.echo(json.dumps({"error": {"code": code, "message": message, "exit_code": exit_code}}), err=True)
    else:
        click.echo(f"nomoat: {message} [{code}]", err=True)
    return exit_code
