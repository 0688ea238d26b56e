"""From an architecture's names to the source of every weight: `ModelSpec.tensors`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from nomoat.models.arch import PARTS, Architecture
from nomoat.models.check import Known
from nomoat.models.spec import EXPERT_TARGETS, LINEARS, SHARED_TARGETS, LayerSpec, ModelSpec, Source

#: engine name -> name outside the layers
GGUF_TOP = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
#: part of a layer -> name inside `blk.<i>.`, the same in all architectures; experts are one tensor
GGUF = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "router": "ffn_gate_inp",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "shared_router": "ffn_gate_inp_shexp",
    "shared_gate": "ffn_gate_shexp",
    "shared_up": "ffn_up_shexp",
    "shared_down": "ffn_down_shexp",
    "mlp_post_norm": "post_ffw_norm",
}
FUSED_QKV = "attn_qkv"

#: (layer, part) -> the tensors that hold it, without `.weight`
Naming = Callable[[int, str], tuple[str, ...]]


def from_gguf(arch: Architecture, spec: ModelSpec, biases: Collection[str], available: Mapping[str, Known] | None) -> ModelSpec:
    """The model with its sources in a GGUF. Where names differ between files, those in `available` decide.

    q, k and v may be one tensor, older files have one tensor for each expert, and the router of a shared one may be a vector or a
    row. None: as converters write them today.
    """

    def exists(stem: str) -> bool:
        return available is not None and f"{stem}.weight" in available

    def names(layer: int, part: str) -> tuple[str, ...]:
        stem, count = f"blk.{layer}.", spec.blocks[layer].experts
        usual = stem + arch.gguf_names.get(part, GGUF[part])
        if count and part in EXPERT_TARGETS:
            apart = exists(f"{usual}.0") and not exists(f"{usual}_exps")
            return tuple(f"{usual}.{e}" for e in range(count)) if apart else (f"{usual}_exps",)
        others = [stem + GGUF[part], *([stem + FUSED_QKV] if part in ("q", "k", "v") else [])]
        return (next((name for name in (usual, *others) if exists(name)), usual),)

    def one_row(tensor: str) -> bool:
        return available is not None and tensor in available and len(available[tensor][0]) > 1

    return _with_tensors(arch, spec, GGUF_TOP, names, biases, norm_offset=0.0, one_row=one_row)


def from_hf(arch: Architecture, spec: ModelSpec, biases: Collection[str], prefix: str) -> ModelSpec:
    """The model with its sources in a Hugging Face folder. `prefix` is one of `Architecture.roots`."""
    stems = {**arch.norms, **arch.modules}

    def names(layer: int, part: str) -> tuple[str, ...]:
        count = spec.blocks[layer].experts
        stem = arch.experts[part] if count and part in arch.experts else stems[part]
        every = [stem.format(e=e) for e in range(count)] if "{e}" in stem else [stem]
        return tuple(f"{prefix}layers.{layer}.{name}" for name in every)

    top = {"embed": f"{prefix}embed_tokens", "final_norm": f"{prefix}norm", "head": arch.roots[prefix]}
    return _with_tensors(arch, spec, top, names, biases, norm_offset=arch.norm_offset, one_row=lambda tensor: True)


def layer_parts(arch: Architecture, block: LayerSpec) -> tuple[str, ...]:
    """Parts that a layer has, in order."""
    known = {*arch.norms, *arch.modules} | ({"router", *EXPERT_TARGETS} if block.experts else set())
    shared = {"shared_router", *SHARED_TARGETS}
    return tuple(part for part in PARTS if part in ((known | shared) if block.shared else (known - shared)))


def _with_tensors(
    arch: Architecture,
    spec: ModelSpec,
    top: Mapping[str, str],
    names: Naming,
    biases: Collection[str],
    *,
    norm_offset: float,
    one_row: Callable[[str], bool],
) -> ModelSpec:
    found = {"embed": Source((f"{top['embed']}.weight",))}
    found["final_norm"] = Source((f"{top['final_norm']}.weight",), add=norm_offset)
    if spec.norm == "layer":
        found["final_norm_bias"] = Source((f"{top['final_norm']}.bias",))
    if not spec.tied_head:
        found["head"] = Source((f"{top['head']}.weight",))
    for layer, block in enumerate(spec.blocks):
        parts = layer_parts(arch, block)
        stems = {part: names(layer, part) for part in parts}
        rows = _fused_rows(spec, layer, {part: stems[part] for part in parts if part in LINEARS})
        for part in parts:
            first, count = rows.get(part, (0, None))
            weights = tuple(f"{name}.weight" for name in stems[part])
            offset = norm_offset if part in arch.norms else 0.0
            found[f"blk.{layer}.{part}"] = Source(
                weights, first, count, offset, one_row=part == "shared_router" and one_row(weights[0])
            )
            if part in biases and not (block.experts and part in EXPERT_TARGETS):
                found[f"blk.{layer}.{part}_bias"] = Source((f"{stems[part][0]}.bias",), first, count)
    return replace(spec, tensors=found)


def _fused_rows(spec: ModelSpec, layer: int, stems: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, int]]:
    """(first row, rows) of the targets that share a tensor: one below the other, in the order of LINEARS."""
    found, filled = {}, dict.fromkeys(stems.values(), 0)
    for target, names in stems.items():
        rows = spec.linear_shape(target, layer)[0]
        if list(stems.values()).count(names) > 1:
            found[target] = (filled[names], rows)
            filled[names] += rows
    return found
