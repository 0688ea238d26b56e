"""Architectures: from the description in a file to a ModelSpec. One file each, one row each in the tables below."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nomoat.errors import ModelError, printable
from nomoat.models.fields import Fields
from nomoat.models.spec import TARGETS, LayerSpec, ModelSpec, RopeSpec, Source

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nomoat.files.gguf import GgufFile
    from nomoat.models.arch import Architecture

__all__ = [
    "GGUF_ARCHITECTURES",
    "HF_MODEL_TYPES",
    "TARGETS",
    "LayerSpec",
    "ModelSpec",
    "RopeSpec",
    "Source",
    "architecture",
    "gguf_form",
    "spec_from_gguf",
    "spec_from_hf",
]

#: `general.architecture` of a GGUF, which is also `ModelSpec.architecture` -> module of this package
GGUF_ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "granite": "granite",
    "llama": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3moe",
    "smollm3": "smollm3",
    "starcoder2": "starcoder2",
}
#: `model_type` of a Hugging Face config -> module of this package
HF_MODEL_TYPES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "starcoder2": "starcoder2",
}


def architecture(spec: ModelSpec) -> ModuleType:
    """The module of a model's architecture: PEFT_MODULES and the like."""
    return import_module(f"nomoat.models.{GGUF_ARCHITECTURES[spec.architecture]}")


def spec_from_gguf(file: GgufFile, *, context: int | None = None) -> ModelSpec:
    """Describes an open GGUF. Raises ModelError where nomoat cannot run it.

    `context` is what the model will run with, at most what it was trained for. It matters for models with short and long
    rotary factors (Phi 3 of 128k tokens): None is the context up to which the short ones hold (Draft.usable_context).
    """
    from nomoat.models import read_gguf

    where = printable(file.path.name)
    general = Fields(file.metadata, where, prefix="general.", strict=True)
    if general.text("type", default="model") == "adapter":
        raise ModelError(f"{where}: this is an adapter, not a model; give the model's name first and add the adapter with `+`")
    arch = _architecture(where, general.text("architecture"), GGUF_ARCHITECTURES)
    return read_gguf.read(arch, read_gguf.Contents.of(file), context=context)


def spec_from_hf(
    config: Mapping[str, object], names: Collection[str] | None, *, name: str = "model", context: int | None = None
) -> ModelSpec:
    """Describes a Hugging Face folder by its parsed config.json and its tensors (`SafetensorsFile.tensors`, or bare names).

    Given the mapping, shapes and dtypes are checked too; given None, the tensors are those that the configuration implies.
    `context` is as for spec_from_gguf. Raises ModelError where nomoat cannot run it.
    """
    from nomoat.models import read_hf

    return read_hf.read(_architecture_of(config, name), config, names, name=name, context=context)


def gguf_form(
    config: Mapping[str, object], *, name: str = "model"
) -> tuple[ModelSpec, dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
    """What the GGUF of a Hugging Face model says, as llama.cpp's converter would write it.

    Returns the model as spec_from_gguf then describes it (`tensors` are GGUF names), the metadata of its architecture
    (`llama.block_count`, ...: int, float, bool, str, or a list of bool), and the small tensors that belong to it
    (`rope_freqs.weight`, ...). Where its rotations are interleaved, the rows of q and k, and their biases, are stored in the
    order of rope.interleaved_rows; weights hold what the folder's `Source.add` adds.

    Raises ModelError for what spec_from_hf refuses, and where GGUF has no way to say what the configuration does.
    """
    from nomoat.models import write_gguf

    return write_gguf.form(_architecture_of(config, name), config, name=name)


def _architecture_of(config: Mapping[str, object], name: str) -> Architecture:
    where = f"{printable(name)}/config.json"
    return _architecture(where, Fields(config, where).text("model_type"), HF_MODEL_TYPES)


def _architecture(where: str, kind: str, table: Mapping[str, str]) -> Architecture:
    if kind not in table:
        raise ModelError(
            f"{where}: architecture `{printable(kind)[:60]}` is not supported by this version of nomoat; "
            f"supported: {', '.join(sorted(table))}"
        )
    found: Architecture = import_module(f"nomoat.models.{table[kind]}").ARCHITECTURE
    return found
