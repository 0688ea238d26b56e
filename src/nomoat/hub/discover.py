"""Models that other programs have downloaded, found where they lie. Nothing here writes, and nothing is copied.

Layouts: Ollama (manifests/<host>/<namespace>/<model>/<tag> and blobs/sha256-<hex>), Hugging Face's cache
(models--org--name/snapshots/<commit>/), LM Studio (models/publisher/model/*.gguf), llama.cpp's old flat cache.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nomoat.errors import FileFormatError, InputError, printable
from nomoat.hub.store import parse_digest

_MANIFEST_LIMIT = 1 << 20  # bytes; real ones have under 4 KiB
_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"


@dataclass(frozen=True)
class Found:
    """A model in another program's folder. `problem` says why it cannot be used, or is empty."""

    name: str
    origin: str
    path: Path
    size: int
    problem: str = ""


def discover() -> list[Found]:
    """Every model of every known store, sorted by name; one file that several stores show is listed once."""
    seen: set[tuple[int, int]] = set()
    models: list[Found] = []
    for finder in FINDERS.values():
        for model in finder():
            try:
                status = model.path.stat()
            except OSError:
                status = None
            if status is None or (identity := (status.st_dev, status.st_ino)) not in seen or model.problem:
                models.append(model)
                if status is not None:
                    seen.add(identity)
    return sorted(models, key=lambda model: model.name)


def find(scheme: str, rest: str) -> Found | None:
    """The model called `scheme:rest`. Raises FileFormatError if it is unusable, InputError if the name fits several files."""
    models = list(FINDERS[scheme]()) if scheme in FINDERS else []
    wanted = f"{scheme}:{rest}"
    exact = [m for m in models if m.name in (wanted, f"{wanted}:latest")]
    if not exact:
        inside = {m.name.removeprefix(f"{wanted}/"): m for m in models if m.name.startswith(f"{wanted}/")}
        exact = [inside[choose_gguf(wanted, list(inside))]] if inside else []
    if not exact:
        return None
    if exact[0].problem:
        raise FileFormatError(exact[0].problem, code="E_FORMAT", path=exact[0].path)
    return exact[0]


def choose_gguf(name: str, files: list[str]) -> str:
    """The file that `name` means when it offers several: the only one, else Q4_K_M. Raises InputError that lists them."""
    ggufs = model_files(files)
    preferred = [file for file in ggufs if "q4_k_m" in file.lower()]
    for candidates in (ggufs, preferred):
        if len(candidates) == 1:
            return candidates[0]
    listing = "\n".join(f"  {printable(name)}/{printable(file)}" for file in ggufs[:40])
    raise InputError(f"{printable(name)} offers {len(ggufs)} GGUF files; choose one:\n{listing}", code="E_CHOOSE")


def model_files(files: list[str]) -> list[str]:
    """GGUF files that are models: no projectors, and of a split model the first part only."""
    ggufs = [file for file in files if file.endswith(".gguf") and "mmproj" not in file.lower()]
    return sorted(file for file in ggufs if (match := _SHARD.search(file)) is None or match[1] == "00001")


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read_json(path: Path) -> object:
    """A small JSON file, or None if there is none that can be read."""
    try:
        if path.stat().st_size > _MANIFEST_LIMIT or not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ---- Ollama


