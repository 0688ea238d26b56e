"""Adapter packages travel between nomoat and PEFT with equal logits, whatever the row order of q and k in the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from architectures import ROWS
from engine_side import Trained, adapter_of, lora_of, random_pack, relative_error, rounding
from nomoat.adapters.package import load_adapter, save_adapter
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.models.spec import TARGETS
from parity import peft_side
from reference import Lora, Reference, random_lora
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


def check_both_ways(base: Reference, lora: Lora, folder: Path, tmp_path: Path) -> Any:
    """PEFT computes the same logits, which it returns, with a saved adapter; saved again by PEFT, it comes back as it was."""
    save_adapter(tmp_path / "adapter", adapter_of(lora), base.spec, {})
    peer = peft_side.load_base(folder, torch.float64)
    plain = peft_logits(peer)
    model = PeftModel.from_pretrained(peer, tmp_path / "adapter")
    expected = peft_logits(model)
    np.testing.assert_allclose(base.logits(TOKENS, lora=lora), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - plain).max() > 100 * TOLERANCE  # the adapter matters
    model.float().save_pretrained(tmp_path / "saved")
    assert load_adapter(tmp_path / "saved", base.spec)[0].digest == adapter_of(lora).digest
    return expected


MIXTURES = ["mixtral", "qwen3_moe"]


@pytest.mark.parametrize("source", ["gguf", "hf"])
@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_on_experts_travel_both_ways(name: str, source: str, tmp_path: Path) -> None:
    """PEFT turns the modules of experts into parameters when it loads them; saved again, they come back as they were."""
    folder = ROWS[name].folder(tmp_path / "base")
    base = Reference.load(ROWS[name].gguf_file(tmp_path / "base.gguf") if source == "gguf" else folder)
    lora = random_lora(base.spec, rank=4, scale=0.5, targets=("q", "experts"))
    check_both_ways(base, lora, folder, tmp_path)


@pytest.mark.parametrize(("name", "source"), [("qwen2_moe", "gguf"), ("qwen2_moe", "hf"), ("qwen2_moe_dense", "hf")])
def test_adapters_on_shared_experts_travel_both_ways(name: str, source: str, tmp_path: Path) -> None:
    """They are modules in PEFT, as everywhere; adapters on the experts beside them are not seen there."""
    folder = ROWS[name].folder(tmp_path / "base")
    base = Reference.load(ROWS[name].gguf_file(tmp_path / "base.gguf") if source == "gguf" else folder)
    lora = random_lora(base.spec, rank=4, scale=0.5, targets=TARGETS)
    assert (0, "shared_down") in lora
    expected = check_both_ways(base, lora, folder, tmp_path)
    both = lora | random_lora(base.spec, rank=4, scale=0.5, targets=("experts",))
    save_adapter(tmp_path / "both", adapter_of(both), base.spec, {})
    model = PeftModel.from_pretrained(peft_side.load_base(folder, torch.float64), tmp_path / "both")
    np.testing.assert_allclose(peft_logits(model), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["mlp.experts.down_proj"], ["experts.gate_up_proj"]])
@pytest.mark.parametrize("name", [*MIXTURES, "qwen2_moe"])
def test_adapters_on_parameters_saved_by_peft_load_here(name: str, parameters: list[str], tmp_path: Path) -> None:
    folder = ROWS[name].folder(tmp_path / "base")
    base = Reference.load(folder)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj"], target_parameters=parameters, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(peft_side.load_base(folder, torch.float64), config).eval()
    expected = peft_logits(model)
    model.float().save_pretrained(tmp_path / "adapter")
    adapter, _ = load_adapter(tmp_path / "adapter", base.spec)
    np.testing.assert_allclose(base.logits(TOKENS, lora=lora_of(adapter)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_of_adapters_on_experts(name: str, tmp_path: Path) -> None:
    """In PEFT's parameters gate and up have ranks of their own, so the gradients of their A are one below the other.

    Those in bf16 are compared where no row is near to another expert: test_engine_moe.py.
    """
    folder = ROWS[name].folder(tmp_path / "base")
    model = Model.load(folder, quantize="none")
    spec = model.spec
    trained = Trained(TrainableLora(spec, rank=4, alpha=8.0, targets=("experts",)))
    trained.set(random_lora(spec, rank=4, scale=2.0, targets=("experts",)))
    save_adapter(tmp_path / "adapter", trained.lora.to_adapter(), spec, {})
    peer = PeftModel.from_pretrained(peft_side.load_base(folder, torch.float32), tmp_path / "adapter", is_trainable=True).eval()
    pack = random_pack(spec.vocab, (40, 14, 2), seed=1)
    peft_side.loss_of(peer, pack).backward()
    found, _ = trained.gradients(model, pack, "f32")
    for layer, block in enumerate(spec.blocks):
        outer = peer.base_model.model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for wrapper, targets in ((outer.base_layer, ("gate", "up")), (outer, ("down",))):
            ranks, first = 4 * len(targets), 0
            da = wrapper.lora_A["default"].weight.grad.numpy().reshape(block.experts, ranks, -1)
            db = wrapper.lora_B["default"].weight.grad.numpy().reshape(-1, ranks, block.experts).transpose(2, 0, 1)
            for i, target in enumerate(targets):
                rows = spec.linear_shape(target, layer)[0]
                expected = (da[:, 4 * i : 4 * i + 4], db[:, first : first + rows, 4 * i : 4 * i + 4])
                first += rows
                for side in (0, 1):
                    assert relative_error(found[layer, target][side], expected[side]) < 2 * rounding(spec, 40)
