"""PEFT's LoRA on transformers' Llama, on a plan of `bench/train_vs_peft.py`. Runs in .parity.

What a careful user would write: batches padded to their longest row, attention mask, labels of -100 outside the answer,
AdamW, adapters in float32 over the bfloat16 base (PEFT's default). transformers dequantizes the GGUF file itself. Where the CPU
has no instructions for bfloat16 the base is float32: torch's bfloat16 products run on one thread there, at 5 tokens/s.

With `base` "nf4" its linears are those of bitsandbytes, as `load_in_4bit` makes them: NF4, products in the type above.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from bench.peers.channel import peak_rss_mb, serve
from bench.train_plan import Plan, padded

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GENERATE_ROWS = 16

state: dict[str, Any] = {}


def fastest_type() -> torch.dtype:
    """What a CPU's user would choose: bfloat16 where oneDNN multiplies in it."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def to_nf4(base: Any) -> None:
    """Puts bitsandbytes' 4-bit linears in the places of those of all layers; the head stays, as transformers leaves it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in base.model.layers.modules():
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                low = Linear4bit(linear.in_features, linear.out_features, False, fastest_type(), quant_type="nf4")
                low.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")  # it quantizes here
                setattr(parent, name, low)
    base.is_loaded_in_4bit = True  # what PEFT looks at to choose its layers


def load(model: str, plan: str, rank: int, alpha: float, rates: list[float], threads: int, base: str = "dense") -> dict[str, Any]:
    """Opens the model and puts fresh adapters on it; `rates` holds the learning rate of every step of the plan."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    path = Path(model)
    dense = transformers.GgufConfig(dequantize=True)  # otherwise products run on packed blocks, slower and without oneDNN
    weights = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=fastest_type(), quantization_config=dense
    )
    if base == "nf4":
        to_nf4(weights)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(weights, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rates[0], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    state.update(model=adapted, trained=trained, optimizer=optimizer, rates=rates, plan=Plan.load(Path(plan)), step=0)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {
        "peak_rss_mb": peak_rss_mb(),
        "versions": versions,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "base_type": base if base != "dense" else str(weights.model.layers[0].mlp.down_proj.base_layer.weight.dtype),
        "adapter_type": str(trained[0].dtype),
        "trained": sum(parameter.numel() for parameter in trained),
    }


def steps(count: int) -> dict[str, Any]:
    """The next `count` optimizer steps: seconds, and the loss of each."""
    given, losses = state["plan"], []
    state["model"].train()
    began = time.perf_counter()
    for step in range(state["step"], min(state["step"] + count, len(given.batches))):
        rows = given.batches[step]
        ids, mask, labels = padded([given.tokens[row] for row in rows], [given.weights[row] for row in rows], filler=0)
        for group in state["optimizer"].param_groups:
            group["lr"] = state["rates"][step]
        loss = state["model"](
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), labels=torch.from_numpy(labels)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state["trained"], 1.0)
        state["optimizer"].step()
        state["optimizer"].zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        state["step"] = step + 1
    return {"seconds": time.perf_counter() - began, "losses": losses, "peak_rss_mb": peak_rss_mb()}


def answers(limit: int, ends: list[int]) -> dict[str, Any]:
    """Greedy answers to every prompt of the plan, as token ids up to the first of `ends`. Prompts of like length go together."""
    prompts = [np.asarray(prompt, np.int64) for prompt in state["plan"].prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    made: dict[int, list[int]] = {}
    state["model"].eval()
    began = time.perf_counter()
    for begin in range(0, len(order), GENERATE_ROWS):
        rows = order[begin : begin + GENERATE_ROWS]
        longest = max(len(prompts[row]) for row in rows)
        ids = np.stack([np.pad(prompts[row], (longest - len(prompts[row]), 0)) for row in rows])
        mask = np.stack([np.arange(longest) >= longest - len(prompts[row]) for row in rows]).astype(np.int64)
        with torch.no_grad():
            out = state["model"].generate(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        for row, tokens in zip(rows, out[:, longest:].tolist(), strict=True):
            end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            made[row] = tokens[:end]
    return {"seconds": time.perf_counter() - began, "tokens": [made[row] for row in range(len(prompts))]}


if __name__ == "__main__":
    serve({"load": load, "steps": steps, "answers": answers})
