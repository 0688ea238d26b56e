"""`--kv-type`, `--larger-than-memory`, and how `run` and `eval` say that weights will be slow for lack of memory."""

from __future__ import annotations

import click

larger_than_memory = click.option(
    "--larger-than-memory", is_flag=True, help="Go on where the weights exceed the memory of this machine; slow."
)

kv_type = click.option(
    "--kv-type",
    type=click.Choice(["bf16", "int8"]),
    default="bf16",
    show_default=True,
    help="What keys and values are kept in; int8 takes half the memory.",
)


def say(text: str) -> None:
    """On stderr: stdout holds answers and results."""
    click.echo(f"nomoat: {text}", err=True)