def ollama_roots() -> list[Path]:
    """OLLAMA_MODELS alone if set, else the user's folder and those of the Linux services."""
    if configured := os.environ.get("OLLAMA_MODELS"):
        return [Path(configured)]
    service = [Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama")] if sys.platform == "linux" else []
    return [Path.home() / ".ollama" / "models", *service]


def _ollama() -> Iterator[Found]:
    for root in ollama_roots():
        for host in _children(root / "manifests"):
            for namespace in _children(host):
                for model in _children(namespace):
                    for tag in _children(model):
                        parts = [host.name, namespace.name, f"{model.name}:{tag.name}"]
                        if parts[0] == "registry.ollama.ai":
                            parts = parts[2:] if parts[1] == "library" else parts[1:]
                        yield _ollama_model("ollama:" + "/".join(parts), root, tag)


def _ollama_model(name: str, root: Path, path: Path) -> Found:
    manifest = _read_json(path)
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return Found(name, "Ollama", path, 0, "Ollama's manifest of this model cannot be read")
    models = [layer for layer in layers if layer.get("mediaType") == _OLLAMA_MODEL]
    if not models:
        return Found(name, "Ollama", path, 0, "it holds no GGUF file: its weights are in another format, or remote")
    try:
        blob = root / "blobs" / f"sha256-{parse_digest(str(models[0].get('digest')))}"
        with blob.open("rb") as file:
            magic = file.read(4)
    except (OSError, FileFormatError) as error:
        return Found(name, "Ollama", path, 0, f"the model's file is not there: {printable(str(error))}")
    problem = "" if magic == b"GGUF" else f"the model's file starts with {magic!r}, expected b'GGUF'"
    return Found(name, "Ollama", blob, _size(blob), problem)


# ---- Hugging Face


def hf_cache() -> Path:
    """HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"


def _huggingface() -> Iterator[Found]:
    for repo in _children(hf_cache()):
        match = re.fullmatch(r"models--(.+?)--(.+)", repo.name)
        snapshot = _snapshot(repo) if match else None
        if match is None or snapshot is None:
            continue
        name = f"hf:{match[1]}/{match[2]}"
        files = sorted(str(p.relative_to(snapshot).as_posix()) for p in snapshot.rglob("*") if p.is_file())
        for file in model_files(files):
            yield Found(f"{name}/{file}", "Hugging Face cache", snapshot / file, _gguf_size(snapshot / file))
        if "config.json" in files and any(file.endswith(".safetensors") for file in files):
            size = sum(_size(snapshot / file) for file in files if file.endswith(".safetensors"))
            missing = missing_shards(snapshot)
            hint = f"its download is not complete; try: nomoat pull {name}. Missing: {printable(', '.join(missing[:3]))}"
            problem = hint if missing else ""
            yield Found(name, "Hugging Face cache", snapshot, size, problem)


def _snapshot(repo: Path) -> Path | None:
    """The snapshot that `main` means, else the newest."""
    try:
        commit = (repo / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    snapshots = [path for path in _children(repo / "snapshots") if path.is_dir()]
    chosen = [path for path in snapshots if path.name == commit]
    return chosen[0] if chosen else max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def missing_shards(folder: Path) -> list[str]:
    """Files that model.safetensors.index.json names and the folder lacks."""
    index = _read_large_index(folder / "model.safetensors.index.json")
    return sorted(file for file in index if not (folder / file).is_file())


def _read_large_index(path: Path) -> set[str]:
    try:
        if path.stat().st_size > 64 << 20:
            return set()
        weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {file for file in weights.values() if isinstance(file, str) and "/" not in file and "\\" not in file}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _gguf_size(first: Path) -> int:
    """Bytes of a GGUF with all its parts."""
    if _SHARD.search(first.name) is None:
        return _size(first)
    stem = _SHARD.sub("", first.name)
    return sum(_size(path) for path in _children(first.parent) if path.name.startswith(stem) and _SHARD.search(path.name))


# ---- LM Studio and llama.cpp


def lmstudio_root() -> Path:
    """The models folder: settings.json `downloadsFolder`, else models/ in LM Studio's home."""
    try:
        home = Path((Path.home() / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        old = Path.home() / ".cache" / "lm-studio"
        home = old if old.is_dir() and not (Path.home() / ".lmstudio").is_dir() else Path.home() / ".lmstudio"
    configured = _read_json(home / "settings.json")
    moved = configured.get("downloadsFolder") if isinstance(configured, dict) else None
    return Path(moved) if isinstance(moved, str) and moved else home / "models"


def _lmstudio() -> Iterator[Found]:
    for publisher in _children(lmstudio_root()):
        for model in _children(publisher):
            files = model_files([path.name for path in _children(model) if path.is_file()])
            for file in files:
                name = f"lmstudio:{publisher.name}/{model.name}"
                yield Found(name if len(files) == 1 else f"{name}/{file}", "LM Studio", model / file, _gguf_size(model / file))


def llamacpp_root() -> Path:
    """LLAMA_CACHE, else llama.cpp's folder in the platform's cache."""
    if configured := os.environ.get("LLAMA_CACHE"):
        return Path(configured)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "llama.cpp"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llama.cpp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama.cpp"


def _llamacpp() -> Iterator[Found]:
    root = llamacpp_root()
    for file in model_files([path.name for path in _children(root) if path.is_file()]):
        yield Found(f"llamacpp:{file}", "llama.cpp", root / file, _gguf_size(root / file))


FINDERS: dict[str, Callable[[], Iterator[Found]]] = {
    "hf": _huggingface,
    "ollama": _ollama,
    "lmstudio": _lmstudio,
    "llamacpp": _llamacpp,
}
