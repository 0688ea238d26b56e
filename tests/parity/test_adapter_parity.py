"""Adapter packages travel between nomoat and PEFT with equal logits, whatever the row order of q and k in the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from engine_side import adapter_of, lora_of
from nomoat.adapters.package import load_adapter, save_adapter
from nomoat.models.spec import TARGETS
from parity import peft_side
from reference import Reference, random_lora
from tiny import tiny_hf, tiny_llama

TOKENS = [1, 52, 287, 11, 3, 3, 200, 77, 140, 9, 250, 18]
SHAPE: dict[str, Any] = {"width": 64, "heads": 4, "kv_heads": 2, "ffn": 96}
# float64 on both sides, except transformers' float32 angles: 12 positions x eps32 of logits that reach 5
TOLERANCE = 5 * 12 * float(np.finfo(np.float32).eps)


def peft_logits(model: PeftModel) -> Any:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("source", ["gguf", "hf"])
@pytest.mark.parametrize("targets", [TARGETS, ("q", "k"), ("v", "down")])
def test_saved_here_loads_in_peft(source: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "base", **SHAPE)
    base = Reference.load(tiny_llama(tmp_path / "base.gguf", **SHAPE) if source == "gguf" else folder)
    lora = random_lora(base.spec, rank=4, scale=0.5, targets=targets)
    save_adapter(tmp_path / "adapter", adapter_of(lora), base.spec, {})
    model = PeftModel.from_pretrained(peft_side.load_base(folder, torch.float64), tmp_path / "adapter")
    np.testing.assert_allclose(base.logits(TOKENS, lora=lora), peft_logits(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("source", ["gguf", "hf"])
def test_saved_by_peft_loads_here(source: str, tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "base", **SHAPE)
    base = Reference.load(tiny_llama(tmp_path / "base.gguf", **SHAPE) if source == "gguf" else folder)
    model = peft_side.with_lora(peft_side.load_base(folder, torch.float64), random_lora(base.spec, rank=4, scale=0.5))
    expected = peft_logits(model)
    model.float().save_pretrained(tmp_path / "adapter")
    adapter, manifest = load_adapter(tmp_path / "adapter", base.spec)
    assert manifest == {}
    assert (adapter.rank, adapter.alpha) == (4, 2.0)
    np.testing.assert_allclose(base.logits(TOKENS, lora=lora_of(adapter)), expected, rtol=0, atol=TOLERANCE)


def test_the_permutation_matters(tmp_path: Path) -> None:
    """Without it the logits of a GGUF base would differ by far more than the tolerance: the tests above can fail."""
    base = Reference.load(tiny_llama(tmp_path / "base.gguf", **SHAPE))
    folder = tiny_hf(tmp_path / "base", **SHAPE)
    lora = random_lora(base.spec, rank=4, scale=0.5, targets=("q", "k"))
    model = peft_side.with_lora(peft_side.load_base(folder, torch.float64), lora)
    assert np.abs(base.logits(TOKENS, lora=lora) - peft_logits(model)).max() > 100 * TOLERANCE


@pytest.fixture
def phi3(tmp_path: Path) -> tuple[Reference, Any]:
    """A tiny Phi 3 by transformers, whose q, k, v are one module and gate, up another, and the reference from its folder."""
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=288,
        max_position_embeddings=256, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi3")
    base = Phi3ForCausalLM.from_pretrained(tmp_path / "phi3", dtype=torch.float64, attn_implementation="eager").eval()
    return Reference.load(tmp_path / "phi3"), base


@pytest.mark.parametrize("targets", [TARGETS, ("q",), ("k", "v", "up"), ("gate", "down")])
def test_fused_modules_saved_here_load_in_peft(phi3: tuple[Reference, Any], targets: tuple[str, ...], tmp_path: Path) -> None:
    reference, base = phi3
    lora = random_lora(reference.spec, rank=4, scale=0.5, targets=targets)
    save_adapter(tmp_path / "adapter", adapter_of(lora), reference.spec, {})
    plain = peft_logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(reference.logits(TOKENS, lora=lora), peft_logits(model), rtol=0, atol=TOLERANCE)
    assert np.abs(peft_logits(model) - plain).max() > 100 * TOLERANCE  # the adapter matters


def test_fused_modules_saved_by_peft_load_here(phi3: tuple[Reference, Any], tmp_path: Path) -> None:
    reference, base = phi3
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    expected = peft_logits(model)
    model.float().save_pretrained(tmp_path / "adapter")
    adapter, _ = load_adapter(tmp_path / "adapter", reference.spec)
    assert adapter.targets == TARGETS
    np.testing.assert_allclose(reference.logits(TOKENS, lora=lora_of(adapter)), expected, rtol=0, atol=TOLERANCE)
