"""What the GGUF of a Hugging Face model says: metadata keys, tensor names, and the model as it is then read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from nomoat.errors import ModelError, printable
from nomoat.models import check, read_gguf, read_hf, tensors
from nomoat.models.arch import Architecture, Draft
from nomoat.models.rope import Float32
from nomoat.models.spec import ModelSpec, RopeSpec

#: Fields that differ between the two sources on purpose.
OWN = ("name", "tensors", "notes")


def form(
    arch: Architecture, config: Mapping[str, object], *, name: str = "model"
) -> tuple[ModelSpec, dict[str, Any], dict[str, Float32]]:
    """(the model as its GGUF is read, metadata below `<architecture>.`, tensors of rotary divisors).

    Numbers are rounded to float32, as GGUF keeps them. Raises ModelError for a config.json that cannot be read, and where a
    GGUF of this architecture cannot hold what it says.
    """
    model = read_hf.draft(arch, config, f"{printable(name)}/config.json")
    wanted = model.spec(arch.name, name=check.shown_name(name), interleaved=arch.interleaved, context=None)
    wanted = tensors.from_gguf(arch, wanted, model.biases, None)
    keys = {f"{arch.name}.{key}": _stored(value) for key, value in _metadata(arch, model, wanted).items()}
    divisors = model.rotations[0].tensors()
    shapes = check.source_shapes(wanted) | {tensor: values.shape for tensor, values in divisors.items()}
    contents = read_gguf.Contents(
        where=f"the GGUF of {wanted.name}",
        name=wanted.name,
        metadata=keys,
        tensors={tensor: (shape, "F32") for tensor, shape in shapes.items()},
        load=lambda tensor: divisors[tensor].astype("<f4").tobytes(),
    )
    found = read_gguf.read(arch, contents)
    _check_same(wanted, found)
    return found, keys, divisors


def _metadata(arch: Architecture, model: Draft, spec: ModelSpec) -> dict[str, Any]:
    """Keys below the architecture's prefix, those of gguf-py's `Keys`."""
    dense = [block.ffn for block in spec.blocks if not block.experts] or [spec.ffn]
    found = {
        "block_count": spec.layers,
        "context_length": model.context,
        "embedding_length": spec.width,
        "feed_forward_length": dense[0],
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        read_gguf.EPSILON_KEYS[spec.norm]: spec.norm_eps,
        "vocab_size": spec.vocab,
    }
    for block in spec.blocks:
        if block.experts:
            found |= {"expert_count": block.experts, "expert_used_count": spec.experts_used}
            found |= {"expert_feed_forward_length": block.ffn, "expert_weights_norm": spec.expert_norm}
    return found | _windows(arch, spec) | model.rotations[0].metadata() | _local(model) | arch.to_metadata(spec)


def _windows(arch: Architecture, spec: ModelSpec) -> dict[str, Any]:
    slides = [block.window > 0 for block in spec.blocks]
    if not any(slides):
        return {"attention.sliding_window": 0} if arch.default_window else {}
    size = max(block.window for block in spec.blocks)
    period = arch.window_pattern
    usual = [period == 0 or (layer + 1) % period != 0 for layer in range(spec.layers)]
    pattern = {} if slides == usual else {"attention.sliding_window_pattern": slides}
    return {"attention.sliding_window": size} | pattern


def _local(model: Draft) -> dict[str, Any]:
    return {"rope.freq_base_swa": model.rotations[1].base} if len(model.rotations) > 1 else {}


def _stored(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


def _check_same(wanted: ModelSpec, found: ModelSpec) -> None:
    """Raises ModelError where the GGUF would be another model than the folder."""
    for item in fields(ModelSpec):
        before, after = getattr(wanted, item.name), getattr(found, item.name)
        if item.name not in OWN and not _alike(before, after):
            raise ModelError(
                f"{wanted.name}: a GGUF of architecture {wanted.architecture} cannot hold this model: its `{item.name}` would "
                "be read as something else. The folder itself can be used"
            )


def _alike(before: Any, after: Any) -> bool:
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-6)
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(_alike, before, after))
    if isinstance(before, RopeSpec) and isinstance(after, RopeSpec):
        same = (before.dim, before.interleaved) == (after.dim, after.interleaved) and _alike(before.magnitude, after.magnitude)
        return same and np.allclose(before.inv_freq, after.inv_freq, rtol=1e-6, atol=0)
    return bool(before == after)
