"""`nomoat quantize`: a model as a GGUF of another type."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("quantize")
@click.argument("source")
@click.option("--to", required=True, metavar="TYPE", help="Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_XS, Q3_K_M, Q2_K, F16, ...")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="The file to write; default: NAME.TYPE.gguf in this folder."
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(source: str, to: str, output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Write SOURCE as a GGUF of another TYPE, which llama.cpp and its relatives load too.

    SOURCE is a model's name, a GGUF file or a Hugging Face folder. A type is a mixture of formats, as llama.cpp
    names it: Q4_K_M keeps the tensors that matter most at six bits. The source is not changed.
    """
    from nomoat.cli.pull import progress_display
    from nomoat.errors import printable
    from nomoat.hub.names import resolve
    from nomoat.quant.recipes import FILE_TYPES
    from nomoat.quant.write import quantize

    to = to if to in FILE_TYPES else to.upper()
    path = resolve(source)
    target = output or Path(f"{_stem(path)}.{to}.gguf")
    with progress_display() as (progress, tell):
        written = quantize(path, to, target, overwrite=overwrite, progress=lambda done, total: progress(to, done, total))
        for note in written.notes:
            tell(f"note: {note}")
    if as_json:
        facts = {"path": str(written.path), "type": to, "bytes": written.bytes, "source_bytes": written.source_bytes}
        click.echo(json.dumps(facts | {"tensors": written.types, "notes": written.notes}, ensure_ascii=False))
        return
    kinds = ", ".join(f"{kind} x {count}" for kind, count in written.types.items())
    click.echo(
        f"{printable(str(written.path))}: {written.bytes / 1e6:,.1f} MB (source {written.source_bytes / 1e6:,.1f} MB); {kinds}"
    )
    click.echo(f"Next: nomoat run {printable(str(written.path))}")


def _stem(path: Path) -> str:
    """The model's name without the type that the file has now."""
    from nomoat.quant.recipes import FILE_TYPES

    stem = path.name if path.is_dir() else path.stem
    name, dot, last = stem.rpartition(".")
    return name if dot and last.upper() in FILE_TYPES else stem
