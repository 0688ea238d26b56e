"""What a model name means, and where the model is.

    smollm2:135m                    the catalogue
    ./file.gguf, ./folder           a file, or a folder with config.json
    hf:org/repo, hf:org/repo/file   Hugging Face: the store, or the cache of huggingface_hub
    ollama:name[:tag]               Ollama's store            \\
    lmstudio:publisher/model        LM Studio's folder         } used in place, never written
    llamacpp:file                   llama.cpp's cache         /
"""

from __future__ import annotations

import difflib
import functools
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nomoat import settings
from nomoat.errors import FileFormatError, InputError, NetworkError, NotFoundError, printable

if TYPE_CHECKING:
    from nomoat.hub.fetch import Progress

Scheme = Literal["catalogue", "path", "hf", "ollama", "lmstudio", "llamacpp"]
PREFIXES: tuple[Scheme, ...] = ("hf", "ollama", "lmstudio", "llamacpp")


@dataclass(frozen=True)
class CatalogueEntry:
    """A pinned model file inside a pinned wheel. Digests are 64 hex digits; sizes in bytes."""

    name: str
    title: str
    licence: str
    parameters: int
    package: str
    version: str
    member: str
    sha256: str
    size: int
    wheel: str
    wheel_sha256: str
    wheel_size: int


@functools.cache
def catalogue() -> dict[str, CatalogueEntry]:
    """The models that have a short name, from catalog.toml beside this file."""
    import tomllib
    from importlib import resources

    table = tomllib.loads((resources.files("nomoat.hub") / "catalog.toml").read_text(encoding="utf-8"))
    return {
        name: CatalogueEntry(
            name=name,
            size=row["bytes"],
            wheel=row["wheel"]["name"],
            wheel_sha256=row["wheel"]["sha256"],
            wheel_size=row["wheel"]["bytes"],
            **{key: row[key] for key in ("title", "licence", "parameters", "package", "version", "member", "sha256")},
        )
        for name, row in table.items()
    }


@dataclass(frozen=True)
class ModelName:
    """A parsed name. `rest` is what follows the prefix; `name` is the canonical spelling, the key of the store."""

    scheme: Scheme
    rest: str

    @property
    def name(self) -> str:
        return self.rest if self.scheme in ("catalogue", "path") else f"{self.scheme}:{self.rest}"


def parse(text: str) -> ModelName:
    """Read a model name; looks at the disk only to tell a path from a catalogue name. Raises InputError, NotFoundError."""
    if not text or not text.isprintable() or len(text) > 4096:
        shown = printable(text[:80])
        raise InputError(f"model name {shown!r}: expected something like smollm2:135m, ./model.gguf or hf:org/repo")
    prefix, colon, rest = text.partition(":")
    for scheme in PREFIXES:
        if colon and prefix == scheme:
            _check_rest(text, scheme, rest)
            return ModelName(scheme, rest)
    if text in catalogue():
        return ModelName("catalogue", text)
    looks_like_path = text.startswith((".", "/", "~", "\\")) or text.endswith(".gguf") or re.match(r"[A-Za-z]:[\\/]", text)
    path = Path(text).expanduser()
    if looks_like_path or path.exists():
        return ModelName("path", str(path))
    raise _unknown(text)


def _check_rest(text: str, scheme: str, rest: str) -> None:
    forms = {
        "hf": (r"[\w.-]+/[\w.-]+(/[^/\\]+)*", "hf:org/repo or hf:org/repo/file.gguf"),
        "ollama": (r"[\w.:/-]+", "ollama:name or ollama:name:tag"),
        "lmstudio": (r"[^/\\]+/[^/\\]+(/[^/\\]+)?", "lmstudio:publisher/model"),
        "llamacpp": (r"[^/\\]+(/[^/\\]+)*", "llamacpp:file.gguf"),
    }
    pattern, example = forms[scheme]
    if not re.fullmatch(pattern, rest) or any(set(part) <= {"."} for part in rest.split("/")):
        raise InputError(f"model name {printable(text)!r}: expected {example}")


def resolve(
    name: str,
    *,
    offline: bool | None = None,
    download: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """The .gguf file or Hugging Face folder that a name means. Reads nothing of the model itself.

    `download=True` fetches a missing catalogue or hf: model first (unless offline); `progress` and `tell` as in
    `pull`. Raises NotFoundError with near matches and what to do; FileFormatError E_PATH for a path that is neither a regular
    file nor a model folder.
    """
    from nomoat.hub import discover
    from nomoat.hub.store import Store

    parsed = parse(name)
    if parsed.scheme == "path":
        return _checked(Path(parsed.rest))
    store = Store()
    if parsed.scheme in ("catalogue", "hf") and (manifest := store.get(parsed.name)) is not None:
        return store.path(manifest)
    if parsed.scheme != "catalogue" and (found := discover.find(parsed.scheme, parsed.rest)) is not None:
        return _checked(found.path)
    if parsed.scheme in ("catalogue", "hf"):
        is_offline = settings.offline() if offline is None else offline
        if download and not is_offline:
            from nomoat.hub.pull import pull

            return pull(parsed.name, offline=False, progress=progress, tell=tell)
        shown = printable(parsed.name)
        if download:
            raise NetworkError(f"{shown} is not on this machine and --offline forbids fetching it", code="E_OFFLINE")
        raise NotFoundError(f"{shown} is not on this machine yet; fetch it with: nomoat pull {shown}")
    raise _unknown(name)


def _checked(path: Path) -> Path:
    """A regular file, or a folder with config.json: never a device, pipe or socket, whose reading might not end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            near = _near(path.name, [p.name for p in path.parent.glob("*.gguf")] if path.parent.is_dir() else [])
            raise NotFoundError(f"there is no file {printable(str(path))}{near}") from None
        raise FileFormatError(f"cannot be opened ({error.strerror})", code="E_PATH", path=path) from None
    if stat.S_ISREG(mode):
        return path
    if not stat.S_ISDIR(mode):
        raise FileFormatError("not a regular file; expected a .gguf file or a folder with config.json", code="E_PATH", path=path)
    if (path / "config.json").is_file():
        return path
    inside = sorted(p.name for p in path.glob("*.gguf"))
    hint = f"; it holds {printable(', '.join(inside[:5]))}: give the path of one of them" if inside else ""
    raise FileFormatError(f"a folder without config.json{hint}", code="E_PATH", path=path)


def _near(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [k for k in known if k.startswith(name)][:3]
    return f". Did you mean {' or '.join(printable(match) for match in matches)}?" if matches else ""


def _unknown(name: str) -> NotFoundError:
    from nomoat.hub import discover
    from nomoat.hub.store import Store

    known = [*catalogue(), *Store().names(), *(model.name for model in discover.discover())]
    return NotFoundError(
        f"no model is called {printable(name[:200])!r}{_near(name, sorted(set(known))) or '.'} "
        "`nomoat models` lists what is on this machine and in the catalogue; "
        "a file is given by its path (./model.gguf), a model of a hub as hf:org/repo"
    )
