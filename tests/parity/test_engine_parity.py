"""The engine against transformers and PEFT in float32: logits, all LoRA gradients, a 300-step loss curve, adapters both ways.

The base holds weights that Q8_0 stores exactly, so that a Hugging Face folder, which is quantized at load, a GGUF of type Q8_0
and the float32 model in torch are one model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from engine_side import Trained, adapter_of, cosine, flat, loss, random_pack, relative_error
from nomoat.adapters.package import load_adapter, save_adapter
from nomoat.models.rope import interleaved_rows
from parity import peft_side
from parity.peft_side import q8_grid
from reference import Lora, Reference, random_lora, weights_from_gguf
from tiny import Shape, source_name, tiny_hf, tiny_llama, tiny_weights

pytest.importorskip("nomoat._native")

from nomoat._native import adamw
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.engine.stack import Stack

SHAPE: dict[str, Any] = {"width": 64, "heads": 4, "kv_heads": 2, "ffn": 96}
TOKENS = [1, 52, 287, 11, 3, 3, 200, 77, 140, 9, 250, 18]
#: Both sides round in float32: eps x sqrt(64 products) x 2 layers x 7 linears, doubled for two sides
TOLERANCE = 2e-5


class Base(NamedTuple):
    """The same weights in torch and in the engine, from one of the two sources."""

    torch: LlamaForCausalLM
    model: Model
    gguf: bool


@pytest.fixture(params=["gguf", "hf"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    weights = q8_grid(tiny_weights(Shape(**SHAPE)))
    folder = tiny_hf(tmp_path / "base", weights=weights, **SHAPE)
    path = tiny_llama(tmp_path / "base.gguf", type="Q8_0", weights=weights, **SHAPE) if request.param == "gguf" else folder
    return Base(peft_side.load_base(folder, torch.float32), Model.load(path), request.param == "gguf")


def hf_rows(lora: Lora, base: Base) -> Lora:
    """The engine's adapter with rows of q and k as Hugging Face has them."""
    if not base.gguf:
        return lora
    spec = base.model.spec
    turned = dict(lora)
    for (layer, target), (a, b, scale) in lora.items():
        if target in ("q", "k"):
            back = np.argsort(interleaved_rows(spec.heads if target == "q" else spec.kv_heads, spec.head_dim))
            turned[layer, target] = (a, b[back], scale)
    return turned


def torch_logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        found: npt.NDArray[np.float32] = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


def test_logits(base: Base) -> None:
    found = base.model.logits(TOKENS, precision="f32")
    assert relative_error(found, torch_logits(base.torch).astype(np.float64)) < TOLERANCE


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_all_lora_gradients(base: Base, precision: str) -> None:
    trained = Trained(TrainableLora(base.model.spec, rank=4, alpha=8.0))
    pack = random_pack(base.model.spec.vocab, (9, 14, 2), seed=1)
    found, logp = trained.gradients(base.model, pack, precision)
    peer = peft_side.with_lora(base.torch, hf_rows(trained.values(), base))
    expected = peft_side.gradients(peer, pack)
    expected = {place: (pair[0].astype(np.float64), pair[1].astype(np.float64)) for place, pair in expected.items()}
    found = {place: pair[:2] for place, pair in hf_rows({p: (*g, 1.0) for p, g in found.items()}, base).items()}
    assert found.keys() == expected.keys()
    if precision == "f32":
        assert loss(pack, logp) == pytest.approx(float(peft_side.loss_of(peer, pack).detach()), rel=TOLERANCE)
        assert relative_error(flat(found), flat(expected)) < TOLERANCE
    for place, pair in expected.items():
        for part in (0, 1):
            assert cosine(found[place][part], pair[part]) > 0.999, (place, "AB"[part])


def our_curve(model: Model, trained: Trained, packs: list[Any], learning_rate: float, precision: str) -> list[float]:
    """What `peft_side.loss_curve` does, by the engine."""
    lora = trained.lora
    first = [np.zeros_like(parameter) for parameter in lora.parameters]
    second = [np.zeros_like(parameter) for parameter in lora.parameters]
    losses = []
    for step, pack in enumerate(packs, start=1):
        lora.zero_grad()
        d_logp = np.full(pack.rows, -1 / pack.rows, np.float32)
        losses.append(loss(pack, model.loss_gradients(pack, lora, d_logp, precision=precision)))
        for group in zip(lora.parameters, lora.gradients, first, second, strict=True):
            adamw(*group, learning_rate, 0.9, 0.999, 1e-8, 0.0, step, 1.0)
    return losses


