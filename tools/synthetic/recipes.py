"""Which type each tensor of a GGUF gets. Stands in for `nomoat.quant.recipes` until that is there."""

from __future__ import annotations

from collections.abc import Mapping

from tools.synthetic.blocks import LAYOUTS

from nomoat.files.ggml import GgmlType
from nomoat.models import ModelSpec

#: Name -> `general.file_type` and the type of most matrices.
FILE_TYPES = {
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"), "Q4_0": (2, "Q4_0"), "Q4_1": (3, "Q4_1"), "Q8_0": (7, "Q8_0"),
    "Q5_0": (8, "Q5_0"), "Q5_1": (9, "Q5_1"), "Q2_K": (10, "Q2_K"), "Q3_K_M": (12, "Q3_K"), "Q4_K_M": (15, "Q4_K"),
    "Q5_K_M": (17, "Q5_K"), "Q6_K": (18, "Q6_K"), "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"),
}  # fmt: skip


def tensor_types(name: str, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, GgmlType]]:
    """(`general.file_type`, type of every tensor). Raises ValueError for an unknown name."""
    if name not in FILE_TYPES:
        raise ValueError(f"type {name!r}: expected one of {', '.join(FILE_TYPES)}")
    number, base = FILE_TYPES[name]

    def kind(tensor: str, shape: tuple[int, ...]) -> GgmlType:
        if len(shape) < 2 or "ffn_gate_inp" in tensor:
            return GgmlType.F32
        head = tensor == ("token_embd.weight" if spec.tied_head else "output.weight")
        wanted = "Q6_K" if head and base in LAYOUTS and base != "Q8_0" else base
        if wanted in LAYOUTS and shape[-1] % LAYOUTS[wanted].columns:
            wanted = "Q8_0"
        return GgmlType[wanted]

    return number, {tensor: kind(tensor, shape) for tensor, shape in shapes.items()}
