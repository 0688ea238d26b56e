"""`nomoat show`: a model in about ten lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nomoat.hub.describe import Description
    from nomoat.hub.fit import Fit


@click.command("show")
@click.argument("model")
@click.option("--template", is_flag=True, help="Print the whole chat template instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, template: bool, as_json: bool) -> None:
    """Explain MODEL: architecture, size, formats, template, licence, and what fits on this machine."""
    from nomoat import settings
    from nomoat.errors import NotFoundError
    from nomoat.hub.describe import describe
    from nomoat.hub.fit import estimate, this_machine
    from nomoat.hub.names import resolve

    found = describe(resolve(model))
    if template:
        if found.template is None:
            raise NotFoundError("this model has no chat template")
        click.echo(json.dumps({"template": found.template}) if as_json else _shown(found.template))
        return
    fit = None
    if found.spec is not None:
        fit = estimate(found.spec, found.size, this_machine(settings.data_dir(), settings.threads()))
    licence = _licence(model, found)
    if as_json:
        click.echo(json.dumps(_record(model, found, licence, fit), ensure_ascii=False))
    else:
        click.echo("\n".join(f"{label:<13} {text}" for label, text in _lines(model, found, licence, fit)))


def _licence(model: str, found: Description) -> str:
    """What the file says, else what was known when it was fetched."""
    from nomoat.hub.store import Store

    manifest = None if found.licence != "not stated" else Store().get(model)
    return found.licence if manifest is None else manifest.licence


def _lines(model: str, found: Description, licence: str, fit: Fit | None) -> list[tuple[str, str]]:
    from nomoat.errors import printable
    from nomoat.hub.fit import gigabytes

    spec = found.spec
    kinds = "; ".join(
        f"{group} {', '.join(f'{kind} x {count}' for kind, count in types.items())}" for group, types in found.types.items()
    )
    first = found.template.strip().splitlines()[0] if found.template and found.template.strip() else "none: plain text only"
    lines = [
        ("model", f"{printable(model)}: {found.title}"),
        ("file", f"{printable(str(found.path))} ({found.format})"),
        ("size", f"{gigabytes(found.size)}, {found.parameters / 1e6:,.1f} million parameters"),
        ("architecture", found.architecture if spec is None else f"{found.architecture}: {_dimensions(found)}"),
        ("formats", printable(kinds)),
        ("context", "unknown" if spec is None else f"{spec.context:,} tokens"),
        ("template", printable(first[:100]) + ("..." if len(first) > 100 else "")),
        ("tokens", f"start {found.bos or 'none'}; end {' '.join(found.ends) or 'none'}"),
        ("licence", printable(licence)),
    ]
    lines += [("note", printable(note)) for note in found.notes]
    if fit is not None:
        lines.append(("here", fit.verdict))
    if found.problem:
        lines.append(("cannot run", found.problem))
    return lines


def _dimensions(found: Description) -> str:
    spec = found.spec
    assert spec is not None
    experts = max(block.experts for block in spec.blocks)
    windows = sorted({block.window for block in spec.blocks if block.window})
    return (
        f"{spec.layers} layers, width {spec.width:,}, {spec.heads} heads ({spec.kv_heads} for keys and values), "
        f"ffn {spec.ffn:,}, vocabulary {spec.vocab:,}"
        + (f", {experts:,} experts of which {spec.experts_used:,} are used" if experts else "")
        + (" beside a shared one" if any(block.shared for block in spec.blocks) else "")
        + (f", windows of {' and '.join(f'{window:,}' for window in windows)} tokens" if windows else "")
    )


def _record(model: str, found: Description, licence: str, fit: Fit | None) -> dict[str, Any]:
    from dataclasses import asdict

    spec = found.spec
    fields = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "tied_head")
    return {
        "model": model,
        "title": found.title,
        "path": str(Path(found.path)),
        "format": found.format,
        "architecture": found.architecture,
        "bytes": found.size,
        "parameters": found.parameters,
        "dimensions": None if spec is None else {name: getattr(spec, name) for name in fields},
        "types": found.types,
        "template": found.template,
        "bos": found.bos,
        "ends": found.ends,
        "licence": licence,
        "notes": found.notes,
        "problem": found.problem,
        "fit": None if fit is None else asdict(fit),
    }


def _shown(text: str) -> str:
    """Text of a file for the terminal: line breaks stay, other control characters are spelled out."""
    from nomoat.errors import printable

    return "\n".join(printable(line) for line in text.splitlines())
