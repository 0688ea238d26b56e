"""Tiny models with every feature that `ModelSpec` knows, one at a time and as families of models combine them."""

from __future__ import annotations

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nomoat import _native
from nomoat.engine.model import Model
from nomoat.engine.weights import PackedTensor, Weights
from nomoat.files.ggml import GgmlType
from nomoat.models.spec import LayerSpec, ModelSpec, RopeSpec, Source
from nomoat.text.tokenizer import Tokenizer

NORMS = ("attn_norm", "mlp_norm")
POST_NORMS = ("attn_post_norm", "mlp_post_norm")
QKV_BIASES = ("q_bias", "k_bias", "v_bias")
HEAD_NORMS = ("q_norm", "k_norm")
BLOCK = LayerSpec(heads=4, kv_heads=2, ffn=40)


def rope(dim: int, *, base: float = 100.0, interleaved: bool = False, magnitude: float = 1.0) -> RopeSpec:
    """A rotation whose slowest pair still turns within a few tokens."""
    return RopeSpec(dim, interleaved, (base ** (-np.arange(0, dim, 2) / dim)).astype(np.float32), magnitude)


def family(vectors: tuple[str, ...] = NORMS, top: tuple[str, ...] = (), **fields: Any) -> ModelSpec:
    """A spec with the vectors named in every layer; two plain layers of odd sizes where `fields` do not say otherwise."""
    rest: dict[str, Any] = {"head_dim": 12, "blocks": (BLOCK, BLOCK), "tied_head": True} | fields
    spec = ModelSpec(
        architecture="tiny",
        name="tiny",
        width=40,
        vocab=50,
        context=256,
        norm_eps=1e-5,
        **({"ropes": (rope(rest["head_dim"]),)} | rest),
    )
    names = ["embed", "final_norm", *top, *([] if spec.tied_head else ["head"])]
    for layer in range(spec.layers):
        names += [f"blk.{layer}.{part}" for part in (*spec.targets(layer), *vectors)]
    return dataclasses.replace(spec, tensors={name: Source((name,)) for name in names})


#: one feature each
FEATURES: dict[str, ModelSpec] = {
    "plain": family(),
    "window": family(blocks=(dataclasses.replace(BLOCK, window=3), dataclasses.replace(BLOCK, window=1))),
    "window in turn": family(blocks=(BLOCK, dataclasses.replace(BLOCK, window=4))),
    "no rotation": family(blocks=(BLOCK, dataclasses.replace(BLOCK, rope=None)), ropes=(rope(12),)),
    "no rotation at all": family(blocks=(dataclasses.replace(BLOCK, rope=None),) * 2, ropes=()),
    "two rotations": family(
        blocks=(BLOCK, dataclasses.replace(BLOCK, rope=1)), ropes=(rope(12), rope(8, base=10.0, interleaved=True, magnitude=1.3))
    ),
    "layers of their own": family(blocks=(LayerSpec(2, 2, 56), LayerSpec(6, 1, 24), LayerSpec(3, 3, 40))),
    "q, k and v biases": family((*NORMS, *QKV_BIASES)),
    "all biases": family((*NORMS, *QKV_BIASES, "o_bias", "gate_bias", "up_bias", "down_bias")),
    "head norms": family((*NORMS, *HEAD_NORMS), qk_norm="head"),
    "row norms": family((*NORMS, *HEAD_NORMS), qk_norm="row"),
    "layer norm": family((*NORMS, "attn_norm_bias", "mlp_norm_bias"), ("final_norm_bias",), norm="layer"),
    "layer norm without biases": family(norm="layer"),
    "no norms in layers": family(()),
    "post-norms alone": family(POST_NORMS),
    "sandwich norms": family((*NORMS, *POST_NORMS)),
    "layer norm behind": family((*NORMS, *POST_NORMS), norm="layer"),
    "residual scale": family(residual_scale=0.3),
    "post-norms and residual scale": family((*NORMS, *POST_NORMS), residual_scale=0.3),
    "gelu": family(activation="gelu"),
    "not gated": family(gated=False),
    "not gated, gelu": family(gated=False, activation="gelu"),
    "score scale": family(score_scale=0.7),
    "score cap": family(score_cap=1.5),
    "logit scale": family(logit_scale=0.2),
    "logit cap": family(logit_cap=2.0),
    "embedding scale": family(embed_scale=3.0),
    "large groups": family(head_dim=4, blocks=(LayerSpec(17, 1, 24), LayerSpec(128, 2, 24))),
    "wide heads": family(head_dim=256, blocks=(LayerSpec(1, 1, 24),) * 2),
}

