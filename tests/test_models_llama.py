"""Reading and refusing models of architecture llama: real shapes, both sources, and every way a description can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from nomoat.errors import FileFormatError, InputError, ModelError, NotFoundError
from nomoat.files.ggml import GgmlType
from nomoat.files.gguf import GgufFile, open_gguf
from nomoat.models import architecture, spec_from_gguf, spec_from_hf
from nomoat.models.hf import MAX_CONFIG_BYTES, read_config
from nomoat.models.llama import PEFT_MODULES, qk_permuted
from nomoat.models.spec import TARGETS, LayerSpec, ModelSpec
from tiny import Shape as TinyShape
from tiny import source_name, tiny_hf, tiny_llama, tiny_weights

#: The smallest shape, so that a hundred files are written in a second.
ONE: dict[str, Any] = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 32}


def read(path: Path) -> ModelSpec:
    with open_gguf(path) as file:
        return spec_from_gguf(file)


def refused(path: Path, **options: Any) -> ModelError:
    """The error for a tiny GGUF with something wrong."""
    tiny_llama(path / "bad.gguf", **(ONE | options))
    with pytest.raises(ModelError) as caught:
        read(path / "bad.gguf")
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("bad.gguf: ")
    return caught.value


def hf_names(layers: int, tied: bool = True) -> list[str]:
    return [source_name(engine, hf=True) for engine in tiny_weights(TinyShape(layers=layers, tied=tied))]


def test_smollm2(smollm2: Path) -> None:
    spec = read(smollm2)
    found = (spec.layers, spec.width, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn, spec.vocab, spec.context)
    assert found == (30, 576, 9, 3, 64, 1536, 49152, 8192)
    assert spec.tied_head
    assert spec.notes == ()
    assert spec.norm_eps == pytest.approx(1e-5)
    assert spec.ropes[0].interleaved
    assert spec.ropes[0].inv_freq[[0, -1]] == pytest.approx([1.0, 100000 ** (-62 / 64)])
    assert len(spec.tensors) == 272


#: (layers, width, heads, kv_heads, ffn, vocab, weights in matrices + norms as published)
TRUE_SHAPES = {
    "Llama-2-7B": (32, 4096, 32, 32, 11008, 32000, 6_738_415_616),
    "Llama-2-70B": (80, 8192, 64, 8, 28672, 32000, 68_976_648_192),
    "Llama-3-8B": (32, 4096, 32, 8, 14336, 128256, 8_030_261_248),
    "Llama-3-70B": (80, 8192, 64, 8, 28672, 128256, 70_553_706_496),
    "Mistral-7B-v0.1": (32, 4096, 32, 8, 14336, 32000, 7_241_732_096),
    "TinyLlama-1.1B": (22, 2048, 32, 4, 5632, 32000, 1_100_048_384),
}


@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_true_shapes(name: str) -> None:
    layers, width, heads, kv_heads, ffn, vocab, published = TRUE_SHAPES[name]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 4096,
        "llama.embedding_length": width,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": vocab,
    }
    kv = width // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"attn_q": (width, width), "attn_output": (width, width), "attn_k": (kv, width)}
    shapes |= {"attn_v": (kv, width), "ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    shapes |= {"attn_norm": (width,), "ffn_norm": (width,)}
    every = {"token_embd.weight": (vocab, width), "output.weight": (vocab, width), "output_norm.weight": (width,)}
    every |= {f"blk.{i}.{part}.weight": shape for i in range(layers) for part, shape in shapes.items()}
    tensors = {n: SimpleNamespace(shape=s, type=GgmlType.Q4_K if len(s) == 2 else GgmlType.F32) for n, s in every.items()}
    spec = spec_from_gguf(cast(GgufFile, SimpleNamespace(path=Path(f"{name}.gguf"), metadata=metadata, tensors=tensors)))
    assert not spec.tied_head
    assert spec.parameters() + (2 * layers + 1) * width == published


def test_both_sources_agree(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{}, {"tied": False, "head_dim": 24, "layers": 3}]
    for dimensions in cases:
        gguf = read(tiny_llama(tmp_path / "model.gguf", **dimensions))
        folder = tiny_hf(tmp_path / "hf", **dimensions)
        hf = spec_from_hf(read_config(folder), hf_names(gguf.layers, gguf.tied_head), name="hf")
        for field in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "tied_head"):
            assert getattr(gguf, field) == getattr(hf, field), field
        assert gguf.norm_eps == pytest.approx(hf.norm_eps, rel=1e-7)
        assert gguf.ropes[0].interleaved != hf.ropes[0].interleaved
        assert gguf.tensors.keys() == hf.tensors.keys() == tiny_weights(TinyShape(**dimensions)).keys()
        assert all(source_name(engine, hf=True) == source.names[0] for engine, source in hf.tensors.items())
        assert all(source_name(engine, hf=False) == source.names[0] for engine, source in gguf.tensors.items())


def test_tables() -> None:
    assert set(PEFT_MODULES) == set(TARGETS)
    assert qk_permuted("gguf")
    assert not qk_permuted("hf")


def test_architecture_module(tmp_path: Path) -> None:
    assert architecture(read(tiny_llama(tmp_path / "model.gguf", **ONE))).PEFT_MODULES is PEFT_MODULES


REQUIRED = [
    "general.architecture",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str, tmp_path: Path) -> None:
    error = refused(tmp_path, metadata={key: None})
    assert error.code == "E_ARCH"
    assert f"`{key}` is missing" in str(error)


def test_vocabulary_size_must_be_known(tmp_path: Path) -> None:
    error = refused(tmp_path, metadata={"llama.vocab_size": None}, tokenizer=False)
    assert "neither `llama.vocab_size` nor `tokenizer.ggml.tokens`" in str(error)
    assert read(tiny_llama(tmp_path / "good.gguf", metadata={"llama.vocab_size": None}, **ONE)).vocab == 288


BIG = 0xFFFFFFFF
OUT_OF_RANGE = [
    ("block_count", 0, "E_ARCH"),
    ("block_count", 1 << 31, "E_LIMIT"),
    ("context_length", 0, "E_ARCH"),
    ("context_length", BIG, "E_LIMIT"),
    ("embedding_length", 0, "E_ARCH"),
    ("embedding_length", BIG, "E_LIMIT"),
    ("embedding_length", 33, "E_ARCH"),
    ("feed_forward_length", 0, "E_ARCH"),
    ("feed_forward_length", BIG, "E_LIMIT"),
    ("attention.head_count", 0, "E_ARCH"),
    ("attention.head_count", BIG, "E_LIMIT"),
    ("attention.head_count", 3, "E_ARCH"),
    ("attention.head_count", -1, "E_ARCH"),
    ("attention.head_count_kv", 0, "E_ARCH"),
    ("attention.head_count_kv", 3, "E_ARCH"),
    ("attention.head_count_kv", 8, "E_ARCH"),
    ("attention.key_length", 0, "E_ARCH"),
    ("attention.key_length", 7, "E_ARCH"),
    ("attention.key_length", BIG, "E_LIMIT"),
    ("attention.value_length", 16, "E_ARCH"),
    ("rope.dimension_count", 0, "E_ARCH"),
    ("rope.dimension_count", 7, "E_ARCH"),
    ("rope.dimension_count", 10, "E_ARCH"),
    ("rope.dimension_count", BIG, "E_LIMIT"),
    ("vocab_size", 0, "E_ARCH"),
    ("vocab_size", BIG, "E_LIMIT"),
    ("expert_count", 1, "E_ARCH"),
    ("expert_count", 8, "E_ARCH"),  # of which none is in the file
    ("expert_count", 1_000_000, "E_LIMIT"),
    ("attention.sliding_window", BIG, "E_LIMIT"),
    ("attention.causal", False, "E_ARCH"),
]


@pytest.mark.parametrize(("key", "value", "code"), OUT_OF_RANGE)
def test_dimensions_out_of_range(key: str, value: Any, code: str, tmp_path: Path) -> None:
    assert refused(tmp_path, metadata={f"llama.{key}": value}).code == code


FLOATS = ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize(
    ("value", "code"),
    [(float("nan"), "E_NONFINITE"), (float("inf"), "E_NONFINITE"), (float("-inf"), "E_NONFINITE"), (-1.0, "E_LIMIT")],
)
def test_floats_that_are_no_numbers(key: str, value: float, code: str, tmp_path: Path) -> None:
    error = refused(tmp_path, metadata={f"llama.{key}": value})
    assert error.code == code
    assert key in str(error)


@pytest.mark.parametrize("key", FLOATS[:2])
def test_zero_base_and_epsilon(key: str, tmp_path: Path) -> None:
    assert refused(tmp_path, metadata={f"llama.{key}": 0.0}).code == "E_LIMIT"


PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
INTEGERS = sorted({key for key, _, _ in OUT_OF_RANGE} - {"attention.causal"})


@pytest.mark.parametrize(
    ("key", "value"),
    [(f"llama.{key}", value) for key in INTEGERS for value in ("8", 8.0, True)]
    + [(f"llama.{key}", [8]) for key in INTEGERS if key not in PER_LAYER]
    + [(f"llama.{key}", [8.0]) for key in PER_LAYER]
    + [(f"llama.{key}", value) for key in FLOATS for value in ("1", 1, True, [1.0])]
    + [("llama.attention.causal", value) for value in (1, "yes")]
    + [("llama.rope.scaling.type", value) for value in (1, True, ["linear"])]
    + [("general.architecture", 3), ("general.type", 1), ("tokenizer.ggml.tokens", 288), ("tokenizer.ggml.bos_token_id", "1")],
)
def test_wrong_type_of_every_key(key: str, value: Any, tmp_path: Path) -> None:
    if key == "general.architecture":  # the writer insists on a string: patched after writing
        _patch_architecture_type(tiny_llama(tmp_path / "bad.gguf", **ONE))
        with pytest.raises(ModelError) as caught:
            read(tmp_path / "bad.gguf")
        assert caught.value.code == "E_TYPE"
        return
    error = refused(tmp_path, metadata={key: value})
    assert error.code == "E_TYPE"
    assert key in str(error)


def _patch_architecture_type(path: Path) -> None:
    """`general.architecture` = "llama" (string, 8 + 5 bytes) becomes an array of one u8 (type, count, 1 byte)."""
    raw = path.read_bytes()
    at = raw.index(b"general.architecture") + len(b"general.architecture")
    array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (1).to_bytes(8, "little") + b"\x01"
    path.write_bytes(raw[:at] + array + raw[at + 4 + 8 + 5 :])


def test_unknown_architecture_and_adapter(tmp_path: Path) -> None:
    error = refused(tmp_path, metadata={"general.architecture": "qwen\x1b[31m9"})
    assert error.code == "E_ARCH"
    assert "supported: gemma2, gemma3, granite, llama, olmo2, phi3, qwen2, qwen2moe, qwen3, qwen3moe, smollm3, starcoder2" in str(
        error
    )
    assert "\x1b" not in str(error)
    assert "adapter, not a model" in str(refused(tmp_path, metadata={"general.type": "adapter"}))


def test_vocabulary_and_embedding_must_agree(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(289)]
    assert refused(tmp_path, metadata={"tokenizer.ggml.tokens": tokens}).code == "E_ARCH"
    assert refused(tmp_path, metadata={"llama.vocab_size": 289}).code == "E_SHAPE"


@pytest.mark.parametrize("kind", ["bos", "eos", "unknown", "padding", "eot"])
@pytest.mark.parametrize("token", [288, -1, BIG])
def test_special_tokens_outside_the_vocabulary(kind: str, token: int, tmp_path: Path) -> None:
    error = refused(tmp_path, metadata={f"tokenizer.ggml.{kind}_token_id": token})
    assert error.code == "E_ARCH"
    assert str(token) in str(error)


@pytest.mark.parametrize("engine", ["embed", "head", "blk.0.q", "blk.0.k", "blk.0.v", "blk.0.o", "blk.0.gate", "blk.0.down"])
@pytest.mark.parametrize("axis", [0, 1])
def test_shape_mismatch(engine: str, axis: int, tmp_path: Path) -> None:
    weights = tiny_weights(TinyShape(**ONE, tied=False))
    shape = list(weights[engine].shape)
    shape[axis] *= 2
    weights[engine] = np.zeros(shape, np.float32)
    error = refused(tmp_path, weights=weights)
    if (engine, axis) == ("embed", 0):  # here it is the count of tokens that disagrees
        assert error.code == "E_ARCH"
    else:
        assert error.code == "E_SHAPE"
        assert source_name(engine, hf=False) in str(error)


def test_norm_of_wrong_shape_or_type(tmp_path: Path) -> None:
    weights = tiny_weights(TinyShape(**ONE))
    weights["blk.0.mlp_norm"] = np.ones(31, np.float32)
    assert refused(tmp_path, weights=weights).code == "E_SHAPE"
    weights["blk.0.mlp_norm"] = np.ones((1, 32), np.float32)
    assert refused(tmp_path, weights=weights).code == "E_SHAPE"


def test_unsupported_weight_type_is_named(tmp_path: Path) -> None:
    wide = ONE | {"width": 256, "ffn": 256}
    path = tiny_llama(tmp_path / "bad.gguf", type="TQ1_0", weights=tiny_weights(TinyShape(**wide)), **wide)
    with pytest.raises(InputError, match=r"`token_embd.weight`.* TQ1_0.*get the Q4_K_M, Q3_K_M or Q2_K file.*IQ4_XS") as caught:
        read(path)
    assert caught.value.exit_code == 2


def test_all_missing_tensors_at_once(tmp_path: Path) -> None:
    weights = tiny_weights(TinyShape(**ONE))
    for engine in ("embed", "blk.0.v", "final_norm"):
        del weights[engine]
    error = refused(tmp_path, weights=weights)
    assert error.code == "E_ARCH"
    for name in ("token_embd.weight", "blk.0.attn_v.weight", "output_norm.weight", "3 of 11"):
        assert name in str(error)


def test_more_layers_than_tensors_stays_short(tmp_path: Path) -> None:
    error = refused(tmp_path, metadata={"llama.block_count": 1000})
    assert "blk.1.attn_norm.weight" in str(error)
    assert len(str(error)) < 1000


def test_biases_are_read_where_they_are(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32), "blk.0.ffn_gate.bias": np.zeros(32, np.float32)}
    spec = read(tiny_llama(tmp_path / "model.gguf", extra=bias, **ONE))
    assert {name for name in spec.tensors if name.endswith("_bias")} == {"blk.0.q_bias", "blk.0.gate_bias"}
    assert spec.tensors["blk.0.q_bias"].names == ("blk.0.attn_q.bias",)
    assert refused(tmp_path, extra={"blk.0.attn_q.bias": np.zeros(31, np.float32)}).code == "E_SHAPE"
    assert "blk.1.attn_q.bias" in str(refused(tmp_path, extra=bias, layers=2))  # in one layer, not in the other


def test_tensors_that_would_change_the_result_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, extra={"output_norm.bias": np.zeros(32, np.float32)})
    assert "1 biases are in the file, but architecture llama has none there" in str(error)
    for name in ("ffn_gate_inp", "ffn_gate_exps", "ffn_up.3", "ffn_down_shexp"):
        error = refused(tmp_path, extra={f"blk.0.{name}.weight": np.zeros((4, 32), np.float32)})
        assert "1 tensors of experts are in the file" in str(error)
        assert name in str(error)


def test_sizes_by_layer(tmp_path: Path) -> None:
    """Pruned models have layers of different sizes; GGUF then holds arrays."""
    weights = tiny_weights(TinyShape(layers=2, width=32, heads=4, kv_heads=2, ffn=32))
    weights |= {"blk.1.q": np.zeros((16, 32), np.float32), "blk.1.o": np.zeros((32, 16), np.float32)}
    weights |= {f"blk.1.{part}": np.zeros((8, 32), np.float32) for part in "kv"}
    weights |= {f"blk.1.{part}": np.zeros((64, 32), np.float32) for part in ("gate", "up")}
    weights["blk.1.down"] = np.zeros((32, 64), np.float32)
    arrays = {
        "llama.attention.head_count": [4, 2],
        "llama.attention.head_count_kv": [2, 1],
        "llama.feed_forward_length": [32, 64],
    }
    path = tiny_llama(tmp_path / "m.gguf", layers=2, width=32, heads=4, kv_heads=2, ffn=32, weights=weights, metadata=arrays)
    spec = read(path)
    assert spec.blocks == (LayerSpec(4, 2, 32), LayerSpec(2, 1, 64))
    assert (spec.head_dim, spec.heads, spec.linear_shape("q", 1)) == (8, 4, (16, 32))
    for key, value, code in (
        ("attention.head_count", [4], "E_SHAPE"),
        ("attention.head_count", [4, 0], "E_ARCH"),
        ("attention.head_count_kv", [2, 4], "E_ARCH"),
        ("feed_forward_length", [32, 1 << 30], "E_LIMIT"),
        ("feed_forward_length", [32, 32], "E_SHAPE"),
        ("feed_forward_length", ["a", "b"], "E_TYPE"),
    ):
        wrong = arrays | {f"llama.{key}": value}
        path = tiny_llama(tmp_path / "m.gguf", layers=2, width=32, heads=4, kv_heads=2, ffn=32, weights=weights, metadata=wrong)
        with pytest.raises(InputError) as caught:
            read(path)
        assert caught.value.code == code, (key, value)


def test_extra_tensors_are_noted_once(tmp_path: Path) -> None:
    extra = {f"blk.{i}.attn_q_norm.weight": np.zeros(4, np.float32) for i in range(9)}
    spec = read(tiny_llama(tmp_path / "model.gguf", extra=extra, **ONE))
    assert len(spec.notes) == 1
    assert spec.notes[0].startswith("9 tensors are not used: ")
    assert len(spec.notes[0]) < 300


@pytest.mark.parametrize(
    ("factors", "code"),
    [
        (np.ones(5, np.float32), "E_SHAPE"),
        (np.ones(4, np.float16), "E_SHAPE"),
        (np.array([1, np.nan, 1, 1], np.float32), "E_NONFINITE"),
        (np.array([1, 0, 1, 1], np.float32), "E_NONFINITE"),
        (np.array([1, -2, 1, 1], np.float32), "E_NONFINITE"),
    ],
)
def test_bad_rope_factors(factors: Any, code: str, tmp_path: Path) -> None:
    assert refused(tmp_path, extra={"rope_freqs.weight": factors}).code == code


def test_sliding_window_of_every_layer(tmp_path: Path) -> None:
    spec = read(tiny_llama(tmp_path / "model.gguf", metadata={"llama.attention.sliding_window": 100}, **ONE))
    assert (spec.context, spec.notes, spec.blocks[0].window) == (256, (), 100)
    with pytest.raises(ModelError) as caught:
        read(tiny_llama(tmp_path / "model.gguf", metadata={"llama.attention.sliding_window": -1}, **ONE))
    assert caught.value.code == "E_ARCH"


def hf_spec(tmp_path: Path, **config: Any) -> ModelSpec:
    folder = tiny_hf(tmp_path / "hf", config=config, **ONE)
    return spec_from_hf(read_config(folder), hf_names(1, config.get("tie_word_embeddings", True)), name="hf")


def test_mistral(tmp_path: Path) -> None:
    spec = hf_spec(tmp_path, model_type="mistral", sliding_window=64)
    assert (spec.architecture, spec.context, spec.blocks[0].window) == ("llama", 256, 64)
    assert hf_spec(tmp_path, model_type="mistral").blocks[0].window == 4096  # MistralConfig's default
    assert hf_spec(tmp_path, model_type="llama", sliding_window=64).blocks[0].window == 0  # Llama has no window
    with pytest.raises(ModelError, match="cannot share 8"):
        hf_spec(tmp_path, model_type="mistral", num_key_value_heads=None)


def test_defaults_of_transformers(tmp_path: Path) -> None:
    """An old config.json leaves out what LlamaConfig has a default for."""
    left_out = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
    folder = tiny_hf(tmp_path / "hf", config=dict.fromkeys(left_out), **ONE)
    spec = spec_from_hf(read_config(folder), hf_names(1, tied=False), name="hf")
    assert (spec.kv_heads, spec.norm_eps, spec.tied_head) == (4, 1e-6, False)
    assert spec.ropes[0].inv_freq[1] == pytest.approx(10000 ** (-2 / 8))


@pytest.mark.parametrize(
    ("config", "code", "text"),
    [
        ({"model_type": None}, "E_ARCH", "`model_type` is missing"),
        ({"model_type": "gpt2"}, "E_ARCH", "supported: gemma2, gemma3, "),
        ({"hidden_size": None}, "E_ARCH", "`hidden_size` is missing"),
        ({"hidden_size": "32"}, "E_TYPE", "a whole number"),
        ({"hidden_size": 1e400}, "E_TYPE", "a whole number"),
        ({"hidden_size": 10**300}, "E_LIMIT", "131,072"),
        ({"num_hidden_layers": 0}, "E_ARCH", "from 1 to"),
        ({"num_hidden_layers": 2}, "E_ARCH", "layers.1.self_attn.q_proj"),
        ({"vocab_size": None}, "E_ARCH", "`vocab_size` is missing"),
        ({"num_local_experts": 8}, "E_ARCH", "mixture of experts"),
        ({"rms_norm_eps": float("nan")}, "E_NONFINITE", "rms_norm_eps"),
        ({"rope_theta": 0}, "E_LIMIT", "rope_theta"),
        ({"rope_scaling": [1]}, "E_TYPE", "an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "E_ARCH", "one setting for all layers"),
        ({"partial_rotary_factor": 0.5}, "E_ARCH", "turns whole heads"),
        ({"is_causal": False}, "E_ARCH", "embedding model"),
        ({"hidden_act": "gelu"}, "E_ARCH", "silu"),
        ({"attention_bias": True}, "E_ARCH", "4 of 15 tensors are missing: `model.layers.0.self_attn.q_proj.bias`"),
        ({"mlp_bias": True}, "E_ARCH", "`model.layers.0.mlp.gate_proj.bias`"),
        ({"mlp_bias": 1}, "E_TYPE", "true or false"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "E_ARCH", "never runs"),
        ({"quantization_config": {"quant_method": "gptq"}}, "E_ARCH", "already quantized"),
    ],
)
def test_bad_configs(config: dict[str, Any], code: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        hf_spec(tmp_path, **config)
    assert caught.value.code == code
    assert text in str(caught.value)


def test_hf_tensors_are_checked_when_slots_are_given(tmp_path: Path) -> None:
    config = read_config(tiny_hf(tmp_path / "hf", **ONE))
    shapes = {source_name(engine, hf=True): weight.shape for engine, weight in tiny_weights(TinyShape(**ONE)).items()}
    slots = {name: SimpleNamespace(shape=shape, dtype="BF16") for name, shape in shapes.items()}
    assert spec_from_hf(config, slots).notes == ()
    assert spec_from_hf(config, {**slots, "lm_head.weight": slots["model.embed_tokens.weight"]}).tied_head
    slots["model.layers.0.mlp.up_proj.weight"] = SimpleNamespace(shape=(32, 33), dtype="BF16")
    with pytest.raises(ModelError, match=r"up_proj.weight` has shape \(32, 33\)"):
        spec_from_hf(config, slots)
    slots["model.layers.0.mlp.up_proj.weight"] = SimpleNamespace(shape=(32, 32), dtype="I8")
    with pytest.raises(ModelError, match="has type I8"):
        spec_from_hf(config, slots)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "E_JSON"),
        (b"{", "E_JSON"),
        (b"[1]", "E_TYPE"),
        (b'{"a": 1, "a": 2}', "E_DUP"),
        (b'{"a": "\xff"}', "E_UTF8"),
        (b"[" * 100_000, "E_JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "E_JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "E_LIMIT"),
    ],
)
def test_broken_config_files(raw: bytes, code: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(FileFormatError) as caught:
        read_config(tmp_path)
    assert caught.value.code == code


def test_config_is_absent_or_good(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no config.json") as caught:
        read_config(tmp_path)
    assert isinstance(caught.value, InputError)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "é": [1, None]}))
    assert read_config(tmp_path) == {"model_type": "llama", "é": [1, None]}
