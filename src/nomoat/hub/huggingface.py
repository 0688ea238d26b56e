"""Fetch a model of a Hugging Face hub into the store: only the files that nomoat reads, each checked.

huggingface_hub asks about the repository and knows the login (HF_ENDPOINT, HF_TOKEN). The bytes are fetched by `fetch`,
because huggingface_hub (2.4) throws an unfinished file away, so that a broken 5 GB download starts again from nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nomoat.errors import FileFormatError, InputError, NetworkError, NotFoundError, printable
from nomoat.hub import discover
from nomoat.hub.fetch import RETRY_STATUS, Progress, fetch, fetch_start
from nomoat.hub.store import Store, StoredFile, check_disk, check_relative, hash_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

#: Bytes of a weight file that a preview fetches, first and second try. A GGUF header holds the vocabulary: 1.7 MB for 49k tokens.
HEADER_BYTES = {".gguf": (8 << 20, 64 << 20), ".safetensors": (1 << 20, 16 << 20)}

#: What a Hugging Face folder is read from, beside its weights.
FOLDER_FILES = frozenset(
    [
        *("config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja", "chat_template.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt"),
    ]
)


@dataclass(frozen=True)
class RemoteFile:
    """`sha256` for large files, `git_sha1` (of git's blob object) for those kept in git itself; hex digits or None."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None

    def matches(self, path: Path) -> bool:
        if self.sha256 is not None:
            return hash_file(path) == self.sha256
        if self.git_sha1 is not None:
            content = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == self.git_sha1
        return True


def pull_repo(
    rest: str,
    store: Store,
    *,
    offline: bool,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """`rest` is org/repo or org/repo/file.gguf. A model in the cache of huggingface_hub is used where it lies.

    Raises NotFoundError, InputError (several GGUF files, pickles only, a gated model), NetworkError, ResourceError.
    """
    name = f"hf:{rest}"
    manifest = store.get(name)
    found = None
    with contextlib.suppress(InputError):  # an unfinished or ambiguous copy in the cache: fetch our own
        found = discover.find("hf", rest) if manifest is None else None
    if found is not None:
        if tell is not None:
            tell(f"{name} is in the Hugging Face cache already and is used there: {found.path}")
        return found.path
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        if manifest is not None:
            return store.path(manifest)
        raise NetworkError(f"{printable(name)} is not on this machine, and offline mode forbids fetching it", code="E_OFFLINE")
    repo, info, chosen = _ask(rest)
    with store.writing(f"pull {name}", tell=tell):
        missing = [file for file in chosen if file.sha256 is None or not store.has_blob(f"sha256:{file.sha256}", file.size)]
        check_disk(store.root, sum(file.size - _have(store.partial / _key(file)) for file in missing), name)
        stored = tuple(_store(repo, str(info.sha), file, store, file not in missing, progress) for file in chosen)
        manifest = store.put(name, stored, source=f"hf:{repo}@{info.sha}", licence=_licence(info))
    return store.path(manifest)


@contextlib.contextmanager
def preview(rest: str, folder: Path) -> Iterator[tuple[Path, int]]:
    """(model, bytes to fetch) of a model that is not here: its files in full length but with headers only, the rest a hole.

    They lie in a temporary folder below `folder` and take a few megabytes. Good for `describe`, useless for anything that
    reads weights. Raises as `pull_repo`.
    """
    repo, info, chosen = _ask(rest)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="preview-", dir=folder) as temporary:
        root = Path(temporary)
        ggufs = discover.model_files([file.path for file in chosen])
        path = root / ggufs[0] if ggufs else root
        for generous in (False, True):
            for file in chosen:
                _fetch_header(repo, str(info.sha), file, root / file.path, generous)
            if _complete(path):
                break
        yield path, sum(file.size for file in chosen)


def _fetch_header(repo: str, commit: str, file: RemoteFile, target: Path, generous: bool) -> None:
    """The beginning of a weight file and a hole of the right length, or all of any other file."""
    sizes = HEADER_BYTES.get(target.suffix)
    url, headers = _address(repo, commit, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    fetch_start(url, target, file.size if sizes is None else min(sizes[generous], file.size), what=file.path, headers=headers)
    os.truncate(target, file.size)


def _complete(path: Path) -> bool:
    """True if the headers of a preview are whole; zeros where a header goes on break its format."""
    from nomoat.files.gguf import open_gguf
    from nomoat.files.safetensors import open_safetensors

    try:
        (open_safetensors if path.is_dir() else open_gguf)(path).close()
    except FileFormatError:
        return False
    return True


def _ask(rest: str) -> tuple[str, ModelInfo, list[RemoteFile]]:
    """(repository, what the hub says about it, the files that make up the model)."""
    organisation, repository, *inner = rest.split("/")
    repo = f"{organisation}/{repository}"
    info = _model_info(repo)
    return repo, info, choose_files(repo, _files(info), "/".join(inner))


def choose_files(repo: str, files: list[RemoteFile], wanted: str) -> list[RemoteFile]:
    """The files to fetch: `wanted` (with its other parts), else the safetensors folder, else the one GGUF that stands out."""
    names = [file.path for file in files]
    if wanted and wanted not in names:
        near = "\n".join(f"  hf:{repo}/{printable(path)}" for path in discover.model_files(names)[:40])
        raise NotFoundError(f"hf:{repo} has no file {printable(wanted)!r}. Its GGUF files are:\n{near or '  (none)'}")
    weights = _folder_weights(names) if "config.json" in names and not wanted else []
    if weights:
        return [file for file in files if file.path in weights or file.path in FOLDER_FILES]
    ggufs = discover.model_files(names)
    if not ggufs and not wanted:
        pickled = any(path.endswith((".bin", ".pt", ".pth")) for path in names)
        why = "only pickled weights, which can run code and are refused" if pickled else "no GGUF and no safetensors files"
        raise InputError(f"hf:{repo} holds {why}. Look for a safetensors or GGUF version of the model", code="E_FORMAT")
    first = wanted or discover.choose_gguf(f"hf:{repo}", ggufs)
    if not first.endswith(".gguf"):
        raise InputError(f"hf:{repo}/{printable(first)}: expected the name of a .gguf file, or hf:{repo} alone", code="E_FORMAT")
    part = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", first)
    pattern = rf"{re.escape(part[1])}-\d{{5}}-of-{part[2]}\.gguf" if part else re.escape(first)
    return [file for file in files if re.fullmatch(pattern, file.path)]


def _folder_weights(names: list[str]) -> list[str]:
    """Weight files of the top folder; a second copy in another naming (consolidated.safetensors) is left out."""
    sharded = [name for name in names if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)]
    single = [name for name in names if name == "model.safetensors"]
    if "model.safetensors.index.json" in names and sharded:
        return sharded
    return single or sharded


def _model_info(repo: str) -> ModelInfo:
    """What the hub says about a repository, with sizes and digests of its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    for attempt in range(4):
        try:
            return api.model_info(repo, files_metadata=True, timeout=30)
        except GatedRepoError:
            raise InputError(
                f"hf:{repo} asks its users to accept terms first: do so on its page, then set HF_TOKEN to your access token"
            ) from None
        except RepositoryNotFoundError:
            raise NotFoundError(
                f"the hub has no model {repo}, or it is private: check the spelling; for a private model set HF_TOKEN "
                "to your access token"
            ) from None
        except HfHubHTTPError as error:
            trouble, temporary = str(error), getattr(error.response, "status_code", 0) in RETRY_STATUS
        except Exception as error:  # whatever HTTP library huggingface_hub is built on: its errors share no base with OSError
            trouble, temporary = str(error) or type(error).__name__, True
        if not temporary:
            break
        time.sleep(0.5 * 2**attempt)
    raise NetworkError(f"hf:{repo}: the hub {printable(api.endpoint)} cannot be asked: {printable(trouble.splitlines()[0])}")


def _files(info: ModelInfo) -> list[RemoteFile]:
    files = []
    for sibling in info.siblings or []:
        check_relative(sibling.rfilename)
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        size = sibling.lfs.size if sibling.lfs is not None else sibling.size
        files.append(RemoteFile(sibling.rfilename, int(size or 0), sha256, sibling.blob_id if sha256 is None else None))
    return files


def _store(repo: str, commit: str, file: RemoteFile, store: Store, present: bool, progress: Progress | None) -> StoredFile:
    """One file as a blob of the store, fetched unless it is there."""
    if present:
        return store.file(file.path, f"sha256:{file.sha256}", file.size)
    partial = store.partial / _key(file)
    if file.size == 0:
        partial.touch()
    url, headers = _address(repo, commit, file)
    fetch(url, partial, size=file.size, check=file.matches, what=file.path, headers=headers, progress=progress)
    return store.add_blob(partial, file.path)


def _address(repo: str, commit: str, file: RemoteFile) -> tuple[str, dict[str, str]]:
    """(URL, headers) of one file."""
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    url = hf_hub_url(repo, file.path, revision=commit, endpoint=os.environ.get("HF_ENDPOINT"))
    return url, {"Authorization": f"Bearer {token}"} if token else {}


def _key(file: RemoteFile) -> str:
    """Name of the unfinished download: by content, so that another name or a later commit goes on with the same bytes."""
    identity = file.sha256 or file.git_sha1 or file.path
    return hashlib.sha256(identity.encode()).hexdigest()


def _have(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def _licence(info: ModelInfo) -> str:
    for tag in info.tags or []:
        if tag.startswith("license:"):
            return printable(tag.removeprefix("license:"))
    return "not stated"
