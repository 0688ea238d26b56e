"""Installed adapters: one package folder each under `settings.adapters_dir()`."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from nomoat import settings
from nomoat.adapters.package import CONFIG, Manifest, read_manifest
from nomoat.errors import AdapterError, InputError, NotFoundError, printable

#: Lower case only, so that two names never differ by case alone; no `+` or `@`, which the names of stacks use.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}[a-z0-9]|[a-z0-9]")
#: Device names that Windows reserves, with or without a suffix.
RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))})


@dataclass(frozen=True)
class Installed:
    """One installed adapter. `fault` says why its manifest cannot be read; then `manifest` is empty."""

    name: str
    path: Path
    manifest: Manifest
    fault: str | None = None


def check_name(name: str) -> str:
    """Returns the name, or raises InputError E_PATH."""
    if not NAME.fullmatch(name) or name.partition(".")[0] in RESERVED:
        raise InputError(
            f"{printable(name)[:80]!r} is not an adapter name: use 1 to 64 lower-case letters, digits, `-`, `_` or `.`, "
            "beginning and ending with a letter or digit",
            code="E_PATH",
        )
    return name


def folder(name: str) -> Path:
    """Where an adapter of this name lives, or would. Raises InputError E_PATH."""
    return settings.adapters_dir() / check_name(name)


def installed() -> list[Installed]:
    """All adapters of the store, by name; one with a broken manifest is listed with its fault."""
    root = settings.adapters_dir()
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if not NAME.fullmatch(path.name) or not (path / CONFIG).is_file():
            continue  # hidden folders are packages being written
        try:
            found.append(Installed(path.name, path, read_manifest(path)))
        except InputError as error:
            found.append(Installed(path.name, path, {}, str(error)))
    return found


def resolve(name: str) -> Path:
    """The package folder of an installed name, or of a path (`./folder`, `/folder`, `folder/`).

    Raises NotFoundError, listing what is installed; InputError E_PATH for something that is neither.
    """
    if "/" in name or "\\" in name or name in (".", ".."):
        path = Path(name).expanduser()
        if not path.is_dir():
            raise NotFoundError(f"{printable(name)}: there is no adapter folder at that path")
        return path
    path = folder(name)
    if not path.is_dir():
        names = ", ".join(entry.name for entry in installed()) or "none"
        raise NotFoundError(f"no adapter named {printable(name)} is installed (installed: {names}; a path needs a `/`)")
    return path


def remove(name: str) -> Path:
    """Deletes an installed adapter, first out of sight, then for good. Raises NotFoundError or InputError."""
    path = folder(name)
    if not path.is_dir():
        raise NotFoundError(f"no adapter named {name} is installed")
    if path.is_symlink():
        raise AdapterError(f"{printable(str(path))} is a link; remove it by hand", code="E_PATH")
    gone = path.with_name(f".{name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)
    return path
