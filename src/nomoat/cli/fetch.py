"""What `run` and `eval` do first: a model of the catalogue or a hub that is not here yet is fetched, with a progress bar."""

from __future__ import annotations

from nomoat.errors import NotFoundError


def fetch_missing(name: str) -> None:
    """Make the base of a full model name available. Raises NotFoundError for an unknown name, and what `pull` raises."""
    from nomoat.adapters.stack import parse_model_name
    from nomoat.hub.names import parse, resolve

    base, _ = parse_model_name(name)
    scheme = parse(base).scheme
    try:
        resolve(base)
    except NotFoundError:
        if scheme not in ("catalogue", "hf"):
            raise
        from nomoat.cli.pull import progress_display
        from nomoat.hub.pull import pull

        with progress_display() as (progress, tell):
            pull(base, progress=progress, tell=tell)