@pytest.mark.parametrize(("precision", "tolerance"), [("f32", 0.005), ("bf16", 0.005)])
def test_loss_curve_of_300_steps(precision: str, tolerance: float, tmp_path: Path) -> None:
    weights = q8_grid(tiny_weights(Shape(**SHAPE)))
    folder = tiny_hf(tmp_path / "base", weights=weights, **SHAPE)
    base = Base(peft_side.load_base(folder, torch.float32), Model.load(folder), gguf=False)
    trained = Trained(TrainableLora(base.model.spec, rank=4, alpha=8.0), seed=3)
    start = random_lora(base.model.spec, rank=4, scale=2.0, seed=4)
    trained.set({place: (a, np.zeros_like(b), scale) for place, (a, b, scale) in start.items()})
    packs = peft_side.markov_packs(base.model.spec.vocab, steps=300, seed=5)
    expected = np.array(peft_side.loss_curve(peft_side.with_lora(base.torch, trained.values()), packs, learning_rate=3e-3))
    found = np.array(our_curve(base.model, trained, packs, 3e-3, precision))
    assert expected[-10:].mean() < 0.5 * expected[:10].mean()  # it learned
    windows = (-1, 10)  # ten steps each: a single batch of 36 tokens is too small a sample of either curve
    ratio = found.reshape(windows).mean(1) / expected.reshape(windows).mean(1)
    assert np.abs(ratio - 1).max() < tolerance


def test_saved_here_loads_in_peft(base: Base, tmp_path: Path) -> None:
    trained = Trained(TrainableLora(base.model.spec, rank=4, alpha=8.0), seed=6)
    adapter = trained.lora.to_adapter()
    save_adapter(tmp_path / "adapter", adapter, base.model.spec, {})
    ours = base.model.logits(TOKENS, stack=Stack(base.model.spec, [(adapter, 1.0)]), precision="f32")
    theirs = torch_logits(PeftModel.from_pretrained(base.torch, tmp_path / "adapter").eval()).astype(np.float64)
    assert relative_error(ours, theirs) < TOLERANCE
    assert relative_error(base.model.logits(TOKENS, precision="f32"), theirs) > 1000 * TOLERANCE  # the adapter matters


def test_saved_by_peft_loads_here(base: Base, tmp_path: Path) -> None:
    peer = peft_side.with_lora(base.torch, random_lora(base.model.spec, rank=4, scale=2.0, seed=7))
    peer.save_pretrained(tmp_path / "adapter")
    adapter, _ = load_adapter(tmp_path / "adapter", base.model.spec)
    ours = base.model.logits(TOKENS, stack=Stack(base.model.spec, [(adapter, 1.0)]), precision="f32")
    assert relative_error(ours, torch_logits(peer).astype(np.float64)) < TOLERANCE


def test_smollm2_with_an_adapter_in_peft(smollm2: Path, tmp_path: Path) -> None:
    """The real model: its weights as `gguf` dequantizes them, in torch, with an adapter that nomoat saved."""
    model = Model.load(smollm2)
    spec, weights = weights_from_gguf(smollm2)
    config = LlamaConfig(
        hidden_size=spec.width,
        intermediate_size=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        vocab_size=spec.vocab,
        max_position_embeddings=spec.context,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    state = {}
    for engine, weight in weights.items():
        if engine.endswith((".q", ".k")):
            back = np.argsort(interleaved_rows(spec.heads if engine.endswith("q") else spec.kv_heads, spec.head_dim))
            weight = weight[back]
        state[source_name(engine, hf=True)] = torch.from_numpy(np.ascontiguousarray(weight))
    del weights
    peer = LlamaForCausalLM(config).eval()
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    peer.tie_weights()
    tokens = model.tokenizer.encode("The capital of France is Paris, and the capital of Italy is")

    def torch_row() -> npt.NDArray[np.float64]:
        with torch.no_grad():
            return np.asarray(peer(torch.tensor([tokens])).logits[0].numpy(), np.float64)

    assert relative_error(model.logits(tokens, precision="f32"), torch_row()) < 1e-4
    adapter = adapter_of(random_lora(spec, rank=4, scale=0.5, seed=8))
    save_adapter(tmp_path / "adapter", adapter, spec, {})
    plain = torch_row()
    peer = PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    ours = model.logits(tokens, stack=Stack(spec, [(adapter, 1.0)]), precision="f32")
    assert relative_error(ours, torch_row()) < 1e-4
    assert relative_error(plain, torch_row()) > 0.01  # the adapter matters


def test_the_reference_is_the_same_model(base: Base, tmp_path: Path) -> None:
    """Closes the triangle: reference, transformers and engine from the same file."""
    path = tmp_path / ("base.gguf" if base.gguf else "base")
    assert relative_error(torch_logits(base.torch), Reference.load(path).logits(TOKENS)) < TOLERANCE
