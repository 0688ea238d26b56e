"""Adapter packages: a PEFT directory plus `nomoat.json`.

    adapter_config.json         PEFT's settings (see convert/peft.py)
    adapter_model.safetensors   A and B, in Hugging Face row order, so that PEFT reads it as it is
    nomoat.json                 the manifest: for whom it was made, from what, and how well it does
    README.md                   a model card

A package is data: these names and `.gitattributes` are all that may be in it. The same adapter gives the same bytes in
every file; no file holds a time. The manifest (`Manifest`) is optional when reading, so packages of other tools load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nomoat.adapters.convert.peft import MAX_MODULE_RANK, from_peft, module_of, parse_config, to_peft
from nomoat.engine.stack import Adapter
from nomoat.errors import AdapterError, NotFoundError, printable
from nomoat.files.atomic import atomic_folder, sweep
from nomoat.files.safetensors import open_safetensors, write_safetensors
from nomoat.models.spec import LINEARS, ModelSpec

#: nomoat.json. Keys: format, base, rank, alpha, targets, chat_template, stop_ids, recipe, data, engine, evaluation, licences,
#: parents, files. `base` is a `Model.fingerprint` and `model`, the catalogue name. `evaluation` is
#: {"metric", "rows", "before", "after"}, scores as [score, low, high].
Manifest = dict[str, Any]

FORMAT = 1
CONFIG, WEIGHTS, MANIFEST, CARD = "adapter_config.json", "adapter_model.safetensors", "nomoat.json", "README.md"
ALLOWED = frozenset({CONFIG, WEIGHTS, MANIFEST, CARD, ".gitattributes"})
MAX_JSON = 1 << 20  # bytes
#: Keys of the manifest that hold objects or lists; one left out is an empty one.
MANIFEST_TYPES: dict[str, type[dict[str, Any]] | type[list[Any]]] = {
    "base": dict,
    "targets": list,
    "recipe": dict,
    "data": dict,
    "engine": dict,
    "evaluation": dict,
    "licences": dict,
    "parents": list,
    "files": dict,
}


def check_base(manifest: Manifest, base: Mapping[str, Any]) -> str | None:
    """Compares the manifest's base with the model at hand (`Model.fingerprint`).

    Returns a note where it is another quantization of the same model, None where the file is the same or the manifest names
    no base. Raises AdapterError E_ARCH, naming both, for another model.
    """
    made_for = manifest.get("base")
    if not made_for:
        return None
    differences = [
        f"{key} {_short(made_for[key])} there, {_short(base[key])} here"
        for key in ("architecture", "dimensions", "vocabulary")
        if key in made_for and made_for[key] != base[key]
    ]
    theirs, ours = _short(made_for.get("name")), _short(base["name"])
    if differences:
        raise AdapterError(
            f"this adapter was made for {theirs}, the model here is {ours}: {'; '.join(differences)}. "
            "Use the base model that it was made for",
            code="E_ARCH",
        )
    if made_for.get("digest") == base["digest"]:
        return None
    return f"the adapter was trained on another file of {theirs} (for example another quantization); scores may differ a little"


def load_adapter(path: Path | str, spec: ModelSpec, *, base: Mapping[str, Any] | None = None) -> tuple[Adapter, Manifest]:
    """Reads a package. `base` (`Model.fingerprint`) is compared with the manifest where there is one.

    Raises NotFoundError, FileFormatError, or AdapterError: E_TYPE, E_LIMIT, E_SHAPE, E_ARCH, E_JSON, E_HASH, E_NONFINITE.
    """
    folder = Path(path)
    _check_names(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    if base is not None:
        check_base(manifest, base)
    config = parse_config(_read_json(folder / CONFIG))
    with open_safetensors(folder / WEIGHTS) as file:
        for name, slot in file.tensors.items():  # names and shapes before any byte of the weights is read
            module, side = module_of(name, spec, config)
            rows, columns = module.shape(spec)
            most = MAX_MODULE_RANK * module.stacked(spec)
            fits = len(slot.shape) == 2 and 1 <= slot.shape[0 if side == "A" else 1] <= most
            if not module.fits(spec) or not fits or slot.shape[1 if side == "A" else 0] != (columns if side == "A" else rows):
                raise AdapterError(
                    f"tensor {printable(name)} is {list(slot.shape)}; the base model {printable(spec.name)} has {spec.layers} "
                    f"layers, and its weight there is [{rows}, {columns}]. Is this adapter for another model?",
                    code="E_SHAPE",
                )
        arrays = {name: file.array(name) for name in file.tensors}
    return from_peft(config, arrays, spec), manifest


def read_manifest(folder: Path) -> Manifest:
    """nomoat.json, or {} where there is none. Raises AdapterError E_JSON, E_LIMIT or E_TYPE."""
    if not (folder / MANIFEST).exists():
        return {}
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise AdapterError(f"{printable(str(folder))}: nomoat.json is not an object", code="E_JSON")
    version = manifest.get("format")
    if version != FORMAT:
        raise AdapterError(
            f"{printable(str(folder))}: nomoat.json has format {_short(version)}; this version of nomoat reads {FORMAT}. "
            "A newer nomoat may read it",
            code="E_TYPE",
        )
    for key, kind in MANIFEST_TYPES.items():
        if not isinstance(manifest.setdefault(key, kind()), kind):
            shown = f"{printable(str(folder))}: nomoat.json: `{key}` is {_short(manifest[key])}"
            raise AdapterError(f"{shown}; expected {'a list' if kind is list else 'an object'}", code="E_TYPE")
    return manifest


def _check_names(folder: Path) -> None:
    shown = printable(str(folder))
    if not folder.is_dir():
        raise NotFoundError(f"{shown}: there is no adapter folder of that name")
    names = {entry.name: entry for entry in os.scandir(folder)}
    if WEIGHTS not in names and "adapter_model.bin" in names:
        raise AdapterError(
            f"{shown} has its weights only as adapter_model.bin, a pickle, which can run code when it is read and is refused. "
            "Convert it where you trust it: load it with peft, then save_pretrained(folder, safe_serialization=True)",
            code="E_TYPE",
        )
    for name, entry in sorted(names.items()):
        if name not in ALLOWED or not entry.is_file():
            raise AdapterError(
                f"{shown} holds {_short(name)}, which does not belong into an adapter. Copy {CONFIG} and {WEIGHTS} into a "
                f"folder of their own (allowed: {', '.join(sorted(ALLOWED))})",
                code="E_TYPE",
            )
    for name in (CONFIG, WEIGHTS):
        if name not in names:
            raise AdapterError(f"{shown} has no {name}; a PEFT adapter folder has {CONFIG} and {WEIGHTS}", code="E_JSON")


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Sizes and digests of the manifest against the files. Raises AdapterError E_HASH."""
    for name, record in sorted(manifest.get("files", {}).items()):
        if name not in ALLOWED or not (folder / name).is_file() or not isinstance(record, dict):
            raise AdapterError(f"{printable(str(folder))}: nomoat.json lists {_short(name)}, which is not there", code="E_HASH")
        path = folder / name
        if record.get("bytes") != path.stat().st_size or record.get("sha256") != file_digest(path):
            raise AdapterError(
                f"{printable(str(path))} is not the file that nomoat.json describes; it was changed or damaged. "
                "Get the adapter again, or train it again",
                code="E_HASH",
            )


