"""Architectures: from the description in a file to a ModelSpec. One file each, one row each in the tables below."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from nomoat.errors import ModelError, printable
from nomoat.models.fields import Fields
from nomoat.models.spec import TARGETS, LayerSpec, ModelSpec, RopeSpec, Source

if TYPE_CHECKING:
    from nomoat.files.gguf import GgufFile

__all__ = [
    "GGUF_ARCHITECTURES",
    "HF_MODEL_TYPES",
    "TARGETS",
    "LayerSpec",
    "ModelSpec",
    "RopeSpec",
    "Source",
    "architecture",
    "spec_from_gguf",
    "spec_from_hf",
]

#: `general.architecture` of a GGUF, which is also `ModelSpec.architecture` -> module of this package
GGUF_ARCHITECTURES = {"llama": "llama"}
#: `model_type` of a Hugging Face config -> module of this package
HF_MODEL_TYPES = {"llama": "llama", "mistral": "llama"}


def architecture(spec: ModelSpec) -> ModuleType:
    """The module of a model's architecture: PEFT_MODULES and the like."""
    return import_module(f"nomoat.models.{GGUF_ARCHITECTURES[spec.architecture]}")


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """Describes an open GGUF. Raises ModelError where nomoat cannot run it."""
    where = printable(file.path.name)
    general = Fields(file.metadata, where, prefix="general.", strict=True)
    if general.text("type", default="model") == "adapter":
        raise ModelError(f"{where}: this is an adapter, not a model; give the model's name first and add the adapter with `+`")
    spec = _module(where, general.text("architecture"), GGUF_ARCHITECTURES).spec_from_gguf(file)
    assert isinstance(spec, ModelSpec)
    return spec


def spec_from_hf(config: Mapping[str, object], names: Collection[str], *, name: str = "model") -> ModelSpec:
    """Describes a Hugging Face folder by its parsed config.json and its tensors (`SafetensorsFile.tensors`, or bare names).

    Given the mapping, shapes and dtypes are checked too. Raises ModelError where nomoat cannot run it.
    """
    where = f"{printable(name)}/config.json"
    spec = _module(where, Fields(config, where).text("model_type"), HF_MODEL_TYPES).spec_from_hf(config, names, name=name)
    assert isinstance(spec, ModelSpec)
    return spec


def _module(where: str, kind: str, table: Mapping[str, str]) -> ModuleType:
    if kind not in table:
        raise ModelError(
            f"{where}: architecture `{printable(kind)[:60]}` is not supported by this version of nomoat; "
            f"supported: {', '.join(sorted(table))}"
        )
    return import_module(f"nomoat.models.{table[kind]}")
