"""`nomoat fit`: say whether a model fits this machine, and how long a data set would take."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nomoat.cli.memory import kv_type

if TYPE_CHECKING:
    from nomoat.engine.kv import KvType

SAMPLE = 200  # rows whose tokens are counted; the others are taken to be like them


@click.command("fit")
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), metavar="ROWS", help="Training rows: says how long they would take.")
@click.option("--epochs", type=click.FloatRange(0, 1000, min_open=True), default=1.0, show_default=True, help="Passes over ROWS.")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Tokens of a chat. [default: the model's, at most 4,096]")
@kv_type
@click.option("--rank", type=click.IntRange(1, 1024), default=16, show_default=True, help="Rank of the adapter.")
@click.option("--batch-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of one training step.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    data: Path | None,
    epochs: float,
    context: int | None,
    kv_type: KvType,
    rank: int,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """Say whether MODEL fits this machine, for chat and for training. Nothing is loaded.

    A model of a hub (hf:org/repo) is judged before it is fetched, from a few megabytes of headers.
    """
    from nomoat import settings
    from nomoat.errors import ModelError, printable
    from nomoat.hub.describe import describe
    from nomoat.hub.fit import estimate, gigabytes, this_machine

    with _here(model) as (path, to_fetch):
        found = describe(path)
        if found.spec is None:
            raise ModelError(found.problem)
        rows = None if data is None else measure(path, data, batch_tokens)
    fit = estimate(
        found.spec,
        found.size,
        this_machine(settings.data_dir(), settings.threads()),
        context=context,
        kv_type=kv_type,
        batch_tokens=batch_tokens,
        rank=rank,
        data_tokens=None if rows is None else rows.tokens,
        epochs=epochs,
        loss_share=1.0 if rows is None else rows.loss_share,
        length=512 if rows is None else max(1, rows.tokens // rows.rows),
        download_bytes=to_fetch,
    )
    if as_json:
        click.echo(json.dumps({"model": model, **asdict(fit)}))
        return
    click.echo(fit.verdict)
    if to_fetch:
        click.echo(f"to fetch: {gigabytes(to_fetch)}")
    click.echo(f"weights {gigabytes(fit.weights_bytes)}, conversation {gigabytes(fit.kv_bytes)}, about", nl=False)
    click.echo(f" {fit.decode_tokens_per_second:,.0f} tokens/s of answer; adapter {fit.adapter_parameters:,} parameters")
    if rows is not None:
        click.echo(
            f"{printable(str(data))}: {rows.rows:,} rows, about {rows.tokens:,} tokens, {rows.loss_share:.0%} of them learned"
        )


@contextlib.contextmanager
def _here(model: str) -> Iterator[tuple[Path, int]]:
    """(path, 0) of a model on this machine, or (its headers, bytes to fetch) of one of a hub."""
    from nomoat import settings
    from nomoat.errors import NotFoundError
    from nomoat.hub.names import parse, resolve

    parsed = parse(model)
    try:
        path = resolve(model)
    except NotFoundError:
        if parsed.scheme != "hf" or settings.offline():
            raise
    else:
        yield path, 0
        return
    from nomoat.hub.huggingface import preview

    with preview(parsed.rest, settings.cache_dir()) as found:
        yield found


@dataclass(frozen=True)
class DataSize:
    """Rows of a data set, their tokens, and the share of tokens that are learned."""

    rows: int
    tokens: int
    loss_share: float


def measure(model: Path, data: Path, max_tokens: int) -> DataSize:
    """Count the tokens of SAMPLE rows spread over the file, as training would see them. Raises DataError, TemplateError."""
    import numpy as np

    from nomoat.data.mask import Example, tokenize
    from nomoat.data.readers import read_examples
    from nomoat.errors import DataError
    from nomoat.files.gguf import open_gguf
    from nomoat.text.template import template_for
    from nomoat.text.tokenizer import Tokenizer

    rows = read_examples(data)
    if model.is_dir():
        tokenizer = Tokenizer.from_folder(model)
        template = template_for(model, tokenizer)
    else:
        with open_gguf(model) as file:
            tokenizer = Tokenizer.from_gguf(file)
            template = template_for(file, tokenizer)
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    results = [tokenize(row, tokenizer, template, max_tokens=max_tokens) for row in sample]
    examples = [result for result in results if isinstance(result, Example)]
    if not examples:
        raise DataError(f"no row can be used: {results[0]}", path=data)
    tokens = sum(len(example.tokens) for example in examples)
    learned = sum(int(np.count_nonzero(example.weights)) for example in examples)
    return DataSize(len(rows), round(tokens * len(rows) / len(sample)), learned / tokens)
