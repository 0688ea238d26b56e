"""The other side of every comparison: transformers' Llama with PEFT's LoRA, driven with our weights, adapters and packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from nomoat.data.pack import Pack
from nomoat.models.llama import PEFT_MODULES
from reference import Lora, Place
from tiny import Weights

Gradients = dict[Place, tuple[npt.NDArray[Any], npt.NDArray[Any]]]


def q8_grid(weights: Weights) -> Weights:
    """Matrices rounded to what Q8_0 holds exactly, so that a folder quantized at load still has the weights in it."""
    kind = gguf.GGMLQuantizationType.Q8_0
    return {name: dequantize(quantize(w, kind), kind) if w.ndim == 2 else w for name, w in weights.items()}


def load_base(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def with_lora(base: LlamaForCausalLM, lora: Lora) -> PeftModel:
    """PEFT's LoRA holding the given A and B (Hugging Face row order)."""
    rank = next(iter(lora.values()))[0].shape[0]
    scale = next(iter(lora.values()))[2]
    targets = sorted({PEFT_MODULES[target].split(".")[1] for _, target in lora})
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    modules = lora_modules(model)
    assert modules.keys() == lora.keys()
    with torch.no_grad():
        for place, (a, b, _) in lora.items():
            for module, values in zip(modules[place], (a, b), strict=True):
                module.weight.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return model


def lora_modules(model: PeftModel) -> dict[Place, tuple[torch.nn.Linear, torch.nn.Linear]]:
    """The A and B modules of every adapted linear."""
    found = {}
    for i, layer in enumerate(model.base_model.model.model.layers):
        for target, name in PEFT_MODULES.items():
            module = layer.get_submodule(name)
            if hasattr(module, "lora_A"):
                found[i, target] = (module.lora_A["default"], module.lora_B["default"])
    return found


def loss_of(model: Any, pack: Pack) -> torch.Tensor:
    """Weighted mean cross entropy of a pack; each segment is a sequence of its own."""
    total = torch.zeros((), dtype=model.dtype)
    for begin, end in zip(pack.starts[:-1], pack.starts[1:], strict=True):
        tokens = torch.from_numpy(pack.tokens[begin:end].astype(np.int64))[None]
        logp = torch.log_softmax(model(tokens).logits[0], dim=-1)
        targets = torch.from_numpy(np.maximum(pack.targets[begin:end], 0).astype(np.int64))
        weights = torch.from_numpy(pack.weights[begin:end]).to(logp.dtype)
        total = total - (logp.gather(1, targets[:, None])[:, 0] * weights).sum()
    return total / float(pack.weights.sum(dtype=np.float64))


def gradients(model: PeftModel, pack: Pack) -> Gradients:
    """d loss / d (A, B) of every adapted linear by autograd."""
    model.zero_grad()
    loss_of(model, pack).backward()
    found = {}
    for place, pair in lora_modules(model).items():
        da, db = (module.weight.grad for module in pair)
        assert da is not None
        assert db is not None
        found[place] = (da.numpy().copy(), db.numpy().copy())
    return found


def loss_curve(model: PeftModel, packs: list[Pack], learning_rate: float) -> list[float]:
    """Losses of one AdamW step per pack (betas 0.9 and 0.999, eps 1e-8, no decay), before each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        assert parameter.dtype is torch.float32
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for pack in packs:
        optimizer.zero_grad()
        loss = loss_of(model, pack)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def markov_packs(vocab: int, steps: int, seed: int) -> list[Pack]:
    """Batches with something to learn: sequences in which each of 24 tokens has two likely successors."""
    rng = np.random.default_rng(seed)
    alphabet = rng.choice(vocab, 24, replace=False)
    successors = rng.integers(0, 24, (24, 2))
    packs = []
    for _ in range(steps):
        lengths = rng.integers(6, 13, 4)
        tokens, targets = [], []
        for length in lengths:
            state = [int(rng.integers(24))]
            for _ in range(int(length)):
                state.append(int(successors[state[-1], int(rng.random() < 0.2)]))
            tokens += state[:-1]
            targets += state[1:]
        packs.append(
            Pack(
                tokens=alphabet[tokens].astype(np.int32),
                starts=np.cumsum([0, *lengths], dtype=np.int32),
                targets=alphabet[targets].astype(np.int32),
                weights=np.ones(len(tokens), np.float32),
                examples=tuple(range(len(lengths))),
            )
        )
    return packs
