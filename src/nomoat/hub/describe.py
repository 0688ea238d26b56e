"""What a model file says about itself, without loading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nomoat.errors import NomoatError, printable

if TYPE_CHECKING:
    from nomoat.files.gguf import GgufFile
    from nomoat.models.spec import ModelSpec
    from nomoat.text.tokenizer import Tokenizer

T = TypeVar("T")

#: last part of an engine name -> class; those that end in `_bias` are biases, every other name is a norm
_CLASSES = {
    "embed": "embedding",
    "head": "head",
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("gate", "up", "down", "shared_gate", "shared_up", "shared_down"), "mlp"),
    **dict.fromkeys(("router", "shared_router"), "router"),
}


@dataclass(frozen=True)
class Description:
    """`types`: tensor class -> type name -> tensors. `problem` says why nomoat cannot run the model, or is empty."""

    path: Path
    format: str
    title: str
    architecture: str
    size: int
    parameters: int
    types: dict[str, dict[str, int]]
    licence: str
    template: str | None
    bos: str | None
    ends: list[str]
    spec: ModelSpec | None = field(repr=False)
    notes: list[str]
    problem: str


def describe(path: Path) -> Description:
    """Read headers only. Raises FileFormatError or ModelError for files that cannot be read at all."""
    return _describe_folder(path) if path.is_dir() else _describe_gguf(path)


def _describe_gguf(path: Path) -> Description:
    from nomoat.files.gguf import open_gguf
    from nomoat.models import spec_from_gguf
    from nomoat.text.tokenizer import Tokenizer

    with open_gguf(path) as file:
        problems: list[str] = []
        spec = _attempt(lambda: spec_from_gguf(file), problems)
        tokenizer = _attempt(lambda: Tokenizer.from_gguf(file), problems)
        bos, ends = _special(tokenizer)
        types = {tensor.name: (tensor.type.name, math.prod(tensor.shape)) for tensor in file.tensors.values()}
        return Description(
            path=path,
            format=f"GGUF version {file.version}",
            title=printable(_text(file, "general.name") or path.name),
            architecture=printable(_text(file, "general.architecture") or "not stated"),
            size=file.nbytes,
            parameters=sum(count for _, count in types.values()),
            types=_classes(types, spec),
            licence=printable(_text(file, "general.license") or "not stated"),
            template=_text(file, "tokenizer.chat_template"),
            bos=bos,
            ends=ends,
            spec=spec,
            notes=list(spec.notes) if spec is not None else [],
            problem="; ".join(problems),
        )


def _describe_folder(path: Path) -> Description:
    from nomoat.files.safetensors import open_safetensors
    from nomoat.models import spec_from_hf
    from nomoat.models.hf import read_config
    from nomoat.text.tokenizer import Tokenizer
    from nomoat.text.tokenizer_json import template_source

    config = read_config(path)
    with open_safetensors(path) as file:
        problems: list[str] = []
        spec = _attempt(lambda: spec_from_hf(config, file.tensors, name=path.name), problems)
        tokenizer = _attempt(lambda: Tokenizer.from_folder(path), problems)
        bos, ends = _special(tokenizer)
        types = {tensor.name: (tensor.dtype, math.prod(tensor.shape)) for tensor in file.tensors.values()}
        return Description(
            path=path,
            format="Hugging Face folder",
            title=printable(str(config.get("_name_or_path") or path.name)),
            architecture=printable(str(config.get("model_type") or "not stated")),
            size=file.nbytes,
            parameters=sum(count for _, count in types.values()),
            types=_classes(types, spec),
            licence="not stated",
            template=_attempt(lambda: template_source(path), problems),
            bos=bos,
            ends=ends,
            spec=spec,
            notes=list(spec.notes) if spec is not None else [],
            problem="; ".join(problems),
        )


def _attempt(read: Callable[[], T], problems: list[str]) -> T | None:
    """What `read` gives, or None with its error noted: a model that cannot run can still be described."""
    try:
        return read()
    except NomoatError as error:
        problems.append(str(error))
        return None


def _text(file: GgufFile, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _special(tokenizer: Tokenizer | None) -> tuple[str | None, list[str]]:
    """(token that starts a text, tokens that end an answer), as text."""
    if tokenizer is None:
        return None, []
    bos = None if tokenizer.bos_id is None else printable(tokenizer.token_text(tokenizer.bos_id))
    return bos, [printable(tokenizer.token_text(token)) for token in sorted(tokenizer.eos_ids)]


def _classes(types: dict[str, tuple[str, int]], spec: ModelSpec | None) -> dict[str, dict[str, int]]:
    """Tensors counted by class and type; all are "weights" where the architecture is not known."""
    engine_names = (
        {}
        if spec is None
        else {tensor: name.rpartition(".")[2] for name, source in spec.tensors.items() for tensor in source.names}
    )
    counts: dict[str, Counter[str]] = {}
    for name, (kind, _) in types.items():
        known = engine_names.get(name)
        if known is None:
            group = "weights" if spec is None else "unused"
        else:
            group = "biases" if known.endswith("_bias") else _CLASSES.get(known, "norms")
        counts.setdefault(group, Counter())[kind] += 1
    return {group: dict(counter.most_common()) for group, counter in counts.items()}
