"""A model from a GGUF's metadata and tensor table, by an Architecture.

Keys and their defaults are those of llama.cpp (gguf-py's `Keys`, `llama_model_base::load_hparams`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nomoat.errors import ModelError, printable
from nomoat.files.gguf import GgufFile, LazyArray
from nomoat.models import check, rope, tensors
from nomoat.models.arch import Architecture, Draft
from nomoat.models.fields import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Fields,
)
from nomoat.models.read_hf import EPS_RANGE
from nomoat.models.rope import Float32
from nomoat.models.spec import ModelSpec

EPSILON_KEYS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
#: Tensors that old converters left behind, and those that are read as settings.
HARMLESS = (rope.DIVISORS, rope.SHORT, rope.LONG, "rotary_emb.inv_freq", "attn_rot_embd")
SPECIAL_TOKENS = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator")  # GGUF spells it with an e


@dataclass(frozen=True)
class Contents:
    """What a description needs of a GGUF: metadata, tensors as (shape, type name), and the bytes of a few small ones."""

    where: str
    name: str
    metadata: Mapping[str, object]
    tensors: Mapping[str, check.Known]
    load: Callable[[str], bytes]

    @classmethod
    def of(cls, file: GgufFile) -> Contents:
        known = {name: (tuple(info.shape), info.type.name) for name, info in file.tensors.items()}
        name = check.shown_name(file.metadata.get("general.name"), file.path.stem)
        return cls(printable(file.path.name), name, file.metadata, known, lambda tensor: file.data(tensor).tobytes())


def read(arch: Architecture, file: Contents, *, context: int | None = None) -> ModelSpec:
    """The model that a GGUF describes, checked against its tensors. Raises ModelError."""
    keys = Fields(file.metadata, file.where, prefix=f"{arch.name}.", strict=True)
    model = _draft(arch, keys, file)
    model.fields["vocab"] = _vocabulary(keys, file)
    model.fields["tied_head"] = f"{tensors.GGUF_TOP['head']}.weight" not in file.tensors
    arch.from_metadata(keys, model)
    spec = model.spec(arch.name, name=file.name, interleaved=arch.interleaved, context=context)
    spec = tensors.from_gguf(arch, spec, _biases(arch, spec, file), file.tensors)
    check.left_out(file.where, spec, file.tensors)
    check.present(file.where, spec, file.tensors)
    spec = check.with_unused(spec, file.tensors, HARMLESS)
    check.shapes_and_types(file.where, spec, file.tensors)
    return spec


def _draft(arch: Architecture, keys: Fields, file: Contents) -> Draft:
    """What the usual keys say."""
    layers = keys.integer("block_count", 1, MAX_LAYERS)
    context = keys.integer("context_length", 1, MAX_CONTEXT)
    width = keys.integer("embedding_length", 1, MAX_WIDTH)
    ffn = keys.integers("feed_forward_length", 1, MAX_FFN, layers)
    heads = keys.integers("attention.head_count", 1, MAX_HEADS, layers)
    kv_heads = keys.integers("attention.head_count_kv", 1, MAX_HEADS, layers, default=heads)
    stated = keys.integer("attention.key_length", 1, MAX_HEAD_DIM) if keys.has("attention.key_length") else None
    head_dim = check.head_dimension(keys.where, width=width, heads=heads[0], kv_heads=kv_heads[0], head_dim=stated)
    for several in sorted(set(zip(heads, kv_heads, strict=True))):
        check.head_dimension(keys.where, width=width, heads=several[0], kv_heads=several[1], head_dim=head_dim)
    value_dim = keys.integer("attention.value_length", 1, MAX_HEAD_DIM, default=head_dim)
    if value_dim != head_dim:
        raise keys.fail("attention.value_length", value_dim, f"the key length, which is {head_dim}", "E_ARCH")
    if not keys.flag("attention.causal", default=True):
        raise ModelError(f"{keys.where}: attention is not causal: this is an embedding model, which cannot generate text")
    rope_dim = keys.integer("rope.dimension_count", 1, MAX_HEAD_DIM, default=head_dim)
    check.rotary_dimension(keys.where, rope_dim, head_dim)
    rotation = rope.from_metadata(keys, rope_dim, context, lambda name: _divisors(arch, file, name, rope_dim // 2))
    model = Draft(layers, width, head_dim, context, list(heads), list(kv_heads), list(ffn), [rotation])
    model.fields = dict(arch.constants)
    model.fields["norm_eps"] = keys.number(EPSILON_KEYS[arch.constants.get("norm", "rms")], *EPS_RANGE)
    _windows(arch, keys, model)
    _experts(arch, keys, model, file)
    return model


def _windows(arch: Architecture, keys: Fields, model: Draft) -> None:
    """The window of each layer, and the rotation of those that have one."""
    size = keys.integer("attention.sliding_window", 0, MAX_CONTEXT, default=arch.default_window)
    key = "attention.sliding_window_pattern"
    if keys.is_array(key):
        slides = keys.flags(key, model.layers)
    else:
        period = keys.integer(key, 0, MAX_LAYERS, default=arch.window_pattern)
        slides = tuple(period == 0 or (layer + 1) % period != 0 for layer in range(model.layers))
    model.windows = [size if slide else 0 for slide in slides]
    if arch.local_base is not None and any(model.windows):
        main = model.rotations[0]
        base = keys.number("rope.freq_base_swa", *rope.BASE_RANGE, default=arch.local_base or main.base)
        model.rotations.append(rope.Rotation(main.dim, base))
        model.ropes = [1 if window else 0 for window in model.windows]


def _experts(arch: Architecture, keys: Fields, model: Draft, file: Contents) -> None:
    """Experts in the layers that have a router: in some files a few layers are dense."""
    if not keys.integer("expert_count", 0, MAX_EXPERTS, default=0):
        return
    count = keys.integer("expert_count", 2, MAX_EXPERTS)
    if not arch.gguf_experts:
        raise ModelError(f"{keys.where}: mixture of experts ({count:,} experts) is not supported by architecture {arch.name}")
    shared = () if arch.shared_expert else ("expert_shared_count", "expert_shared_feed_forward_length")
    for key in (*shared, "expert_group_used_count"):
        if keys.integer(key, 0, MAX_FFN, default=0):
            raise keys.fail(key, keys.integer(key, 0, MAX_FFN), f"0: architecture {arch.name} has nothing like it", "E_ARCH")
    gating = keys.integer("expert_gating_func", 0, 255, default=1)
    if gating not in (0, 1):
        raise keys.fail("expert_gating_func", gating, "1, softmax", "E_ARCH")
    if keys.number("expert_weights_scale", 0.0, 1e6, default=1.0) not in (0.0, 1.0):  # 0 counts as absent
        raise keys.fail("expert_weights_scale", keys.number("expert_weights_scale", 0.0, 1e6), "1", "E_ARCH")
    routers = [f"blk.{layer}.{tensors.GGUF['router']}.weight" in file.tensors for layer in range(model.layers)]
    model.experts = [count if router or not any(routers) else 0 for router in routers]
    apart = any(f"blk.{layer}.{tensors.GGUF['gate']}.0.weight" in file.tensors for layer in range(model.layers))
    check.experts(keys.where, model.experts, len(file.tensors) if apart else None)
    if keys.has("expert_feed_forward_length"):
        ffn = keys.integer("expert_feed_forward_length", 1, MAX_FFN)
        model.ffn = [ffn if experts else dense for experts, dense in zip(model.experts, model.ffn, strict=True)]
    model.fields["experts_used"] = keys.integer("expert_used_count", 1, count)
    model.fields["expert_norm"] = keys.flag("expert_weights_norm", default=True)


def _biases(arch: Architecture, spec: ModelSpec, file: Contents) -> set[str]:
    """Parts of which a bias is in the file; one that is there in some layers is expected in all."""
    possible = set(arch.gguf_biases).union(*arch.biases.values()) | (set(arch.norms) if spec.norm == "layer" else set())
    fused = {"q", "k", "v"} & possible

    def exists(part: str, name: str) -> bool:
        return part in possible and any(f"blk.{layer}.{name}.bias" in file.tensors for layer in range(spec.layers))

    found = {part for part in possible if exists(part, arch.gguf_names.get(part, tensors.GGUF[part]))}
    return found | {part for part in fused if exists(part, tensors.FUSED_QKV)}


def _vocabulary(keys: Fields, file: Contents) -> int:
    """Rows of the embedding, from the key or from the tokens, which must agree with it."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, LazyArray):
        raise ModelError(f"{file.where}: `tokenizer.ggml.tokens` is not an array", code="E_TYPE")
    count = 0 if tokens is None else len(tokens)
    vocab = keys.integer("vocab_size", 1, MAX_VOCAB, default=count)
    if tokens is not None:
        shape, _ = file.tensors.get(f"{tensors.GGUF_TOP['embed']}.weight", ((), ""))
        if len(shape) == 2 and shape[0] >= vocab and shape[0] != count:
            raise ModelError(f"{file.where}: the vocabulary has {count:,} tokens, but the embedding has {shape[0]:,} rows")
        vocab = max(vocab, count)
    if not vocab:
        raise ModelError(
            f"{file.where}: neither `{keys.prefix}vocab_size` nor `tokenizer.ggml.tokens` says how large the vocabulary is"
        )
    special = Fields(file.metadata, file.where, strict=True)
    for kind in SPECIAL_TOKENS:
        key = f"tokenizer.ggml.{kind}_token_id"
        if special.has(key):
            token = special.integer(key, -(1 << 31), 1 << 32)
            if not 0 <= token < vocab:
                raise special.fail(key, token, f"a token id below the vocabulary size, {vocab:,}", "E_ARCH")
    return vocab


def _divisors(arch: Architecture, file: Contents, name: str, length: int) -> Float32 | None:
    """A tensor of divisors of the rotary frequencies [dim / 2], if it is there and llama.cpp reads it too."""
    if name not in file.tensors or not arch.rope_divisors:
        return None
    shape, kind = file.tensors[name]
    if shape != (length,) or kind != "F32":
        raise ModelError(f"{file.where}: tensor `{name}` is {kind} {shape}, expected F32 ({length},)", code="E_SHAPE")
    factors = np.frombuffer(file.load(name), dtype="<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{file.where}: tensor `{name}` holds factors that are not finite and positive", code="E_NONFINITE")
    return factors
