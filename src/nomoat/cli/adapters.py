"""`nomoat adapters`: list, show and remove adapters."""

from __future__ import annotations

import json
from typing import Any

import click

from nomoat.errors import AdapterError, printable


@click.group("adapters", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List, show and remove adapters. Alone, it lists them.

    \b
    nomoat adapters show tickets
    nomoat adapters rm tickets
    """
    if context.invoked_subcommand is None:
        context.invoke(list_command, as_json=False)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_command(as_json: bool) -> None:
    """The adapters on this machine."""
    from nomoat.adapters.store import installed

    found = installed()
    if as_json:
        rows = [{"name": e.name, "path": str(e.path), "manifest": e.manifest, "fault": e.fault} for e in found]
        click.echo(json.dumps({"adapters": rows}, ensure_ascii=False))
        return
    if not found:
        click.echo("no adapters yet; `nomoat train MODEL ROWS.jsonl --name NAME` makes one")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "base", "rank", "score before", "after"):
        table.add_column(column, justify="right" if column not in ("name", "base") else "left")
    for entry in found:
        if entry.fault is not None:
            table.add_row(entry.name, "unreadable: `nomoat adapters show` says why")
            continue
        base = entry.manifest.get("base", {})
        shown = printable(str(base.get("model") or base.get("name") or "not said"))
        table.add_row(entry.name, shown, printable(str(entry.manifest.get("rank", ""))), *_scores(entry.manifest))
    Console(highlight=False, markup=False).print(table)


def _scores(manifest: dict[str, Any]) -> tuple[str, str]:
    """Before and after, as people read them; empty where nothing was measured or the manifest says nonsense."""
    from nomoat.evals.metrics import METRICS

    evaluation = manifest.get("evaluation", {})
    if evaluation.get("metric") not in METRICS:
        return "", ""
    return _score(evaluation, "before"), _score(evaluation, "after")


def _score(evaluation: dict[str, Any], key: str) -> str:
    from nomoat.evals.report import figure

    numbers = evaluation.get(key)
    if not isinstance(numbers, list) or not numbers or not isinstance(numbers[0], int | float):
        return ""
    return figure(evaluation["metric"], float(numbers[0]))


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def show_command(name: str, as_json: bool) -> None:
    """What an adapter was made for, from what, and how well it does. NAME is an installed name or a path."""
    from nomoat.adapters.package import WEIGHTS, file_digest, read_manifest
    from nomoat.adapters.store import resolve

    path = resolve(name)
    manifest = read_manifest(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise AdapterError(f"{printable(str(path))} has no {WEIGHTS}; it is not an adapter", code="E_NOT_FOUND")
    size, digest = weights.stat().st_size, file_digest(weights)
    if as_json:
        facts = {"path": str(path), "bytes": size, "sha256": digest, "manifest": manifest}
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    lines = {"path": str(path), "size": f"{size / 1e6:.1f} MB, sha256 {digest}"}
    lines |= _facts(manifest) if manifest else {"note": "no nomoat.json: made by another tool"}
    for key, text in lines.items():
        if text:
            click.echo(f"{key:<10} {printable(text)}")


def _facts(manifest: dict[str, Any]) -> dict[str, str]:
    """The manifest in words; empty text for what it does not say."""
    base, data, recipe = manifest["base"], manifest["data"], manifest["recipe"]
    before, after = _scores(manifest)
    targets = ", ".join(map(str, manifest["targets"]))
    how = ("epochs", "batch_sequences", "learning_rate", "seed")
    return {
        "base": " ".join(str(base[key]) for key in ("model", "name", "architecture") if key in base),
        "adapter": f"rank {manifest.get('rank')}, alpha {manifest.get('alpha')}, {targets}",
        "learned": f"{data['learned']} rows, {data.get('loss_tokens')} tokens in the loss" if "learned" in data else "",
        "recipe": ", ".join(f"{key} {recipe[key]}" for key in how if key in recipe),
        "score": f"{before} before, {after} after ({manifest['evaluation']['metric']})" if after else "not measured",
        "on top of": ", ".join(str(parent.get("name")) for parent in manifest["parents"] if isinstance(parent, dict)),
    }


@command.command("rm")
@click.argument("name")
def rm_command(name: str) -> None:
    """Delete an installed adapter."""
    from nomoat.adapters.store import remove

    click.echo(f"removed {printable(str(remove(name)))}")