def _read_json(path: Path) -> Any:
    """Strict JSON of at most 1 MiB. NaN and infinities pass: the checks of each field name them. Raises AdapterError."""
    shown = printable(str(path))
    with path.open("rb") as file:
        raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise AdapterError(f"{shown} is larger than {MAX_JSON:,} bytes", code="E_LIMIT")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("it has the same key twice")
        return found

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise AdapterError(f"{shown} is not valid JSON: {printable(reason)[:200]}", code="E_JSON") from None


def save_adapter(path: Path | str, adapter: Adapter, spec: ModelSpec, manifest: Manifest, *, replace: bool = False) -> Path:
    """Writes the package as a whole or not at all; returns its folder.

    Raises AdapterError E_DUP where `path` exists and `replace` is off, E_NONFINITE and E_SHAPE for an adapter that does not
    fit the model, ResourceError where the disk is full.
    """
    adapter.check(spec)
    folder = Path(path)
    if folder.exists() and not replace:
        raise AdapterError(
            f"{printable(str(folder))} exists already; choose another name, or replace it on purpose", code="E_DUP"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    with atomic_folder(folder) as new:
        config, arrays = to_peft(adapter, spec, base=manifest.get("base", {}).get("huggingface"))
        write_safetensors(new / WEIGHTS, arrays, {"format": "pt"})
        (new / CONFIG).write_text(_json(config), encoding="utf-8")
        (new / CARD).write_text(model_card(folder.name, manifest), encoding="utf-8")
        files = {name: {"bytes": (new / name).stat().st_size, "sha256": file_digest(new / name)} for name in (CONFIG, WEIGHTS)}
        facts = {
            "format": FORMAT,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": [target for target in LINEARS if target in adapter.targets],
            "files": files,
        }
        (new / MANIFEST).write_text(_json({**manifest, **facts}), encoding="utf-8")
        load_adapter(new, spec)  # what was written is what will be read
    return folder


def model_card(name: str, manifest: Manifest) -> str:
    """README.md with the front matter that model hubs read."""
    base = manifest.get("base", {})
    lines = ["---", "library_name: peft", "tags:", "- lora", "- nomoat", "base_model_relation: adapter"]
    if base.get("huggingface"):
        lines.append(f"base_model: {base['huggingface']}")
    lines += ["---", "", f"# {name}", ""]
    if base.get("name"):
        lines += [f"An adapter for {base['name']}, trained with nomoat.", ""]
    evaluation = manifest.get("evaluation")
    if evaluation:
        lines += ["| | score | 95 % interval |", "|---|---|---|"]
        for key in ("before", "after"):
            if evaluation.get(key):
                score, low, high = evaluation[key]
                lines.append(f"| {key} ({evaluation['metric']}) | {score:.3f} | {low:.3f} to {high:.3f} |")
        lines.append("")
    return "\n".join(lines)


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _short(value: object) -> str:
    text = printable(str(value))
    return text if len(text) <= 60 else text[:57] + "..."
