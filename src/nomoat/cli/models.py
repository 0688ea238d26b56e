"""`nomoat models`: what is on this machine, in nomoat's store and in those of other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import click


@dataclass(frozen=True)
class Line:
    """One model. `path` is None where it is not on this machine; `problem` says why it cannot be used."""

    name: str
    origin: str
    bytes: int
    path: str | None
    licence: str
    problem: str


@click.command("models")
@click.option("--verify", is_flag=True, help="Read every file of the store and compare it with its digest.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, one object a model.")
def command(verify: bool, as_json: bool) -> int:
    """List the models on this machine, and those that `nomoat pull` can fetch by a short name."""
    from nomoat.hub.fit import gigabytes

    lines = list(_lines())
    if as_json:
        click.echo(json.dumps([asdict(line) for line in lines], ensure_ascii=False))
    else:
        rows = [(line.name, gigabytes(line.bytes) if line.bytes else "-", line.origin, line.problem) for line in lines]
        click.echo(table(("MODEL", "SIZE", "WHERE", ""), rows))
    return _verify() if verify else 0


def _lines() -> Iterator[Line]:
    from nomoat.errors import NomoatError, printable
    from nomoat.hub.discover import discover
    from nomoat.hub.names import catalogue
    from nomoat.hub.store import Store

    store = Store()
    manifests, damaged = store.read_all()
    for manifest in manifests:
        path, problem = None, ""
        try:
            path = str(store.path(manifest))
        except NomoatError as error:
            problem = str(error)
        yield Line(manifest.name, "store", manifest.size, path, manifest.licence, problem)
    for fault in damaged:
        yield Line(printable(str(fault.path)), "store", 0, None, "", str(fault))
    for model in discover():
        yield Line(model.name, model.origin, model.size, str(model.path), "", model.problem)
    stored = {manifest.name for manifest in manifests}
    for entry in catalogue().values():
        if entry.name not in stored:
            yield Line(entry.name, "catalogue, not fetched yet", entry.size, None, entry.licence, "")


def _verify() -> int:
    """Say what is wrong with the store on stderr; the exit code."""
    from nomoat.hub.store import Store

    problems = Store().verify()
    for problem in problems:
        click.echo(problem, err=True)
    click.echo(f"the store has {len(problems)} problems" if problems else "the store is sound", err=True)
    return 2 if problems else 0


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns side by side; what the cells hold cannot move the cursor."""
    from nomoat.errors import printable

    cells = [head, *[tuple(printable(cell) for cell in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
