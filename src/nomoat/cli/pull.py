"""`nomoat pull`: fetch a model into the store."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from nomoat.hub.fetch import Progress

PLAIN_SECONDS = 3.0  # between two lines of progress where there is no terminal


@click.command("pull")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with name, path and size.")
def command(model: str, as_json: bool) -> None:
    """Fetch MODEL into the store, or check the copy that is there.

    MODEL is a name of the catalogue or of a hub: smollm2:135m, hf:org/repo, hf:org/repo/file.gguf. A broken
    download goes on where it stopped.
    """
    from nomoat.errors import printable
    from nomoat.hub.pull import pull

    with progress_display() as (progress, tell):
        path = pull(model, progress=progress, tell=tell)
    size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    if as_json:
        click.echo(json.dumps({"name": model, "path": str(path), "bytes": size}))
        return
    click.echo(f"{printable(model)} is ready: {printable(str(path))}")
    click.echo(f"Next: nomoat run {printable(model)}")


@contextlib.contextmanager
def progress_display() -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """(progress, tell) on stderr: a bar on a terminal, else a line every few seconds."""

    def tell(text: str) -> None:
        click.echo(text, err=True)

    if not sys.stderr.isatty():
        yield _plain(tell), tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield progress, tell


def _plain(tell: Callable[[str], None]) -> Progress:
    """A line when a download starts, every PLAIN_SECONDS, and when it ends."""
    last: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in last or now - last[what] >= PLAIN_SECONDS or (done >= total and last[what] < float("inf")):
            last[what] = float("inf") if done >= total else now
            tell(f"{what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

    return progress
