"""llama.cpp's server by xllamacpp: requests that each name an adapter, sent at once, each from a thread of its own."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.peers.channel import peak_rss_mb, serve

state: dict[str, Any] = {}


def load(path: str, adapters: list[str], threads: int, slots: int, context: int) -> dict[str, Any]:
    """Opens a model with adapters, none applied, and as many slots as requests will come at once."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0) for file in adapters]
    params.lora_init_without_apply = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.n_gpu_layers = 0
    params.warmup = True
    params.cache_ram_mib = 0
    state["server"] = xllamacpp.Server(params)
    state["adapters"] = len(adapters)
    return {"version": xllamacpp.BUILD_INFO if isinstance(xllamacpp.BUILD_INFO, str) else str(xllamacpp.BUILD_INFO)}


def answers(prompts: list[list[int]], adapters: list[int], count: int) -> dict[str, Any]:
    """Seconds until `count` tokens have been generated for every prompt, greedily; and the tokens, where the server tells."""

    def ask(prompt: list[int], adapter: int) -> dict[str, Any]:
        request = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": [{"id": i, "scale": float(i == adapter)} for i in range(state["adapters"])],
        }
        answer: Any = state["server"].handle_completions(request)
        found: dict[str, Any] = json.loads(answer) if isinstance(answer, str) else answer
        return found

    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(ask, prompts, adapters))
    seconds = time.perf_counter() - began
    for one in found:
        if "error" in one or one.get("tokens_predicted", count) != count:
            raise RuntimeError(f"the server answered {str(one)[:300]}")
    return {"seconds": seconds, "tokens": [one.get("tokens", []) for one in found], "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    serve({"load": load, "answers": answers})
