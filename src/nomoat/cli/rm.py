"""`nomoat rm`: remove models from the store."""

from __future__ import annotations

import json

import click


@click.command("rm")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--unfinished", is_flag=True, help="Remove unfinished downloads too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with what was removed and the bytes freed.")
def command(models: tuple[str, ...], unfinished: bool, as_json: bool) -> None:
    """Remove MODELs that `nomoat pull` fetched. Files of your own and of other programs are never touched."""
    from nomoat.errors import InputError, NotFoundError, printable
    from nomoat.hub.fit import gigabytes
    from nomoat.hub.store import Store

    if not models and not unfinished:
        raise InputError("nothing to remove: give the name of a model (`nomoat models` lists them) or --unfinished")
    store = Store()
    # A damaged manifest cannot be read, but can be removed: only a name that has no manifest at all is refused.
    missing = [name for name in models if not store.has(name)]
    if missing:
        raise NotFoundError(
            f"no model {printable(missing[0])!r} in the store, so nothing was removed. nomoat removes only what it fetched: "
            f"{', '.join(printable(name) for name in store.names()) or 'at present nothing'}"
        )
    freed = 0
    with store.writing("rm", tell=lambda text: click.echo(text, err=True)):
        for name in dict.fromkeys(models):
            freed += store.remove(name)
        if unfinished:
            freed += store.gc(partial=True)
    if as_json:
        click.echo(json.dumps({"removed": list(dict.fromkeys(models)), "bytes": freed}))
    else:
        click.echo(
            f"removed {', '.join(map(printable, dict.fromkeys(models))) or 'unfinished downloads'}: {gigabytes(freed)} freed"
        )
