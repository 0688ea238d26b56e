"""llama.cpp loads every file that `nomoat quantize` writes, and computes with the weights that nomoat computes with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from architectures import POSITIONS, TOKENS
from engine_side import relative_error
from nomoat.engine.model import Model
from nomoat.quant.recipes import FILE_TYPES
from nomoat.quant.write import quantize
from parity import llamacpp_side
from reference import log_softmax
from tiny import tiny_llama

#: llama.cpp rounds activations to eight bits, in blocks of 32 or 256, about 1 % of a product, which adds up over two layers of
#: random weights to 3 to 5 %. Weights read wrongly would give 100 %.
ACTIVATIONS = 0.1


@pytest.mark.parametrize("to", FILE_TYPES)
def test_llamacpp_reads_what_was_written(to: str, tmp_path: Path) -> None:
    """Rows of 256 columns, so that no K type gives way to another."""
    source = tiny_llama(tmp_path / "source.gguf", width=256, ffn=512, heads=4, kv_heads=2)
    written = quantize(source, to, tmp_path / "out.gguf")
    model = Model.load(written.path)
    expected = llamacpp_side.logprobs(written.path, TOKENS, POSITIONS, model.spec.vocab)
    found = log_softmax(model.logits(TOKENS, precision="f32")[POSITIONS].astype(np.float64))
    assert relative_error(found - found.mean(-1, keepdims=True), expected - expected.mean(-1, keepdims=True)) < ACTIVATIONS
