"""The model store: content-addressed blobs and one JSON manifest for each model name.

    blobs/sha256-<hex>       the bytes of one file, read-only, named by their digest
    manifests/<name>.json    model name -> files (path, digest, size), source, licence, time
    trees/<id>/<path>        the files under their own names: hard links to blobs, rebuilt when missing
    partial/<key>            unfinished downloads, kept so that they can go on
    tmp/                     scratch space of the process that holds the lock
    lock                     one writer at a time; readers take no lock

Order of writing: blob (fsync, rename, fsync of the folder), then manifest (the same). Order of removing: manifest, then
blobs. So a manifest never names a blob that is not there, wherever a process is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from nomoat import settings
from nomoat.errors import FileFormatError, NotFoundError, ResourceError, printable
from nomoat.files.atomic import atomic_write, fsync_folder, sweep
from nomoat.hub.lock import exclusive

FORMAT = 1


def parse_digest(text: str) -> str:
    """ "sha256:<64 lower-case hex>" -> the hex digits. The only place that reads a digest out of a file, because digests become
    file names: anything else ("sha256:../../x", upper case, a trailing newline) is FileFormatError E_PATH."""
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", text)
    if match is None:
        raise FileFormatError(f"digest {printable(text[:100])!r}: expected sha256: and 64 lower-case hex digits", code="E_PATH")
    return match[1]


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """sha256 of a file as 64 hex digits. `on_bytes` is told the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            done += len(chunk)
            if on_bytes is not None:
                on_bytes(done)
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """`path` is relative with forward slashes; `digest` is "sha256:<hex>"; `size` in bytes."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """One model of the store. A GGUF model has one file (or its shards), a Hugging Face folder has several."""

    name: str
    files: tuple[StoredFile, ...]
    source: str
    licence: str
    created: str
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def tree(self) -> str:
        """Name of the folder that shows these files: the same files, the same folder."""
        listing = "\n".join(f"{file.path}\t{file.digest}" for file in sorted(self.files, key=lambda file: file.path))
        return hashlib.sha256(listing.encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, path: Path) -> Manifest:
        """Raises FileFormatError for anything that this version did not write, unsafe file paths included."""
        try:
            record = json.loads(text)
            files = tuple(StoredFile(str(f["path"]), str(f["digest"]), int(f["size"])) for f in record["files"])
            name, source, licence, created = (str(record[key]) for key in ("name", "source", "licence", "created"))
            manifest = Manifest(name, files, source, licence, created, int(record["format"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = printable(repr(error))
            raise FileFormatError(f"not a manifest of the model store ({why})", code="E_MANIFEST", path=path) from None
        if manifest.format != FORMAT:
            raise FileFormatError(
                f"manifest format {manifest.format}; this version reads {FORMAT}. Update nomoat or pull the model again",
                code="E_VERSION",
                path=path,
            )
        if not files:
            raise FileFormatError("a manifest without files", code="E_MANIFEST", path=path)
        for file in files:
            parse_digest(file.digest)
            check_relative(file.path)
        return manifest


def check_relative(path: str) -> None:
    """A path that stays below its folder on every system, else FileFormatError E_PATH."""
    parts = PurePosixPath(path).parts
    unsafe = not parts or path.startswith("/") or ".." in parts or any(c in path for c in '\\:*?"<>|\0') or not path.isprintable()
    if unsafe:
        raise FileFormatError(f"unsafe file path {printable(path)!r} in a model", code="E_PATH")


class Store:
    """The folder of models. Reading needs no lock; every writing method must be called inside `with store.writing(...)`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = settings.models_dir() if root is None else root
        self.blobs, self.manifests = self.root / "blobs", self.root / "manifests"
        self.trees, self.partial, self.tmp = self.root / "trees", self.root / "partial", self.root / "tmp"

    # ---- reading

    def names(self) -> list[str]:
        """Names of all readable models, sorted."""
        return sorted(manifest.name for manifest in self.read_all()[0])

    def read_all(self) -> tuple[list[Manifest], list[FileFormatError]]:
        """All manifests, sorted by name, and one error for each that cannot be read."""
        found: list[Manifest] = []
        damaged: list[FileFormatError] = []
        for path in sorted(self.manifests.glob("*.json")) if self.manifests.is_dir() else []:
            try:
                found.append(self._read(path))
            except FileFormatError as error:
                damaged.append(error)
        return sorted(found, key=lambda manifest: manifest.name), damaged

    def has(self, name: str) -> bool:
        """True if the name is taken, even by a damaged manifest."""
        return self._manifest_path(name).is_file()

    def get(self, name: str) -> Manifest | None:
        """The manifest of a model, or None. Raises FileFormatError if it is damaged."""
        return self._read(self._manifest_path(name)) if self.has(name) else None

    def path(self, manifest: Manifest) -> Path:
        """Where to open the model: the .gguf file (its first shard), or the folder of a Hugging Face model.

        Sizes are checked here, digests in `verify`. Raises FileFormatError E_MISSING if a blob is gone or cut short.
        """
        for file in manifest.files:
            blob = self.blob_path(file.digest)
            size = blob.stat().st_size if blob.is_file() else -1
            if size != file.size:
                seen = "it is missing" if size < 0 else f"it has {size:,} bytes"
                raise FileFormatError(
                    f"the store's copy of {printable(manifest.name)} is damaged: {file.path} should have {file.size:,} bytes, "
                    f"{seen}. "
                    f"Repair it with: nomoat pull {printable(manifest.name)}",
                    code="E_MISSING",
                    path=blob,
                )
        tree = self.trees / manifest.tree
        if not all((tree / file.path).is_file() for file in manifest.files):
            with self.writing(f"show {manifest.name}"):
                self._build_tree(manifest)
        ggufs = sorted(file.path for file in manifest.files if file.path.endswith(".gguf"))
        return tree / ggufs[0] if ggufs else tree

    def blob_path(self, digest: str) -> Path:
        return self.blobs / f"sha256-{parse_digest(digest)}"

    def verify(self, *, deep: bool = True) -> list[str]:
        """Everything that is wrong with the store, one sentence each; empty if it is sound. `deep` hashes every blob."""
        manifests, damaged = self.read_all()
        problems = [str(error) for error in damaged]
        checked: dict[str, str | None] = {}
        for manifest in manifests:
            for file in manifest.files:
                if file.digest not in checked:
                    checked[file.digest] = self._blob_fault(file, deep=deep)
                if (fault := checked[file.digest]) is not None:
                    problems.append(f"{printable(manifest.name)}: {file.path}: {fault}")
        return problems

    # ---- writing

    @contextlib.contextmanager
    def writing(self, purpose: str, *, tell: Callable[[str], None] | None = None, wait: float = 3600.0) -> Iterator[None]:
        """Hold the store's lock. Whatever a dead process left in tmp/ is removed first."""
        with exclusive(self.root / "lock", purpose, tell=tell, wait=wait):
            self._clear_tmp()
            for folder in (self.blobs, self.manifests, self.trees, self.partial, self.tmp):
                folder.mkdir(parents=True, exist_ok=True)
            sweep(self.manifests)
            try:
                yield
            finally:
                self._clear_tmp()

    def add_blob(self, source: Path, path: str) -> StoredFile:
        """Move a finished file (in tmp/ or partial/, so on the same disk) into the store; it is `path` in its model."""
        check_relative(path)
        digest, size = hash_file(source), source.stat().st_size
        with source.open("rb+") as file:
            os.fsync(file.fileno())
        source.chmod(0o444)
        os.replace(source, self.blobs / f"sha256-{digest}")
        fsync_folder(self.blobs)
        return StoredFile(path, f"sha256:{digest}", size)

    def file(self, path: str, digest: str, size: int) -> StoredFile:
        """A blob of this store under the relative `path`."""
        check_relative(path)
        self.blob_path(digest)
        return StoredFile(path, digest, size)

    def has_blob(self, digest: str, size: int) -> bool:
        """True if these bytes are already here and sound (hashed now)."""
        return self._blob_fault(StoredFile("", digest, size), deep=True) is None

    def put(self, name: str, files: tuple[StoredFile, ...], *, source: str, licence: str) -> Manifest:
        """Give a name to files that are in the store, replacing an earlier meaning of that name."""
        manifest = Manifest(name, files, source, licence, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self._build_tree(manifest)
        with atomic_write(self._manifest_path(name)) as file:
            file.write(manifest.to_json().encode())
        return manifest

    def remove(self, name: str) -> int:
        """Forget a model and delete the blobs that no other model uses. Returns the bytes freed. Raises NotFoundError."""
        if not self.has(name):
            raise NotFoundError(f"no model {printable(name)!r} in the store {self.root}; `nomoat models` lists what is there")
        self._manifest_path(name).unlink()
        fsync_folder(self.manifests)
        return self.gc()

    def gc(self, *, partial: bool = False) -> int:
        """Delete blobs and trees that no manifest names (and unfinished downloads, if `partial`). Returns the bytes freed.

        A blob stays if its digest occurs anywhere in a manifest, so that a damaged manifest loses nothing.
        """
        texts = [path.read_bytes() for path in self.manifests.glob("*.json")]
        trees = {manifest.tree for manifest in self.read_all()[0]}
        freed = 0
        for tree in self.trees.iterdir():
            if tree.name not in trees:
                shutil.rmtree(tree)
        for blob in self.blobs.iterdir():
            if not any(blob.name.removeprefix("sha256-").encode() in text for text in texts):
                freed += _unlink(blob)
        if partial:
            freed += sum(_unlink(path) for path in self.partial.iterdir())
        return freed

    # ---- private

    def _manifest_path(self, name: str) -> Path:
        """Readable and unique on case-insensitive disks too: a slug and a few digits of the name's hash."""
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60]
        return self.manifests / f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:10]}.json"

    def _read(self, path: Path) -> Manifest:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"unreadable ({printable(str(error))})", code="E_MANIFEST", path=path) from None
        manifest = Manifest.from_json(text, path)
        if self._manifest_path(manifest.name) != path:
            shown = printable(manifest.name)
            raise FileFormatError(f"holds the name {shown!r}, which belongs elsewhere", code="E_MANIFEST", path=path)
        return manifest

    def _blob_fault(self, file: StoredFile, *, deep: bool) -> str | None:
        blob = self.blob_path(file.digest)
        if not blob.is_file():
            return "missing"
        if (size := blob.stat().st_size) != file.size:
            return f"{size:,} bytes instead of {file.size:,}"
        if deep and f"sha256:{hash_file(blob)}" != file.digest:
            return "its bytes do not match its digest"
        return None

    def _build_tree(self, manifest: Manifest) -> None:
        """Show the blobs under their file names. Made beside and renamed, so a tree is whole or absent."""
        target, scratch = self.trees / manifest.tree, self.tmp / manifest.tree
        if all(_same(target / file.path, self.blob_path(file.digest)) for file in manifest.files):
            return
        for file in manifest.files:
            link = scratch / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            _link(self.blob_path(file.digest), link)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)

    def _clear_tmp(self) -> None:
        shutil.rmtree(self.tmp, ignore_errors=True)


def _same(link: Path, blob: Path) -> bool:
    """True if both are one file. A repaired blob is a new file, so its old link is replaced; copies are renewed too."""
    return link.is_file() and os.path.samefile(link, blob)


def _link(blob: Path, link: Path) -> None:
    """Hard link, else (file systems without them) a copy: needs no rights on any system."""
    try:
        os.link(blob, link)
    except OSError:
        shutil.copyfile(blob, link)


def _unlink(path: Path) -> int:
    size = path.stat().st_size
    path.chmod(0o644)  # Windows refuses to delete read-only files
    path.unlink()
    return size


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises ResourceError E_DISK unless the disk of `folder` has `needed` bytes and 64 MiB to spare."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + (64 << 20):
        raise ResourceError(
            f"{what} needs {needed / 1e6:,.0f} MB and 64 MiB to spare; the disk of {existing} has {free / 1e6:,.0f} MB free. "
            "Free some space (`nomoat rm MODEL`), or set NOMOAT_HOME to a folder on another disk",
            code="E_DISK",
        )
