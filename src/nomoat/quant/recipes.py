"""Which type each tensor of a GGUF gets: the mixtures that llama.cpp knows under these names, without an importance matrix.

Checked tensor by tensor against llama.cpp's own quantizer. Counting follows it too: tensors are visited layer by layer, by name
inside a layer, and some rules go by how many tensors of a class came before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nomoat.errors import InputError, printable
from nomoat.files.ggml import BLOCK_SHAPE, GgmlType

#: Name -> `general.file_type`, and the type of most matrices.
FILE_TYPES: dict[str, tuple[int, GgmlType]] = {
    "F32": (0, GgmlType.F32),
    "F16": (1, GgmlType.F16),
    "BF16": (32, GgmlType.BF16),
    "Q8_0": (7, GgmlType.Q8_0),
    "Q6_K": (18, GgmlType.Q6_K),
    "Q5_K_M": (17, GgmlType.Q5_K),
    "Q5_K_S": (16, GgmlType.Q5_K),
    "Q5_1": (9, GgmlType.Q5_1),
    "Q5_0": (8, GgmlType.Q5_0),
    "Q4_K_M": (15, GgmlType.Q4_K),
    "Q4_K_S": (14, GgmlType.Q4_K),
    "IQ4_NL": (25, GgmlType.IQ4_NL),
    "IQ4_XS": (30, GgmlType.IQ4_XS),
    "Q4_1": (3, GgmlType.Q4_1),
    "Q4_0": (2, GgmlType.Q4_0),
    "MXFP4_MOE": (38, GgmlType.MXFP4),
    "Q3_K_L": (13, GgmlType.Q3_K),
    "Q3_K_M": (12, GgmlType.Q3_K),
    "Q3_K_S": (11, GgmlType.Q3_K),
    "Q2_K": (10, GgmlType.Q2_K),
}
FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)

#: What a matrix gets whose columns are not a multiple of 256; F16 where they are not one of 32 either.
NARROW = {
    GgmlType.Q2_K: GgmlType.Q4_0,
    GgmlType.Q3_K: GgmlType.Q4_0,
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
    GgmlType.IQ4_XS: GgmlType.IQ4_NL,
}
#: Part of a name -> class of the tensor; values get more bits than keys, and a fused qkv counts as values.
CLASSES = {
    "attn_qkv.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_output.weight": "output",
    "ffn_down": "down",
}
FOUR_BITS = ("IQ4_NL", "IQ4_XS")


@dataclass(frozen=True)
class Shape:
    """What the rules ask of a model. `group`: query heads that share a key/value head; `tied`: the embedding is the head too."""

    layers: int
    group: int
    experts: int
    tied: bool


def file_type(name: str) -> tuple[int, GgmlType]:
    """(`general.file_type`, type of most matrices). Raises InputError for a name that is not in FILE_TYPES."""
    if name not in FILE_TYPES:
        raise InputError(f"type {printable(name)[:40]!r} is not known; expected one of {', '.join(FILE_TYPES)}", code="E_TYPE")
    return FILE_TYPES[name]


def tensor_types(
    name: str, model: Shape, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, GgmlType]
) -> dict[str, GgmlType]:
    """The type of every tensor, in the order of `shapes`. What is never quantized stays as it is `stored`."""
    _, base = file_type(name)
    found = dict(stored)
    values = sum(_class(tensor) == "value" for tensor in shapes)
    seen = {"value": 0, "down": 0}
    for tensor in sorted(shapes, key=lambda tensor: (_layer(tensor), tensor)):
        shape = shapes[tensor]
        if not quantizable(tensor, shape):
            continue
        wanted = base
        if base not in FLOATS:
            wanted = _mixed(name, base, model, tensor, shape, seen, values)
            if wanted in NARROW and shape[-1] % BLOCK_SHAPE[wanted][0]:
                wanted = NARROW[wanted]
            if shape[-1] % BLOCK_SHAPE[wanted][0]:
                wanted = GgmlType.F16
        found[tensor] = wanted
    return {tensor: found[tensor] for tensor in shapes}


def quantizable(tensor: str, shape: tuple[int, ...]) -> bool:
    """Matrices, but neither norms nor routers, which are small and decide much."""
    small = tensor.endswith("_norm.weight") or "ffn_gate_inp" in tensor
    return len(shape) > 1 and tensor.endswith("weight") and not small


def _mixed(
    name: str, base: GgmlType, model: Shape, tensor: str, shape: tuple[int, ...], seen: dict[str, int], values: int
) -> GgmlType:
    kind = _class(tensor)
    if tensor == "output.weight" or (model.tied and tensor == "token_embd.weight"):
        plain = name == "MXFP4_MOE" or base is GgmlType.Q8_0 or shape[-1] % BLOCK_SHAPE[base][0]
        return GgmlType.Q8_0 if plain else GgmlType.Q6_K
    if name == "MXFP4_MOE":
        return GgmlType.MXFP4 if len(shape) > 2 else GgmlType.Q8_0
    if kind == "value":
        seen["value"] += 1
        return _value(name, base, model, seen["value"] - 1, values)
    if kind == "key" and model.experts == 8:
        return GgmlType.Q8_0
    if kind == "down":
        seen["down"] += 1
        return _down(name, base, _layer(tensor) if model.experts > 1 else seen["down"] - 1, model.layers)
    if kind == "output":
        return _output(name, base, model)
    return base


def _value(name: str, base: GgmlType, model: Shape, i: int, count: int) -> GgmlType:
    if model.experts == 8:
        return GgmlType.Q8_0
    wanted = base
    if name == "Q2_K":
        wanted = GgmlType.Q4_K if model.group >= 4 else GgmlType.Q3_K
    elif name == "Q3_K_M":
        wanted = GgmlType.Q5_K if i < 2 else GgmlType.Q4_K
    elif name == "Q3_K_L" or (name in FOUR_BITS and model.group >= 4) or (name == "Q4_K_S" and i < 4):
        wanted = GgmlType.Q5_K
    elif name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, count):
        wanted = GgmlType.Q6_K
    # 80 layers: the models of 70 billion weights, whose values are an eighth of the queries
    return GgmlType.Q5_K if model.layers == 80 and model.group > 1 and wanted in (GgmlType.Q3_K, GgmlType.Q4_K) else wanted


def _down(name: str, base: GgmlType, i: int, layers: int) -> GgmlType:
    if name == "Q2_K":
        return GgmlType.Q3_K
    if name == "Q3_K_M":
        return GgmlType.Q5_K if i < layers // 16 else GgmlType.Q4_K
    if name == "Q3_K_L" or (name in (*FOUR_BITS, "Q4_K_S") and i < layers // 8):
        return GgmlType.Q5_K
    if name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, layers):
        return GgmlType.Q6_K
    return base


def _output(name: str, base: GgmlType, model: Shape) -> GgmlType:
    if model.experts == 8:
        raised = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", *FOUR_BITS)
        return GgmlType.Q5_K if name in raised else base
    return {"Q2_K": GgmlType.Q3_K, "Q3_K_M": GgmlType.Q4_K, "Q3_K_L": GgmlType.Q5_K}.get(name, base)


def _more_bits(i: int, count: int) -> bool:
    """The first and the last eighth, and every third between them."""
    return i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2


def _class(tensor: str) -> str:
    return next((kind for part, kind in CLASSES.items() if part in tensor), "other")


def _layer(tensor: str) -> int:
    found = re.match(r"blk\.(\d+)\.", tensor)
    return int(found[1]) if found else -1
