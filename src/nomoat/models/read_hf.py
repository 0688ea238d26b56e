"""A model from config.json and the names of its tensors, by an Architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nomoat.errors import ModelError, printable
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
from nomoat.models.spec import ModelSpec

EPS_RANGE = (1e-12, 0.1)
#: ModelSpec.activation -> names in transformers
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh", "gelu_new")}
#: Tensors that hold nothing the configuration does not say.
HARMLESS = ("rotary_emb.inv_freq",)


def read(
    arch: Architecture, config: Mapping[str, object], names: Collection[str] | None, *, name: str, context: int | None = None
) -> ModelSpec:
    """The model as config.json describes it, checked against the tensors of the folder where `names` are given.

    Given as the mapping of an open safetensors file, shapes and dtypes are checked too. Raises ModelError.
    """
    where = f"{printable(name)}/config.json"
    model = draft(arch, config, where)
    spec = model.spec(arch.name, name=check.shown_name(name), interleaved=False, context=context)
    root = next((root for root in arch.roots if names and f"{root}embed_tokens.weight" in names), next(iter(arch.roots)))
    if names is None:
        return tensors.from_hf(arch, spec, model.biases, root)
    fused = [tensor for tensor in names if tensor.endswith(".experts.gate_up_proj")]
    if fused:
        raise ModelError(
            f"{where}: gate and up of all experts are one tensor (`{printable(fused[0])}`), which nomoat does not read; "
            "save the model in its original format, or convert it to GGUF"
        )
    check.experts(where, model.experts, len(names))
    spec = tensors.from_hf(arch, spec, model.biases, root)
    check.left_out(where, spec, [tensor for tensor in names if tensor.startswith((root, arch.roots[root]))])
    check.present(where, spec, names)
    harmless = (*HARMLESS, f"{arch.roots[root]}.weight") if spec.tied_head else HARMLESS
    spec = check.with_unused(spec, names, harmless)
    if isinstance(names, Mapping):
        check.shapes_and_types(where, spec, {n: (tuple(slot.shape), str(slot.dtype)) for n, slot in names.items()})
    return spec


def draft(arch: Architecture, config: Mapping[str, object], where: str) -> Draft:
    """All that config.json says, by the meaning that transformers gives it. Raises ModelError."""
    text = config.get("text_config")  # a model of images and text: its language part
    keys = Fields({**arch.defaults, **config, **(text if isinstance(text, Mapping) else {})}, where)
    _refuse(keys)
    layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
    width = keys.integer("hidden_size", 1, MAX_WIDTH)
    heads = keys.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = keys.integer("num_key_value_heads", 1, MAX_HEADS, default=heads)
    context = keys.integer("max_position_embeddings", 1, MAX_CONTEXT)
    ffn = keys.integer("intermediate_size", 1, MAX_FFN)
    head_dim = keys.integer("head_dim", 1, MAX_HEAD_DIM) if keys.has("head_dim") else None
    head_dim = check.head_dimension(where, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    rotation = rope.from_config(keys, head_dim, context, partial=arch.partial_rotary, section=arch.rope_section)
    check.rotary_dimension(where, rotation.dim, head_dim)
    model = Draft(layers, width, head_dim, context, [heads] * layers, [kv_heads] * layers, [ffn] * layers, [rotation])
    model.fields = dict(arch.constants)
    model.fields["vocab"] = keys.integer("vocab_size", 1, MAX_VOCAB)
    model.fields["norm_eps"] = keys.number(arch.epsilon_key, *EPS_RANGE)
    model.fields["tied_head"] = keys.flag("tie_word_embeddings", default=False)
    _check_activation(keys, arch.activation_key, model.fields.get("activation", "silu"))
    for flag, parts in arch.biases.items():
        if keys.flag(flag, default=False):
            model.biases |= set(parts)
    if model.fields.get("norm") == "layer":
        model.biases |= set(arch.norms)
    if not arch.experts and keys.integer("num_local_experts", 0, MAX_EXPERTS, default=0):
        raise ModelError(f"{where}: mixture of experts is not supported by architecture {arch.name}")
    arch.from_config(keys, model)
    check.experts(where, model.experts)
    return model


def _refuse(keys: Fields) -> None:
    """What no architecture can run."""
    if keys.has("auto_map"):
        raise ModelError(f"{keys.where}: the model brings its own Python code (`auto_map`), which nomoat never runs")
    if keys.has("quantization_config"):
        raise ModelError(
            f"{keys.where}: the checkpoint is already quantized (`quantization_config`); get the original model or a GGUF of it"
        )
    if keys.flag("use_bidirectional_attention", default=False) or not keys.flag("is_causal", default=True):
        raise ModelError(f"{keys.where}: attention is not causal: this is an embedding model, which cannot generate text")


def _check_activation(keys: Fields, name: str, activation: str) -> None:
    found = keys.text(name, default=ACTIVATIONS[activation][0])
    if found not in ACTIVATIONS[activation]:
        raise keys.fail(name, found, " or ".join(ACTIVATIONS[activation]), "E_ARCH")
