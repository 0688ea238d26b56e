"""`nomoat bench`: what this machine can do, and how much of that a model gets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from nomoat.cli.memory import kv_type

if TYPE_CHECKING:
    from nomoat.bench.roofline import Peaks
    from nomoat.bench.speed import Speed
    from nomoat.engine.kv import KvType

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

rounds = click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="The median counts.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
model_argument = click.argument("model")


def number(name: str, default: int, text: str, least: int = 1) -> Decorator:
    return click.option(name, type=click.IntRange(least), default=default, show_default=True, help=text)


@click.group("bench")
def command() -> None:
    """Time this machine and the engine on it: tokens per second, and the share of what the machine allows.

    \b
    nomoat bench roofline
    nomoat bench decode smollm2:135m
    nomoat bench train smollm2:135m --rows 4 --length 512
    """


@command.command("roofline")
@as_json
def roofline(as_json: bool) -> None:
    """Multiply-adds of the kernels' instructions, and read bandwidth by working set, for 1 to N threads."""
    from nomoat import _native, settings
    from nomoat.bench.roofline import measure
    from nomoat.engine.model import use_machine

    use_machine(None)
    most = settings.threads()
    rows = measure(sorted({*(1 << i for i in range(most.bit_length())), most}))
    if as_json:
        click.echo(json.dumps({"level": _native.level(), "peaks": [asdict(row) for row in rows]}))
        return
    click.echo(f"level {_native.level()}")
    click.echo("")
    click.echo(_rate_table(rows))
    click.echo("")
    click.echo(_read_table(rows))


def _rate_table(rows: list[Peaks]) -> str:
    kinds = list(rows[0].multiply_adds)
    lines = ["10^9 multiply-adds/s " + "".join(f"{kind:>9}" for kind in kinds)]
    for row in rows:
        cells = (f"{row.multiply_adds[kind] / 1e9:>9,.0f}" if row.multiply_adds[kind] else f"{'-':>9}" for kind in kinds)
        lines.append(f"{_threads(row.threads):21}" + "".join(cells))
    return "\n".join(lines)


def _read_table(rows: list[Peaks]) -> str:
    lines = ["GB/s read from       " + "".join(f"{_size(size):>9}" for size in rows[0].read)]
    lines += [f"{_threads(row.threads):21}" + "".join(f"{rate / 1e9:>9,.1f}" for rate in row.read.values()) for row in rows]
    return "\n".join(lines)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


@command.command("decode")
@model_argument
@number("--prompt", 32, "Tokens before the first one that is timed; 8000 shows attention.")
@number("--tokens", 64, "Tokens a round.")
@rounds
@kv_type
@as_json
def decode(model: str, prompt: int, tokens: int, rounds: int, kv_type: KvType, as_json: bool) -> None:
    """One token at a time."""
    _measure("decode", model, as_json, kv_type, prompt=prompt, tokens=tokens, rounds=rounds)


@command.command("prefill")
@model_argument
@number("--tokens", 512, "Tokens of the prompt.")
@rounds
@kv_type
@as_json
def prefill(model: str, tokens: int, rounds: int, kv_type: KvType, as_json: bool) -> None:
    """A whole prompt."""
    _measure("prefill", model, as_json, kv_type, tokens=tokens, rounds=rounds)


@command.command("batch")
@model_argument
@number("--streams", 16, "Conversations that get a token in each step.")
@number("--adapters", 0, "Adapters, which the streams take in turn; random ones.", least=0)
@number("--rank", 16, "Rank of the adapters.")
@number("--prompt", 32, "Tokens before the first step that is timed.")
@number("--tokens", 16, "Steps a round.")
@rounds
@kv_type
@as_json
def batch(
    model: str,
    streams: int,
    adapters: int,
    rank: int,
    prompt: int,
    tokens: int,
    rounds: int,
    kv_type: KvType,
    as_json: bool,
) -> None:
    """Many conversations at once, each with its own adapter if wanted."""
    values = {"streams": streams, "adapters": adapters, "rank": rank, "prompt": prompt, "tokens": tokens}
    _measure("batch", model, as_json, kv_type, rounds=rounds, **values)


@command.command("train")
@model_argument
@number("--rows", 4, "Sequences of a step.")
@number("--length", 512, "Tokens of each.")
@number("--rank", 16, "Rank of the adapter.")
@number("--rounds", 3, "The median counts.")
@as_json
def train(model: str, rows: int, length: int, rank: int, rounds: int, as_json: bool) -> None:
    """Steps of LoRA on all linears, every token in the loss."""
    _measure("train", model, as_json, "bf16", rows=rows, length=length, rank=rank, rounds=rounds)


def _measure(work: str, name: str, as_json: bool, kv_type: KvType, **options: int) -> None:
    from nomoat import _native
    from nomoat.bench.speed import WORK
    from nomoat.cli.fetch import fetch_missing
    from nomoat.engine.model import Model
    from nomoat.hub.names import resolve
    from nomoat.train.job import peak_rss_bytes

    fetch_missing(name)
    model = Model.load(resolve(name), kv_type=kv_type)
    speed = WORK[work](model, **options)
    peak_mb = peak_rss_bytes() / 1e6
    facts = {"model": name, "level": _native.level(), "threads": _native.threads(), "options": options}
    if as_json:
        found: dict[str, Any] = asdict(speed) | {"tokens_per_second": speed.tokens_per_second, "shares": speed.shares}
        click.echo(json.dumps(facts | found | {"peak_rss_mb": round(peak_mb, 1)}))
        return
    click.echo(f"{work} {name}: {facts['level']}, {_threads(_native.threads())}, {peak_mb:,.0f} MB")
    click.echo(_report(speed))


def _report(speed: Speed) -> str:
    low, high = min(speed.rates), max(speed.rates)
    lines = [
        f"{speed.tokens_per_second:,.1f} tokens/s (rounds from {low:,.1f} to {high:,.1f}); "
        f"{speed.bytes_per_token / 1e6:,.1f} MB read and {speed.multiply_adds_per_token / 1e6:,.0f} million multiply-adds a token"
    ]
    for name, limits in speed.limits.items():
        lines.append(
            f"{speed.shares[name]:.0%} of the {statistics.median(limits):,.1f} tokens/s that {_LIMITS[name]} would allow alone"
        )
    lines.append("")
    for stage, seconds in sorted(speed.stages.items(), key=lambda item: -item[1]):
        lines.append(f"  {stage:28} {seconds / speed.seconds:5.1%}")
    return "\n".join(lines)


_LIMITS = {
    "memory": "reading those bytes",
    "int8": "the int8 dots, one digit a product,",
    "bf16": "the bf16 dots",
    "f32": "the float32 products",
}