_SWIPE = (dataclasses.replace(BLOCK, window=4), BLOCK)
#: as families of models combine them
FAMILIES: dict[str, ModelSpec] = {
    "qwen2": family((*NORMS, *QKV_BIASES), tied_head=False),
    "qwen3": family((*NORMS, *HEAD_NORMS), qk_norm="head", head_dim=16),
    "olmo2": family((*POST_NORMS, *HEAD_NORMS), qk_norm="row"),
    "gemma2": family(
        (*NORMS, *POST_NORMS),
        head_dim=32,
        blocks=_SWIPE,
        activation="gelu",
        score_scale=24**-0.5,
        score_cap=4.0,
        logit_cap=3.0,
        embed_scale=40**0.5,
    ),
    "gemma3": family(
        (*NORMS, *POST_NORMS, *HEAD_NORMS),
        head_dim=16,
        blocks=(*_SWIPE[:1] * 2, dataclasses.replace(BLOCK, rope=1)),
        ropes=(rope(16, base=10.0), rope(16, base=1000.0)),
        activation="gelu",
        qk_norm="head",
        embed_scale=40**0.5,
    ),
    "phi3": family(
        head_dim=16, ropes=(rope(12, magnitude=1.19),), tied_head=False, blocks=(dataclasses.replace(BLOCK, window=9),) * 2
    ),
    "granite": family(score_scale=0.1, logit_scale=1 / 3, embed_scale=4.0, residual_scale=0.22),
    "starcoder2": family(
        (*NORMS, "attn_norm_bias", "mlp_norm_bias", *QKV_BIASES, "o_bias", "up_bias", "down_bias"),
        ("final_norm_bias",),
        norm="layer",
        gated=False,
        activation="gelu",
        blocks=(dataclasses.replace(BLOCK, window=6),) * 2,
    ),
    "smollm3": family(blocks=(BLOCK, BLOCK, dataclasses.replace(BLOCK, rope=None)), ropes=(rope(12, interleaved=True),)),
    "openelm": family(
        (*NORMS, *HEAD_NORMS), qk_norm="head", blocks=(LayerSpec(3, 1, 24), LayerSpec(4, 2, 40), LayerSpec(6, 3, 64))
    ),
}
ALL = FEATURES | FAMILIES


def aligned(spec: ModelSpec) -> ModelSpec:
    """The same with columns in multiples of 32, as quantized matrices need."""
    blocks = tuple(dataclasses.replace(block, ffn=-(-block.ffn // 32) * 32) for block in spec.blocks)
    return dataclasses.replace(spec, width=64, head_dim=-(-spec.head_dim // 32) * 32, blocks=blocks)


def random_weights(spec: ModelSpec) -> dict[str, npt.NDArray[np.float32]]:
    """Float32 values that depend on a weight's name and size alone: variance 1 / columns, norms around 1, biases about 0.3."""
    found = {}
    for name in spec.tensors:
        shape = spec.tensor_shape(name)
        values = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode())).standard_normal(shape)
        if name.endswith("_norm"):
            values = 1 + 0.2 * values
        else:
            values *= 0.3 if len(shape) == 1 else shape[-1] ** -0.5
        found[name] = values.astype(np.float32)
    return found


def model_of(spec: ModelSpec, weights: dict[str, npt.NDArray[np.float32]], type: str = "F32") -> Model:
    """A model that came from no file and has no tokenizer; matrices in a GGUF type, routers in float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    packed = {}
    for name, values in weights.items():
        if values.ndim == 1:
            padded = np.zeros(-(-len(values) // 32) * 32, np.float32)
            padded[: len(values)] = values
            packed[name] = PackedTensor(GgmlType.F32, 0, len(values), padded.view(np.uint8))
            continue
        rows, cols = math.prod(values.shape[:-1]), values.shape[-1]  # experts lie one below the other
        kind = GGMLQuantizationType["F32" if name.endswith("router") else type]
        data = np.empty(_native.packed_bytes(kind, rows, cols), np.uint8)
        _native.pack(kind, rows, cols, quantize(values.reshape(rows, cols), kind).view(np.uint8).reshape(-1), data)
        packed[name] = PackedTensor(kind, rows, cols, data)
    return Model(Path("tiny"), spec, Weights(packed, "0" * 64), cast(Tokenizer, None), None)
