"""The other side of every comparison: models of transformers with PEFT's LoRA, driven with our weights, adapters and packs.

Where transformers keeps several of our linears in one module (qkv_proj, gate_up_proj), one LoRA covers them: it is ours if
their A are the same. Its gradients are then the sum of their dA, and their dB one below the other. Such a group is named by its
first place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from nomoat.data.pack import Pack
from nomoat.models import ModelSpec, spec_from_hf
from reference import Lora, Place
from tiny import Weights

Gradients = dict[Place, tuple[npt.NDArray[Any], npt.NDArray[Any]]]


def q8_grid(weights: Weights) -> Weights:
    """Matrices rounded to what Q8_0 holds exactly, so that a folder quantized at load still has the weights in it."""
    kind = gguf.GGMLQuantizationType.Q8_0
    return {name: dequantize(quantize(w, kind), kind) if w.ndim == 2 else w for name, w in weights.items()}


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Raises AssertionError where the folder's tensors are not the model's (but for what looks at images)."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **plain)
    wrong = {key for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told[what]}
    assert not {key for key in wrong if not key.startswith(("model.vision_tower.", "model.multi_modal_projector."))}
    return model.eval()


def groups(spec: ModelSpec) -> dict[str, list[Place]]:
    """Module name -> the places it holds, in the order of its rows."""
    found: dict[str, list[tuple[int, Place]]] = {}
    for layer, target in spec.places():
        source = spec.tensors[f"blk.{layer}.{target}"]
        found.setdefault(source.names[0].removesuffix(".weight"), []).append((source.first, (layer, target)))
    return {module: [place for _, place in sorted(places)] for module, places in found.items()}


def shared(spec: ModelSpec, lora: Lora) -> Lora:
    """The adapter with one A in every group."""
    first = {place: places[0] for places in groups(spec).values() for place in places if place in lora}
    return {place: (lora[first[place]][0], b, scale) for place, (_, b, scale) in lora.items()}


def fused(spec: ModelSpec, gradients: Mapping[Place, Any]) -> Gradients:
    """Our gradients as PEFT has them."""
    return {
        places[0]: (sum(gradients[place][0] for place in places), np.concatenate([gradients[place][1] for place in places]))
        for places in groups(spec).values()
        if places[0] in gradients
    }


def with_lora(base: PreTrainedModel, lora: Lora) -> PeftModel:
    """PEFT's LoRA holding the given A and B (Hugging Face row order)."""
    spec = spec_of(base)
    wanted = {module: places for module, places in groups(spec).items() if places[0] in lora}
    assert {place for places in wanted.values() for place in places} == lora.keys()
    a, _, scale = next(iter(lora.values()))
    names = [path(base, module) for module in wanted]
    config = LoraConfig(r=len(a), lora_alpha=scale * len(a), target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    pairs = lora_modules(model)
    assert pairs.keys() == {places[0] for places in wanted.values()}
    with torch.no_grad():
        for places in wanted.values():
            assert all(np.array_equal(lora[place][0], lora[places[0]][0]) for place in places)
            b = np.concatenate([lora[place][1] for place in places])
            for module, values in zip(pairs[places[0]], (lora[places[0]][0], b), strict=True):
                module.weight.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return model


def path(model: PreTrainedModel, module: str) -> str:
    """The whole name of a module of the language model, which may be a part of something larger."""
    end = module.removeprefix("model.")
    (found,) = (str(name) for name, _ in model.named_modules() if name.endswith(f".{end}") and "vision" not in name)
    return found


def spec_of(model: PreTrainedModel) -> ModelSpec:
    """Our description of a model of transformers."""
    return spec_from_hf(model.config.to_dict(), None)


def lora_modules(model: PeftModel) -> dict[Place, tuple[torch.nn.Linear, torch.nn.Linear]]:
    """The A and B modules of every adapted linear."""
    found = {}
    base = model.base_model.model
    for name, places in groups(spec_of(base)).items():
        if ".experts." in name:  # parameters, not modules
            continue
        module = base.get_submodule(path(base, name))
        if hasattr(module, "lora_A"):
            found[places[0]] = (module.lora_A["default"], module.lora_B["default"])
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
