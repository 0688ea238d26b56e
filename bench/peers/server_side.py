"""llama.cpp's server by xllamacpp: requests that each name an adapter, sent at once, each from a thread of its own."""

from __future__ import annotations

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
    return {"build": str(xllamacpp.BUILD_INFO)}


def answers(prompts: list[list[int]], adapters: list[int], count: int) -> dict[str, Any]:
    """Seconds until `count` tokens have been generated for every prompt, greedily; and the texts."""

    def ask(prompt: list[int], adapter: int) -> str:
        request = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": [{"id": i, "scale": float(i == adapter)} for i in range(state["adapters"])],
        }
        answer = state["server"].handle_completions(request)
        if answer.get("usage", {}).get("completion_tokens") != count:
            raise RuntimeError(f"the server answered {str(answer)[:300]}")
        text: str = answer["choices"][0]["text"]
        return text

    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(ask, prompts, adapters))
    return {"seconds": time.perf_counter() - began, "texts": texts, "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    serve({"load": load, "answers": answers})
