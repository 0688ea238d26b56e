"""llama.cpp, or its fork ik_llama.cpp, through the C API that both have, so that only `llama_decode` is timed.

Runs in `build/peers` (llama-cpp-python) or `build/peers-ik` (ik-llama-cpp-python). Flash attention and the cache's type are
the library's own defaults; a prompt goes in as one batch, and several streams take a step in one batch.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench.peers.channel import peak_rss_mb, rss_mb, serve

FORK = importlib.util.find_spec("llama_cpp") is None
PACKAGE = "ik-llama-cpp-python" if FORK else "llama-cpp-python"
if FORK:  # its libllama does not say where libggml is, and finds it where it is loaded already
    ggml = importlib.metadata.distribution(PACKAGE).locate_file("ik_llama_cpp/lib/libggml.so")
    ctypes.CDLL(str(ggml), ctypes.RTLD_GLOBAL)
api: Any = importlib.import_module("ik_llama_cpp._ctypes_api" if FORK else "llama_cpp.llama_cpp")
library: Any = api._lib

ERROR = 4  # ggml_log_level
_LOG_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

state: dict[str, Any] = {"contexts": {}}


class Token(NamedTuple):
    """One row of a batch."""

    id: int
    position: int
    sequence: int
    wanted: bool  # its logits


def _log(level: int, text: bytes, data: object) -> None:
    """The library's log: errors only."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


_LOG = _LOG_TYPE(_log)  # kept here: the library holds no reference


def _declare() -> None:
    """Functions that one of the two packages does not declare, or declares otherwise."""
    library.llama_log_set.argtypes, library.llama_log_set.restype = [_LOG_TYPE, ctypes.c_void_p], None
    library.llama_synchronize.argtypes, library.llama_synchronize.restype = [ctypes.c_void_p], None
    library.llama_get_logits.argtypes = [ctypes.c_void_p]
    library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_print_system_info.argtypes, library.llama_print_system_info.restype = [], ctypes.c_char_p


def load(path: str, context: int, threads: int) -> dict[str, Any]:
    """Opens a model in place of the last one; sequences are of up to `context` tokens."""
    _declare()
    for old in state["contexts"].values():
        api.llama_free(old)
    state["contexts"].clear()
    if state.get("model"):
        (api.llama_free_model if FORK else api.llama_model_free)(state["model"])
    library.llama_log_set(_LOG, None)
    api.llama_backend_init()
    options = api.llama_model_default_params()
    options.n_gpu_layers = 0
    state["model"] = api.llama_model_load_from_file(path.encode(), options)
    if not state["model"]:
        raise RuntimeError(f"{PACKAGE} cannot load {path}")
    state["length"], state["threads"] = context, threads
    _context(1)
    state["vocab"] = api.llama_vocab_n_tokens(api.llama_model_get_vocab(state["model"]))
    info = library.llama_print_system_info()
    version = importlib.metadata.version(PACKAGE)
    return {"version": version, "system_info": info.decode().strip(), "openmp": _openmp(), "vocab": state["vocab"]}


def _openmp() -> bool:
    """Whether an OpenMP runtime is in this process."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return False


def _context(streams: int) -> Any:
    """The context for so many sequences at a time; one is kept for each number asked for."""
    if streams not in state["contexts"]:
        chosen = api.llama_context_default_params()
        chosen.n_ctx = streams * state["length"]
        chosen.n_batch = max(state["length"], streams)
        chosen.n_seq_max = streams
        if FORK and streams > 1:  # its flash attention aborts ("S > 0") where a thread's share of the keys is another sequence's
            chosen.flash_attn = False
        chosen.n_threads = chosen.n_threads_batch = state["threads"]
        context = api.llama_init_from_model(state["model"], chosen)
        if not context:
            raise RuntimeError(f"{PACKAGE} cannot make a context for {streams} sequences of {state['length']} tokens")
        if not FORK:
            _keep_threads(context)
        state["contexts"][streams] = context
    return state["contexts"][streams]


def _keep_threads(context: Any) -> None:
    """Gives the context a thread pool, as llama-bench does; otherwise every step starts and ends its threads."""
    if "pool" not in state:
        options = ctypes.create_string_buffer(4096)  # struct ggml_threadpool_params: 512 flags and some numbers
        library.ggml_threadpool_params_init(options, state["threads"])
        library.ggml_threadpool_new.restype = ctypes.c_void_p
        state["pool"] = ctypes.c_void_p(library.ggml_threadpool_new(options))
        library.llama_attach_threadpool.argtypes = [ctypes.c_void_p] * 3
    library.llama_attach_threadpool(context, state["pool"], state["pool"])


def _decode(context: Any, tokens: Sequence[Token]) -> float:
    """Seconds of one `llama_decode`."""
    batch = api.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token.id
            batch.pos[i] = token.position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = token.sequence
            batch.logits[i] = token.wanted
        began = time.perf_counter()
        status = api.llama_decode(context, batch)
        library.llama_synchronize(context)
        seconds = time.perf_counter() - began
    finally:
        api.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")
    return seconds


def _clear(context: Any) -> None:
    if FORK:
        api.llama_kv_cache_clear(context)
    else:
        api.llama_memory_clear(api.llama_get_memory(context), True)


def logits(tokens: list[int], first: int, last: int, out: str) -> dict[str, Any]:
    """Writes the logits [last - first, V] after tokens [first, last) of a fresh sequence to the file `out`."""
    context = _context(1)
    _clear(context)
    seconds = _decode(context, [Token(id, i, 0, first <= i < last) for i, id in enumerate(tokens)])
    flat = library.llama_get_logits(context)
    np.save(out, np.ctypeslib.as_array(flat, shape=(last - first, state["vocab"])))
    return {"seconds": seconds}


def prefill(tokens: list[int]) -> dict[str, Any]:
    """Seconds for a prompt, with the logits of its last token."""
    context = _context(1)
    _clear(context)
    return {"seconds": _decode(context, [Token(id, i, 0, i == len(tokens) - 1) for i, id in enumerate(tokens)])}


def decode(tokens: list[int], count: int, streams: int = 1) -> dict[str, Any]:
    """Seconds for `count` steps after a prompt, each a batch of one token of every stream. Which tokens does not matter."""
    context = _context(streams)
    _clear(context)
    for stream in range(streams):
        _decode(context, [Token(id, i, stream, i == len(tokens) - 1) for i, id in enumerate(tokens)])
    total = 0.0
    for step in range(count):
        position = len(tokens) + step
        total += _decode(context, [Token(tokens[(step + s) % len(tokens)], position, s, True) for s in range(streams)])
    return {"seconds": total}


def quantize(source: str, out: str, file_type: int, threads: int) -> dict[str, Any]:
    """Seconds for writing `source` as a file of another type, without an importance matrix."""
    _declare()
    library.llama_log_set(_LOG, None)
    options = api.llama_model_quantize_default_params()
    options.nthread, options.ftype, options.allow_requantize = threads, file_type, True
    began = time.perf_counter()
    status = api.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")
    return {"seconds": time.perf_counter() - began}


def memory() -> dict[str, Any]:
    """Resident memory now, and its peak."""
    return {"rss_mb": rss_mb(), "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    serve({"load": load, "logits": logits, "prefill": prefill, "decode": decode, "quantize": quantize, "memory": memory})
