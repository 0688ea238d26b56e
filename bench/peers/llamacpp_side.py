"""llama.cpp through llama-cpp-python's low-level API, so that only `llama_decode` is timed. Runs in `build/peers`.

Flash attention and the cache's type (f16) are llama.cpp's own defaults; a prompt goes in as one batch.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from bench.peers.channel import peak_rss_mb, rss_mb, serve

state: dict[str, Any] = {}


ERROR = 4  # ggml_log_level


def _log(level: int, text: bytes, data: object) -> None:
    """llama.cpp's log: errors only."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


_LOG = llama_cpp.llama_log_callback(_log)  # kept here: llama.cpp holds no reference


def load(path: str, context: int, threads: int) -> dict[str, Any]:
    """Opens a model for one sequence of up to `context` tokens."""
    llama_cpp.llama_log_set(_LOG, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    chosen = llama_cpp.llama_context_default_params()
    chosen.n_ctx = chosen.n_batch = context
    chosen.n_threads = chosen.n_threads_batch = threads
    state["context"] = llama_cpp.llama_init_from_model(model, chosen)
    _keep_threads(threads)
    state["vocab"] = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    info = llama_cpp.llama_print_system_info()
    return {"version": llama_cpp.__version__, "system_info": info.decode().strip(), "vocab": state["vocab"]}


def _keep_threads(threads: int) -> None:
    """Gives the context a thread pool, as llama-bench does; otherwise every step starts and ends its threads."""
    library = llama_cpp.llama_cpp._lib
    options = ctypes.create_string_buffer(4096)  # struct ggml_threadpool_params: 512 flags and some numbers
    library.ggml_threadpool_params_init(options, threads)
    library.ggml_threadpool_new.restype = ctypes.c_void_p
    pool = ctypes.c_void_p(library.ggml_threadpool_new(options))
    library.llama_attach_threadpool.argtypes = [ctypes.c_void_p] * 3
    library.llama_attach_threadpool(state["context"], pool, pool)


def _decode(tokens: Sequence[int], position: int, wanted: range) -> None:
    """Runs tokens of sequence 0 from `position` on; logits are computed for the `wanted` indices."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i in wanted
        began = time.perf_counter()
        status = llama_cpp.llama_decode(state["context"], batch)
        llama_cpp.llama_synchronize(state["context"])
        state["seconds"] = time.perf_counter() - began
    finally:
        llama_cpp.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")


def _clear() -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state["context"]), True)


def logits(tokens: list[int], first: int, last: int, out: str) -> dict[str, Any]:
    """Writes the logits [last - first, V] after tokens [first, last) of a fresh sequence to the file `out`."""
    _clear()
    _decode(tokens, 0, range(first, last))
    flat = llama_cpp.llama_get_logits(state["context"])
    np.save(out, np.ctypeslib.as_array(flat, shape=(last - first, state["vocab"])))
    return {"seconds": state["seconds"]}


def prefill(tokens: list[int]) -> dict[str, Any]:
    """Seconds for a prompt, with the logits of its last token."""
    _clear()
    _decode(tokens, 0, range(len(tokens) - 1, len(tokens)))
    return {"seconds": state["seconds"]}


def decode(tokens: list[int], count: int) -> dict[str, Any]:
    """Seconds for `count` tokens, one by one, after a prompt. The tokens themselves do not matter for the time."""
    prefill(tokens)
    total = 0.0
    for i in range(count):
        _decode([tokens[i % len(tokens)]], len(tokens) + i, range(1))
        total += state["seconds"]
    return {"seconds": total}


def memory() -> dict[str, Any]:
    """Resident memory now, and its peak."""
    return {"rss_mb": rss_mb(), "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    serve({"load": load, "logits": logits, "prefill": prefill, "decode": decode, "memory": memory})
