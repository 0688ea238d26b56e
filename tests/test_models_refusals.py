"""What each architecture refuses: one typed error for every setting that is wrong, impossible, or not what it can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nomoat.errors import InputError, ModelError
from nomoat.models import gguf_form, spec_from_hf
from nomoat.models.check import source_shapes
from test_models_architectures import GOLDEN, read, slots, write

NAN, HUGE = float("nan"), 1 << 40

#: (case, change of its config.json, code, part of the message)
CONFIGS: list[tuple[str, dict[str, Any], str, str]] = [
    *((name, {"num_attention_heads": 0}, "E_ARCH", "num_attention_heads") for name in GOLDEN if name != "gemma3"),
    *((name, {"num_key_value_heads": 3}, "E_ARCH", "cannot share") for name in GOLDEN if name != "gemma3"),
    *((name, {"hidden_act": "relu", "hidden_activation": "relu"}, "E_ARCH", "relu") for name in GOLDEN if name != "gemma3"),
    ("starcoder2", {"hidden_act": "gelu"}, "E_ARCH", "gelu_pytorch_tanh"),  # the exact form
    ("llama", {"hidden_size": 33, "head_dim": None}, "E_ARCH", "not a multiple"),
    ("llama", {"head_dim": 7}, "E_ARCH", "both must be even"),
    ("llama", {"num_local_experts": 4}, "E_ARCH", "mixture of experts is not supported by architecture llama"),
    ("mistral", {"sliding_window": -1}, "E_ARCH", "sliding_window"),
    ("mistral", {"sliding_window": 0}, "E_ARCH", "sliding_window"),
    ("mistral", {"sliding_window": HUGE}, "E_LIMIT", "sliding_window"),
    ("mistral", {"sliding_window": 1.5}, "E_TYPE", "sliding_window"),
    ("phi3", {"sliding_window": -16}, "E_ARCH", "sliding_window"),
    ("starcoder2", {"sliding_window": HUGE}, "E_LIMIT", "sliding_window"),
    ("mixtral", {"num_local_experts": 0}, "E_ARCH", "num_local_experts"),
    ("mixtral", {"num_local_experts": 1}, "E_ARCH", "num_local_experts"),
    ("mixtral", {"num_local_experts": 5000}, "E_LIMIT", "num_local_experts"),
    ("mixtral", {"num_local_experts": 1024, "num_hidden_layers": 1000}, "E_LIMIT", "1,024,000 experts in all layers"),
    ("mixtral", {"num_experts_per_tok": 5}, "E_LIMIT", "num_experts_per_tok"),
    ("mixtral", {"num_experts_per_tok": 0}, "E_ARCH", "num_experts_per_tok"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, "E_LIMIT", "num_experts_per_tok"),
    ("qwen3_moe", {"moe_intermediate_size": 0}, "E_ARCH", "moe_intermediate_size"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "E_ARCH", "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [2]}, "E_LIMIT", "mlp_only_layers"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, "E_ARCH", "mlp_only_layers"),
    ("qwen3_moe", {"mlp_only_layers": [0] * 9}, "E_LIMIT", "mlp_only_layers"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "E_TYPE", "mlp_only_layers"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "E_TYPE", "norm_topk_prob"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "E_ARCH", "shared_expert_intermediate_size"),
    ("qwen2_moe", {"shared_expert_intermediate_size": HUGE}, "E_LIMIT", "shared_expert_intermediate_size"),
    ("qwen2_moe", {"shared_expert_intermediate_size": "24"}, "E_TYPE", "shared_expert_intermediate_size"),
    ("qwen2_moe", {"qkv_bias": 1}, "E_TYPE", "qkv_bias"),
    ("qwen2_moe", {"num_experts": 0}, "E_ARCH", "num_experts"),
    ("qwen2_window", {"layer_types": ["full_attention"]}, "E_SHAPE", "3 values"),
    ("qwen2_window", {"layer_types": ["full_attention", "none", "full_attention"]}, "E_ARCH", "none"),
    ("qwen2_window", {"layer_types": [1, 2, 3]}, "E_TYPE", "layer_types"),
    ("qwen2_window", {"layer_types": "full_attention"}, "E_TYPE", "layer_types"),
    ("qwen2_window", {"sliding_window": None}, "E_ARCH", "window of the sliding layers"),
    ("qwen2_window", {"use_sliding_window": "yes"}, "E_TYPE", "use_sliding_window"),
    ("qwen2_window", {"layer_types": None, "max_window_layers": -1}, "E_ARCH", "max_window_layers"),
    ("gemma2", {"attn_logit_softcapping": 0}, "E_LIMIT", "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": -30.0}, "E_LIMIT", "final_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": NAN}, "E_NONFINITE", "final_logit_softcapping"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "E_LIMIT", "query_pre_attn_scalar"),
    ("gemma2", {"use_bidirectional_attention": True}, "E_ARCH", "embedding model"),
    ("gemma2", {"layer_types": ["full_attention"] * 4}, "E_SHAPE", "layer_types"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "E_ARCH", "no cap there"),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "E_ARCH", "sliding_window_pattern"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": NAN}}}, "E_NONFINITE", "factor"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {}, "sliding_attention": 3}}, "E_TYPE", "sliding_attention"),
    ("gemma3_text", {"rope_parameters": None, "rope_local_base_freq": 0}, "E_LIMIT", "rope_local_base_freq"),
    ("phi3_longrope", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "E_ARCH", "short_factor"),
    ("phi3", {"partial_rotary_factor": 0.0, "rope_parameters": None}, "E_ARCH", "both must be even"),
    ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "E_LIMIT", "partial_rotary_factor"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, "E_SHAPE", "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 2]}, "E_LIMIT", "no_rope_layers[4]"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "E_ARCH", "no_rope_layer_interval"),
    ("granite", {"logits_scaling": 0}, "E_LIMIT", "logits_scaling"),
    ("granite", {"attention_multiplier": -1.0}, "E_LIMIT", "attention_multiplier"),
    ("granite", {"embedding_multiplier": NAN}, "E_NONFINITE", "embedding_multiplier"),
    ("granite", {"residual_multiplier": "0.22"}, "E_TYPE", "residual_multiplier"),
    ("olmo2", {"rms_norm_eps": 0}, "E_LIMIT", "rms_norm_eps"),
    ("starcoder2", {"norm_epsilon": 2}, "E_LIMIT", "norm_epsilon"),
    ("starcoder2", {"use_bias": None, "tie_word_embeddings": 1}, "E_TYPE", "tie_word_embeddings"),
]


@pytest.mark.parametrize(("name", "change", "code", "text"), CONFIGS)
def test_config(name: str, change: dict[str, Any], code: str, text: str) -> None:
    config = {**GOLDEN[name]["config"], **change}
    for build in (lambda: spec_from_hf(config, None), lambda: gguf_form(config)):
        with pytest.raises(ModelError) as caught:
            build()
        assert caught.value.code == code, caught.value
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"short_factor": [1.0, 1.0]}, "E_SHAPE", "3 values"),
        ({"long_factor": [1.0] * 4}, "E_SHAPE", "3 values"),
        ({"long_factor": None}, "E_ARCH", "`long_factor` is missing"),
        ({"long_factor": 2.0}, "E_TYPE", "long_factor"),
        ({"short_factor": [1.0, NAN, 1.0]}, "E_NONFINITE", "short_factor[1]"),
        ({"short_factor": [1.0, 0.0, 1.0]}, "E_LIMIT", "short_factor[1]"),
        ({"short_factor": [1.0, "2", 1.0]}, "E_TYPE", "short_factor[1]"),
        ({"attention_factor": 0.0}, "E_LIMIT", "attention_factor"),
        ({"attention_factor": NAN}, "E_NONFINITE", "attention_factor"),
    ],
)
def test_longrope(changes: dict[str, Any], code: str, text: str) -> None:
    config = GOLDEN["phi3_longrope"]["config"]
    with pytest.raises(ModelError) as caught:
        spec_from_hf({**config, "rope_parameters": {**config["rope_parameters"], **changes}}, None)
    assert caught.value.code == code
    assert text in str(caught.value)
    with pytest.raises(ModelError, match="2 or more"):
        spec_from_hf({**config, "original_max_position_embeddings": 1}, None)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"factor": 0}, "E_LIMIT", "factor"),
        ({"factor": NAN}, "E_NONFINITE", "factor"),
        ({"beta_fast": 0.5}, "E_LIMIT", "beta_fast"),
        ({"beta_slow": -1}, "E_LIMIT", "beta_slow"),
        ({"beta_fast": "32"}, "E_TYPE", "beta_fast"),
        ({"mscale": NAN, "mscale_all_dim": 1}, "E_NONFINITE", "mscale"),
        ({"truncate": 1}, "E_TYPE", "truncate"),
        ({"rope_theta": 1}, "E_LIMIT", "more than 1"),
        ({"original_max_position_embeddings": 0}, "E_ARCH", "original_max_position_embeddings"),
        ({"original_max_position_embeddings": HUGE}, "E_LIMIT", "original_max_position_embeddings"),
    ],
)
def test_yarn(changes: dict[str, Any], code: str, text: str) -> None:
    config = GOLDEN["qwen2_yarn"]["config"]
    with pytest.raises(ModelError) as caught:
        spec_from_hf({**config, "rope_parameters": {**config["rope_parameters"], **changes}}, None)
    assert caught.value.code == code
    assert text in str(caught.value)


@pytest.mark.parametrize("name", GOLDEN)
def test_missing_and_misshapen_tensors_of_folders(name: str) -> None:
    """Each tensor of the last layer in turn: without it, and with a row too many."""
    config = GOLDEN[name]["config"]
    last = f"layers.{spec_from_hf(config, None).layers - 1}."
    for tensor in [tensor for tensor in slots(name) if last in tensor and "vision" not in tensor]:
        fewer = slots(name)
        del fewer[tensor]
        with pytest.raises(ModelError) as caught:
            spec_from_hf(config, fewer)
        assert (caught.value.code, "1 of " in str(caught.value), tensor in str(caught.value)) == ("E_ARCH", True, True)
        wrong = slots(name)
        wrong[tensor].shape = (wrong[tensor].shape[0] + 1, *wrong[tensor].shape[1:])
        with pytest.raises(ModelError) as caught:
            spec_from_hf(config, wrong)
        assert (caught.value.code, tensor in str(caught.value)) == ("E_SHAPE", True)


@pytest.mark.parametrize(
    ("name", "extra", "text"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias", "biases"),
        ("qwen2", "model.layers.1.self_attn.o_proj.bias", "biases"),
        ("qwen2", "lm_head.bias", "biases"),
        ("gemma3", "language_model.model.norm.bias", "biases"),
        ("starcoder2_no_bias", "model.layers.0.mlp.c_fc.bias", "biases"),
        ("mistral", "model.layers.0.block_sparse_moe.gate.weight", "experts"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.4.w1.weight", "experts"),
        ("qwen3_moe", "model.layers.1.mlp.experts.9.up_proj.weight", "experts"),
        ("qwen3_moe", "model.layers.1.mlp.shared_expert.up_proj.weight", "experts"),
    ],
)
def test_tensors_that_would_be_left_out(name: str, extra: str, text: str) -> None:
    with pytest.raises(ModelError, match=f"1 (tensors of )?{text}") as caught:
        spec_from_hf(GOLDEN[name]["config"], [*slots(name), extra])
    assert extra in str(caught.value)


def test_experts_that_transformers_fused() -> None:
    names = [name for name in slots("mixtral") if ".experts." not in name]
    names += [f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")]
    with pytest.raises(ModelError, match="save the model in its original format"):
        spec_from_hf(GOLDEN["mixtral"]["config"], names)


#: (case, change of the keys below its architecture, code, part of the message)
METADATA: list[tuple[str, dict[str, Any], str, str]] = [
    *((name, {"attention.head_count": 0}, "E_ARCH", "head_count") for name in ("gemma3_text", "phi3", "granite", "starcoder2")),
    ("qwen2", {"attention.head_count_kv": 3}, "E_ARCH", "cannot share"),
    ("qwen3", {"attention.key_length": 24}, "E_ARCH", "value_length"),
    ("mistral", {"attention.sliding_window": -1}, "E_ARCH", "sliding_window"),
    ("mistral", {"attention.sliding_window": 0xFFFFFFFF}, "E_LIMIT", "sliding_window"),
    ("gemma2", {"attention.sliding_window_pattern": [True]}, "E_SHAPE", "sliding_window_pattern"),
    ("gemma2", {"attention.sliding_window_pattern": [1, 0, 1]}, "E_TYPE", "sliding_window_pattern"),
    ("gemma2", {"attention.sliding_window_pattern": 1 << 20}, "E_LIMIT", "sliding_window_pattern"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "E_LIMIT", "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "E_LIMIT", "final_logit_softcapping"),
    ("gemma3_text", {"final_logit_softcapping": NAN}, "E_NONFINITE", "final_logit_softcapping"),
    ("gemma3_text", {"rope.freq_base_swa": 0.0}, "E_LIMIT", "freq_base_swa"),
    ("gemma3_text", {"attention.scale": -1.0}, "E_LIMIT", "attention.scale"),
    ("granite", {"logit_scale": 0.0}, "E_LIMIT", "logit_scale"),
    ("granite", {"logit_scale": None}, "E_ARCH", "logit_scale"),
    ("granite", {"expert_count": 8}, "E_ARCH", "mixture of experts (8 experts) is not supported by architecture granite"),
    ("mixtral", {"expert_count": 8}, "E_SHAPE", "ffn_gate_inp"),
    ("mixtral", {"expert_count": 2}, "E_SHAPE", "ffn_gate_inp"),
    ("mixtral", {"expert_count": None}, "E_ARCH", "tensors of experts are in the file"),
    ("mixtral", {"expert_count": -4}, "E_ARCH", "expert_count"),
    ("mixtral", {"expert_used_count": 5}, "E_LIMIT", "expert_used_count"),
    ("mixtral", {"expert_used_count": 0}, "E_ARCH", "expert_used_count"),
    ("mixtral", {"expert_used_count": None}, "E_ARCH", "expert_used_count"),
    ("mixtral", {"expert_shared_count": 1}, "E_ARCH", "expert_shared_count"),
    ("mixtral", {"expert_gating_func": 2}, "E_ARCH", "softmax"),
    ("mixtral", {"expert_weights_scale": 2.5}, "E_ARCH", "expert_weights_scale"),
    ("qwen3_moe", {"expert_feed_forward_length": 17}, "E_SHAPE", "_exps.weight"),
    ("qwen3_moe", {"expert_weights_norm": 1}, "E_TYPE", "expert_weights_norm"),
    ("qwen3_moe", {"expert_shared_feed_forward_length": 24}, "E_ARCH", "expert_shared_feed_forward_length"),
    ("qwen2_moe", {"expert_shared_feed_forward_length": 25}, "E_SHAPE", "_shexp.weight"),
    ("qwen2_moe", {"expert_shared_feed_forward_length": None}, "E_SHAPE", "_shexp.weight"),
    ("qwen2_moe", {"expert_shared_feed_forward_length": 1 << 30}, "E_LIMIT", "expert_shared_feed_forward_length"),
    ("qwen2_moe", {"expert_shared_feed_forward_length": -1}, "E_ARCH", "expert_shared_feed_forward_length"),
    ("qwen2_moe", {"expert_count": None}, "E_ARCH", "tensors of experts are in the file"),
    ("qwen2_yarn", {"rope.scaling.type": "ntk\x1b[31m"}, "E_ARCH", "rope.scaling.type"),
    ("qwen2_yarn", {"rope.scaling.factor": NAN}, "E_NONFINITE", "rope.scaling.factor"),
    ("qwen2_yarn", {"rope.scaling.yarn_beta_fast": 0.0}, "E_LIMIT", "yarn_beta_fast"),
    ("qwen2_yarn", {"rope.scaling.yarn_beta_fast": 0.5}, "E_LIMIT", "yarn_beta_fast"),
    ("qwen2_yarn", {"rope.scaling.original_context_length": 0}, "E_ARCH", "original_context_length"),
    ("qwen2_yarn", {"rope.scaling.attn_factor": 0.0}, "E_LIMIT", "attn_factor"),
    ("qwen2_yarn", {"rope.freq_base": 1.0}, "E_LIMIT", "more than 1"),
    ("phi3_longrope", {"rope.dimension_count": 7}, "E_ARCH", "both must be even"),
    ("phi3_longrope", {"rope.dimension_count": 4}, "E_SHAPE", "rope_freqs|rope_factors"),
    ("starcoder2", {"attention.layer_norm_epsilon": None}, "E_ARCH", "layer_norm_epsilon"),
    ("olmo2", {"attention.causal": False}, "E_ARCH", "embedding model"),
]


@pytest.mark.parametrize(("name", "change", "code", "text"), METADATA)
def test_metadata(name: str, change: dict[str, Any], code: str, text: str, tmp_path: Path) -> None:
    form, metadata, divisors = gguf_form(GOLDEN[name]["config"])
    changed = metadata | {f"{form.architecture}.{key}": value for key, value in change.items()}
    path = write(tmp_path / "bad.gguf", form, changed, divisors)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.code == code, caught.value
    assert any(part in str(caught.value) for part in text.split("|"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_longrope"])
@pytest.mark.parametrize("tensor", ["rope_factors_long.weight", "rope_factors_short.weight"])
@pytest.mark.parametrize(
    ("values", "code"),
    [
        (np.ones(2, np.float32), "E_SHAPE"),
        (np.ones(3, np.float16), "E_SHAPE"),
        (np.array([1, np.nan, 1, 1], np.float32), "E_NONFINITE"),
        (np.array([1, 0, 1, 1], np.float32), "E_NONFINITE"),
    ],
)
def test_rotary_divisors(name: str, tensor: str, values: Any, code: str, tmp_path: Path) -> None:
    form, metadata, divisors = gguf_form(GOLDEN[name]["config"])
    if code == "E_NONFINITE":
        values = values[: len(divisors[tensor])]
    with pytest.raises(ModelError) as caught:
        read(write(tmp_path / "bad.gguf", form, metadata, divisors | {tensor: values}))
    assert (caught.value.code, tensor in str(caught.value)) == (code, True)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe_dense_layers", "gemma3_text", "phi3", "olmo2", "starcoder2", "mixtral"])
def test_missing_and_misshapen_tensors_of_gguf(name: str, tmp_path: Path) -> None:
    """Each tensor of layer 1 in turn: without it, and with twice its first dimension."""
    form, metadata, divisors = gguf_form(GOLDEN[name]["config"])
    for tensor, shape in source_shapes(form).items():
        if not tensor.startswith("blk.1."):
            continue
        with pytest.raises(ModelError) as caught:
            read(write(tmp_path / "m.gguf", form, metadata, {**divisors, tensor: None}))
        assert caught.value.code == "E_ARCH"  # without its router, a sparse layer is expected to be dense
        assert tensor in str(caught.value) or "ffn_gate_inp" in tensor
        with pytest.raises(ModelError) as caught:
            read(
                write(tmp_path / "m.gguf", form, metadata, {**divisors, tensor: np.zeros((2 * shape[0], *shape[1:]), np.float32)})
            )
        assert (caught.value.code, tensor in str(caught.value)) == ("E_SHAPE", True)
