"""Architecture `llama`: Llama 1, 2 and 3.x, Mistral, TinyLlama, SmolLM2, from GGUF and from Hugging Face folders.

One layer: RMSNorm, attention with grouped key/value heads and rotary embedding, RMSNorm, SwiGLU; no biases.
GGUF stores the rows of q and k for interleaved rotation, Hugging Face for rotation by halves (`rope.interleaved_rows`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from nomoat.errors import ModelError, printable
from nomoat.models import check, rope
from nomoat.models.fields import (
    MAX_CONTEXT,
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Fields,
)
from nomoat.models.spec import LayerSpec, ModelSpec, RopeSpec

if TYPE_CHECKING:
    from nomoat.files.gguf import GgufFile

GGUF_TOP = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
GGUF_LAYER = {
    "attn_norm": "blk.{i}.attn_norm.weight",
    "q": "blk.{i}.attn_q.weight",
    "k": "blk.{i}.attn_k.weight",
    "v": "blk.{i}.attn_v.weight",
    "o": "blk.{i}.attn_output.weight",
    "mlp_norm": "blk.{i}.ffn_norm.weight",
    "gate": "blk.{i}.ffn_gate.weight",
    "up": "blk.{i}.ffn_up.weight",
    "down": "blk.{i}.ffn_down.weight",
}
HF_TOP = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
#: Target -> module inside `model.layers.{i}.`, as PEFT adapters name it.
PEFT_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
HF_LAYER = {
    "attn_norm": "model.layers.{i}.input_layernorm.weight",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
} | {target: f"model.layers.{{i}}.{module}.weight" for target, module in PEFT_MODULES.items()}

ROPE_FACTORS = "rope_freqs.weight"
#: Tensors that old converters left behind and that hold nothing the configuration does not say.
HARMLESS = (ROPE_FACTORS, "rotary_emb.inv_freq", "attn_rot_embd")
EPS_RANGE = (1e-12, 0.1)


def qk_permuted(source: str) -> bool:
    """True where q and k rows are stored for interleaved rotation: in GGUF files, not in Hugging Face folders."""
    return source == "gguf"


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """Reads and checks the hyper-parameters and tensor table of a GGUF. Raises ModelError."""
    where = printable(file.path.name)
    keys = Fields(file.metadata, where, prefix="llama.", strict=True)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    shape = _dimensions(
        keys,
        layers="block_count",
        width="embedding_length",
        ffn="feed_forward_length",
        heads="attention.head_count",
        kv_heads="attention.head_count_kv",
        head_dim="attention.key_length",
        rope_dim="rope.dimension_count",
        context="context_length",
    )
    head_dim = shape["head_dim"]
    _refuse_gguf_variants(keys, head_dim)
    if isinstance(tokens, (str, int, float)):
        raise ModelError(f"{where}: `tokenizer.ggml.tokens` is not an array", code="E_TYPE")
    embed = file.tensors.get(GGUF_TOP["embed"])
    vocab = keys.integer("vocab_size", 1, MAX_VOCAB, default=0 if tokens is None else len(tokens))
    if tokens is not None:
        if embed is not None and len(embed.shape) == 2 and embed.shape[0] >= vocab and embed.shape[0] != len(tokens):
            raise ModelError(f"{where}: the vocabulary has {len(tokens):,} tokens, but the embedding has {embed.shape[0]:,} rows")
        vocab = max(vocab, len(tokens))
    if not vocab:
        raise ModelError(f"{where}: neither `llama.vocab_size` nor `tokenizer.ggml.tokens` says how large the vocabulary is")
    _check_special_tokens(Fields(file.metadata, where, strict=True), vocab)

    tied = GGUF_TOP["head"] not in file.tensors
    wanted = check.names(shape["layers"], tied, GGUF_TOP, GGUF_LAYER)
    _refuse_tensors(where, file.tensors)
    check.present(where, wanted, file.tensors)
    context, notes = _window(keys, "attention.sliding_window", shape["context"])
    spec = ModelSpec(
        architecture="llama",
        name=_name(file.metadata.get("general.name"), file.path.stem),
        width=shape["width"],
        head_dim=head_dim,
        vocab=vocab,
        context=context,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", *EPS_RANGE),
        tied_head=tied,
        blocks=(LayerSpec(shape["heads"], shape["kv_heads"], shape["ffn"]),) * shape["layers"],
        ropes=(RopeSpec(shape["rope_dim"], interleaved=True, inv_freq=_gguf_frequencies(file, keys, shape["rope_dim"])),),
        tensors=wanted,
        notes=notes + check.unused(wanted, file.tensors, HARMLESS),
    )
    check.shapes_and_types(where, spec, {name: (info.shape, info.type.name) for name, info in file.tensors.items()})
    return spec


def spec_from_hf(config: Mapping[str, object], names: Collection[str], *, name: str = "model") -> ModelSpec:
    """Reads and checks a config.json (model_type `llama` or `mistral`) against the tensors of the folder.

    `names` are the tensor names; given as the mapping of an open safetensors file, shapes and dtypes are checked too.
    Raises ModelError.
    """
    where = f"{printable(name)}/config.json"
    keys = Fields(config, where)
    _refuse_hf_variants(keys)
    mistral = keys.text("model_type") == "mistral"
    shape = _dimensions(
        keys,
        layers="num_hidden_layers",
        width="hidden_size",
        ffn="intermediate_size",
        heads="num_attention_heads",
        kv_heads="num_key_value_heads",
        head_dim="head_dim",
        rope_dim=None,
        context="max_position_embeddings",
        default_kv_heads=8 if mistral else None,  # MistralConfig's default
    )
    tied = keys.flag("tie_word_embeddings", default=False)
    wanted = check.names(shape["layers"], tied, HF_TOP, HF_LAYER)
    _refuse_tensors(where, names)
    check.present(where, wanted, names)
    context, notes = _window(keys, "sliding_window", shape["context"]) if mistral else (shape["context"], ())
    rope_dim = shape["rope_dim"]
    spec = ModelSpec(
        architecture="llama",
        name=_name(name, "model"),
        width=shape["width"],
        head_dim=shape["head_dim"],
        vocab=keys.integer("vocab_size", 1, MAX_VOCAB),
        context=context,
        norm_eps=keys.number("rms_norm_eps", *EPS_RANGE, default=1e-6),  # LlamaConfig's default
        tied_head=tied,
        blocks=(LayerSpec(shape["heads"], shape["kv_heads"], shape["ffn"]),) * shape["layers"],
        ropes=(RopeSpec(rope_dim, interleaved=False, inv_freq=_hf_frequencies(keys, rope_dim)),),
        tensors=wanted,
        notes=notes + check.unused(wanted, names, HARMLESS + ((HF_TOP["head"],) if tied else ())),
    )
    if isinstance(names, Mapping):
        check.shapes_and_types(where, spec, {n: (tuple(slot.shape), str(slot.dtype)) for n, slot in names.items()})
    return spec


def _dimensions(
    keys: Fields,
    *,
    layers: str,
    width: str,
    ffn: str,
    heads: str,
    kv_heads: str,
    head_dim: str,
    rope_dim: str | None,
    context: str,
    default_kv_heads: int | None = None,
) -> dict[str, int]:
    """The sizes by their key names, each within limits and all together consistent."""
    found = {
        "layers": keys.integer(layers, 1, MAX_LAYERS),
        "context": keys.integer(context, 1, MAX_CONTEXT),
        "width": keys.integer(width, 1, MAX_WIDTH),
        "ffn": keys.integer(ffn, 1, MAX_FFN),
        "heads": keys.integer(heads, 1, MAX_HEADS),
    }
    found["kv_heads"] = keys.integer(kv_heads, 1, MAX_HEADS, default=default_kv_heads or found["heads"])
    found["head_dim"], found["rope_dim"] = check.dimensions(
        keys.where,
        width=found["width"],
        heads=found["heads"],
        kv_heads=found["kv_heads"],
        head_dim=keys.integer(head_dim, 1, MAX_HEAD_DIM) if keys.has(head_dim) else None,
        rope_dim=keys.integer(rope_dim, 1, MAX_HEAD_DIM) if rope_dim and keys.has(rope_dim) else None,
    )
    return found


def _refuse_gguf_variants(keys: Fields, head_dim: int) -> None:
    """Llama-like models with parts that this architecture does not have yet."""
    experts = keys.integer("expert_count", 0, 1024, default=0)
    if experts:
        raise ModelError(f"{keys.where}: mixture of experts ({experts} experts) is not supported yet by architecture llama")
    value_dim = keys.integer("attention.value_length", 1, MAX_HEAD_DIM, default=head_dim)
    if value_dim != head_dim:
        raise keys.fail("attention.value_length", value_dim, f"the key length, which is {head_dim}", "E_ARCH")
    if not keys.flag("attention.causal", default=True):
        raise ModelError(f"{keys.where}: attention is not causal: this is an embedding model, which cannot generate text")


def _refuse_hf_variants(keys: Fields) -> None:
    if keys.has("auto_map"):
        raise ModelError(f"{keys.where}: the model brings its own Python code (`auto_map`), which nomoat never runs")
    if keys.has("quantization_config"):
        raise ModelError(
            f"{keys.where}: the checkpoint is already quantized (`quantization_config`); get the original model or a GGUF of it"
        )
    if keys.integer("num_local_experts", 0, 1024, default=0):
        raise ModelError(f"{keys.where}: mixture of experts is not supported yet by architecture llama")
    for bias in ("attention_bias", "mlp_bias"):
        if keys.flag(bias, default=False):
            raise ModelError(f"{keys.where}: `{bias}` is true; biases are not supported yet by architecture llama")
    activation = keys.text("hidden_act", default="silu")
    if activation != "silu":
        raise keys.fail("hidden_act", activation, "silu", "E_ARCH")


def _refuse_tensors(where: str, names: Collection[str]) -> None:
    """Tensors that would change the result if they were ignored."""
    biases = [name for name in names if name.endswith(".bias")]
    if biases:
        raise ModelError(f"{where}: biases are not supported yet by architecture llama: {check.listing(biases, 3)}")
    experts = [name for name in names if "_exps." in name or ".ffn_gate_inp." in name or ".block_sparse_moe." in name]
    if experts:
        raise ModelError(f"{where}: mixture of experts is not supported yet by architecture llama: {check.listing(experts, 3)}")


def _check_special_tokens(keys: Fields, vocab: int) -> None:
    """Ids of special tokens lie inside the vocabulary."""
    for kind in ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator"):  # GGUF spells it with an e
        key = f"tokenizer.ggml.{kind}_token_id"
        if keys.has(key):
            token = keys.integer(key, -(1 << 31), 1 << 32)
            if not 0 <= token < vocab:
                raise keys.fail(key, token, f"a token id below the vocabulary size, {vocab:,}", "E_ARCH")


def _window(keys: Fields, key: str, context: int) -> tuple[int, tuple[str, ...]]:
    """Context within the sliding window, where windowed and full attention are the same, and a note if that shortens it."""
    window = keys.integer(key, 0, MAX_CONTEXT, default=0)
    if not 0 < window < context:
        return context, ()
    return window, (f"context limited to {window:,} tokens, the size of the sliding window that the model attends through",)


def _gguf_frequencies(file: GgufFile, keys: Fields, dim: int) -> np.ndarray:
    """Frequencies from the base, the scaling keys and, for Llama 3.1 and later, the tensor of divisors."""
    inv_freq = rope.frequencies(dim, keys.number("rope.freq_base", *rope.BASE_RANGE, default=10000.0))
    kind = keys.text("rope.scaling.type", default="linear")
    if kind not in ("none", "linear"):
        raise keys.fail(
            "rope.scaling.type", kind, "none or linear: no other scaling is supported by architecture llama", "E_ARCH"
        )
    if kind == "linear":
        key = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
        factor = keys.number(key, 0.0, rope.FACTOR_RANGE[1], default=1.0)
        inv_freq = rope.linear(inv_freq, factor or 1.0)  # 0 means not scaled
    info = file.tensors.get(ROPE_FACTORS)
    if info is not None:
        if tuple(info.shape) != (dim // 2,) or info.type.name != "F32":
            raise ModelError(
                f"{keys.where}: tensor `{ROPE_FACTORS}` is {info.type.name} {tuple(info.shape)}, expected F32 ({dim // 2},)",
                code="E_SHAPE",
            )
        factors = np.frombuffer(file.data(ROPE_FACTORS).tobytes(), dtype="<f4").astype(np.float64)
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise ModelError(
                f"{keys.where}: tensor `{ROPE_FACTORS}` holds factors that are not finite and positive", code="E_NONFINITE"
            )
        inv_freq = inv_freq / factors
    return inv_freq.astype(np.float32)


def _hf_frequencies(keys: Fields, dim: int) -> np.ndarray:
    """Frequencies from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which replaced both in transformers 5."""
    name = "rope_parameters" if keys.has("rope_parameters") else "rope_scaling"
    found = keys.values.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise keys.fail(name, found, "an object", "E_TYPE")
    scaling = Fields(found or {}, f"{keys.where}: {name}")
    owner = scaling if scaling.has("rope_theta") else keys
    base = owner.number("rope_theta", *rope.BASE_RANGE, default=10000.0)  # LlamaConfig's default
    return rope.from_config(scaling, dim, base).astype(np.float32)


def _name(value: object, fallback: str) -> str:
    """A short printable name."""
    text = value if isinstance(value, str) and value else fallback
    return printable(text)[:200]
