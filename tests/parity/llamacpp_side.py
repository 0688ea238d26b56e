"""llama.cpp, through the wheel `xllamacpp`, which installs without a compiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xllamacpp

#: A token of one whole character in both made vocabularies, which the server is made to choose: of a token that ends within a
#: character it reports nothing. What it reports are the probabilities before the choice.
CHARACTER = 65


def logprobs(path: Path, tokens: Sequence[int], positions: Sequence[int], vocab: int) -> npt.NDArray[np.float64]:
    """Log-probabilities [positions, V] of the token after each position, with a float32 cache and without flash attention."""
    chosen = xllamacpp.CommonParams()
    chosen.model.path = str(path)
    chosen.n_ctx = chosen.n_batch = chosen.n_ubatch = 256
    chosen.n_parallel = 1
    chosen.cpuparams.n_threads = chosen.cpuparams_batch.n_threads = 1
    chosen.cache_type_k = chosen.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    chosen.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    chosen.warmup = chosen.cache_prompt = False
    chosen.verbosity = -1
    server = xllamacpp.Server(chosen)
    found = np.full((len(positions), vocab), np.nan)
    for row, position in enumerate(positions):
        asked = {"prompt": list(tokens[: position + 1]), "max_tokens": 1, "logprobs": vocab, "logit_bias": [[CHARACTER, 100.0]]}
        answer = server.handle_completions(asked)
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[row, token["id"]] = token["logprob"]
    assert np.isfinite(found).all()
    return found
