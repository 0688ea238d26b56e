"""Every architecture on its tiny models: the logits of transformers, from a folder and from the GGUF that llama.cpp runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from architectures import GOLDENS, POSITIONS, ROWS, TOKENS, folder_digest, gguf_digest, golden
from engine_side import relative_error, rounding
from nomoat import models
from nomoat.engine.model import Model
from nomoat.files.gguf import open_gguf
from nomoat.models import ModelSpec, spec_from_gguf
from reference import Reference


def test_every_architecture_has_a_row_and_a_golden() -> None:
    assert {row.model_type for row in ROWS.values()} == set(models.HF_MODEL_TYPES)
    assert {file.stem for file in GOLDENS.iterdir()} == set(ROWS)
    written = {models.gguf_form(row.config)[0].architecture for row in ROWS.values() if row.gguf}
    assert written == set(models.GGUF_ARCHITECTURES)


@pytest.mark.parametrize("name", ROWS)
def test_folder(name: str, tmp_path: Path) -> None:
    folder = ROWS[name].folder(tmp_path / "model")
    with np.load(golden(name)) as stored:
        expected = stored["logits"].astype(np.float64)
        assert folder_digest(folder) == str(stored["folder"]), "tensor names or shapes changed; see golden/make_architectures.py"
    model = Model.load(folder, quantize="none")
    assert relative_error(model.logits(TOKENS, precision="f32")[POSITIONS], expected) < rounding(model.spec, len(TOKENS))
    assert relative_error(Reference.load(folder).logits(TOKENS)[POSITIONS], expected) < rounding(model.spec, len(TOKENS))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.gguf])
def test_gguf(name: str, tmp_path: Path) -> None:
    path = ROWS[name].gguf_file(tmp_path / "model.gguf")
    with np.load(golden(name)) as stored:
        expected = stored["logits"].astype(np.float64)
        assert gguf_digest(path) == str(stored["gguf"]), "keys, names or shapes changed; see golden/make_architectures.py"
    model = Model.load(path)
    assert relative_error(model.logits(TOKENS, precision="f32")[POSITIONS], expected) < rounding(model.spec, len(TOKENS))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.gguf])
def test_gguf_form_is_what_is_read_back(name: str, tmp_path: Path) -> None:
    said, keys, _ = models.gguf_form(ROWS[name].config)
    with open_gguf(ROWS[name].gguf_file(tmp_path / "model.gguf")) as file:
        found = spec_from_gguf(file)
    assert keys
    assert comparable(found) == comparable(said)


def comparable(spec: ModelSpec) -> dict[str, Any]:
    """A description as plain values; frequencies to six digits, because a file holds their base in float32."""
    values = {key: value for key, value in vars(spec).items() if key not in ("name", "notes", "ropes")}
    ropes = [(rope.dim, rope.interleaved, _digits(rope.inv_freq), round(rope.magnitude, 6)) for rope in spec.ropes]
    return values | {"norm_eps": float(np.float32(spec.norm_eps)), "ropes": ropes}


def _digits(values: npt.NDArray[np.float32]) -> list[str]:
    return [f"{value:.5e}" for value in values.tolist()]
