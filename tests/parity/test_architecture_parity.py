"""Every architecture on its tiny models: transformers' logits, PEFT's gradients, llama.cpp's logits, and the stored goldens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from architectures import POSITIONS, ROWS, TOKENS, golden
from engine_side import Trained, cosine, flat, loss, random_pack, relative_error, rounding
from golden.make_architectures import make
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.models.spec import TARGETS
from parity import llamacpp_side, peft_side
from reference import log_softmax, random_lora

Report = Callable[[str, str, float], None]

#: llama.cpp looks GELU up in a table of float16 for float16 arguments.
GELU_TABLE = 2.0**-10


def torch_logits(model: Any) -> npt.NDArray[np.float64]:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].numpy(), np.float64)


@pytest.mark.parametrize("name", ROWS)
def test_logits(name: str, tmp_path: Path, report: Report) -> None:
    folder = ROWS[name].folder(tmp_path / "model")
    peer = peft_side.load_base(folder, torch.float32)
    expected = torch_logits(peer)
    model = Model.load(folder, quantize="none")
    found = model.logits(TOKENS, precision="f32")
    report(name, "logits", relative_error(found, expected))
    assert relative_error(found, expected) < rounding(model.spec, len(TOKENS))
    peer.save_pretrained(tmp_path / "saved")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "saved" / file.name).write_bytes(file.read_bytes())
    saved = Model.load(tmp_path / "saved", quantize="none")
    assert relative_error(saved.logits(TOKENS, precision="f32"), expected) < rounding(model.spec, len(TOKENS))


@pytest.mark.parametrize("name", ROWS)
def test_gradients(name: str, tmp_path: Path, report: Report) -> None:
    folder = ROWS[name].folder(tmp_path / "model")
    model = Model.load(folder, quantize="none")
    # of mixtures PEFT takes all of the MLPs for experts, but for those that have a shared one: test_adapter_parity.py
    experts = any(block.experts and not block.shared for block in model.spec.blocks)
    targets = TARGETS[:4] if experts else TARGETS
    trained = Trained(TrainableLora(model.spec, rank=4, alpha=8.0, targets=targets))
    start = random_lora(model.spec, rank=4, scale=2.0, seed=2, targets=targets)
    trained.set(peft_side.shared(model.spec, start))
    pack = random_pack(model.spec.vocab, (40, 14, 2), seed=1)
    peer = peft_side.with_lora(peft_side.load_base(folder, torch.float32), trained.values())
    expected = peft_side.gradients(peer, pack)
    found, logp = trained.gradients(model, pack, "f32")
    ours = peft_side.fused(model.spec, found)
    assert ours.keys() == expected.keys()
    error = relative_error(flat(ours), flat(expected))
    report(name, "gradients", error)
    assert loss(pack, logp) == pytest.approx(float(peft_side.loss_of(peer, pack).detach()), rel=rounding(model.spec, 40))
    assert error < 2 * rounding(model.spec, 40)  # through the layers and back
    for place, pair in expected.items():
        for part in (0, 1):
            assert cosine(ours[place][part], pair[part]) > 0.9999, (place, "AB"[part])
    coarse = peft_side.fused(model.spec, trained.gradients(model, pack, "bf16")[0])
    assert cosine(flat(coarse), flat(expected)) > 0.999


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.gguf])
def test_llamacpp(name: str, tmp_path: Path, report: Report) -> None:
    path = ROWS[name].gguf_file(tmp_path / "model.gguf")
    model = Model.load(path)
    expected = llamacpp_side.logprobs(path, TOKENS, POSITIONS, model.spec.vocab)
    found = log_softmax(model.logits(TOKENS, precision="f32")[POSITIONS].astype(np.float64))
    error = relative_error(found - found.mean(-1, keepdims=True), expected - expected.mean(-1, keepdims=True))
    report(name, "llama.cpp", error)
    assert error < rounding(model.spec, len(TOKENS)) + (GELU_TABLE if model.spec.activation == "gelu" else 0)


@pytest.mark.parametrize("name", ROWS)
def test_goldens_are_what_transformers_says(name: str) -> None:
    fresh = make(name)
    with np.load(golden(name)) as stored:
        assert set(stored.files) == set(fresh)
        assert (str(stored["folder"]), str(stored["gguf"])) == (str(fresh["folder"]), str(fresh["gguf"]))
        assert relative_error(fresh["logits"], stored["logits"].astype(np.float64)) < 1e-6
