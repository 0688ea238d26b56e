"""`nomoat quantize`: bytes that `gguf` decodes, errors against plain rounding, types of every recipe, sources, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as plain_quantize

from architectures import ROWS, TOKENS
from nomoat import _native
from nomoat.cli import main
from nomoat.engine.model import Model
from nomoat.engine.quantize import dequantize_rows, quantize_rows
from nomoat.errors import InputError, ModelError, NonFiniteError, ResourceError
from nomoat.files.ggml import BLOCK_SHAPE, GgmlType
from nomoat.files.gguf import LazyArray, open_gguf
from nomoat.quant import recipes
from nomoat.quant.recipes import FILE_TYPES, Shape, tensor_types
from nomoat.quant.write import quantize
from nomoat.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]

BLOCKS = [kind for kind, (values, _) in BLOCK_SHAPE.items() if values > 1]
TEXT = "the cat ate: 3 \u00e9clairs\n\t{in}gredients  and 1234567 \U0001f600!"
#: RMS error of llama.cpp's encoders (`ggml_quantize_chunk` without an importance matrix) on `sample()`, as measured.
LLAMACPP_RMS = {
    "Q4_0": 2.7802e-03,
    "Q4_1": 2.3024e-03,
    "Q5_0": 1.3849e-03,
    "Q5_1": 1.1171e-03,
    "Q8_0": 1.7426e-04,
    "Q2_K": 8.6100e-03,
    "Q3_K": 4.5572e-03,
    "Q4_K": 2.1295e-03,
    "Q5_K": 1.0785e-03,
    "Q6_K": 5.5329e-04,
    "IQ4_NL": 2.2786e-03,
    "IQ4_XS": 2.3002e-03,
    "MXFP4": 3.2530e-03,
}


def sample() -> Floats:
    """Weights with heavier tails than a normal distribution, as trained ones have."""
    return (np.random.default_rng(3).standard_t(5, (64, 1024)) * 0.02).astype(np.float32)


def decoded(packed: npt.NDArray[np.uint8], kind: GgmlType, shape: tuple[int, ...]) -> Floats:
    found = dequantize(packed.reshape(shape[0], -1), GGMLQuantizationType(int(kind)))
    return np.asarray(found, np.float32).reshape(shape)


def rms(x: Floats) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_rows_decode_like_gguf(kind: GgmlType) -> None:
    x = sample()
    packed = quantize_rows(x, kind)
    assert np.array_equal(dequantize_rows(packed, kind, x.shape[1]), decoded(packed, kind, x.shape))


def test_rows_of_any_width_decode() -> None:
    x = sample()[:3, :45].astype(np.float16)
    found = dequantize_rows(x.reshape(-1).view(np.uint8), GgmlType.F16, 45)
    assert np.array_equal(found, x.astype(np.float32))


# ---- encoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_errors_are_those_of_a_good_quantizer(kind: GgmlType) -> None:
    x = sample()
    error = rms(decoded(quantize_rows(x, kind), kind, x.shape) - x)
    assert error <= LLAMACPP_RMS[kind.name] * (1 if kind is not GgmlType.Q8_0 else 1 + 1e-6)


@pytest.mark.parametrize("kind", [GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0], ids=str)
def test_errors_are_no_larger_than_those_of_gguf(kind: GgmlType) -> None:
    x = sample()
    theirs = plain_quantize(x, GGMLQuantizationType(int(kind))).view(np.uint8)
    ours = quantize_rows(x, kind)
    assert rms(decoded(ours, kind, x.shape) - x) <= rms(decoded(theirs.reshape(-1), kind, x.shape) - x)
    if kind is GgmlType.Q8_0:
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kind", BLOCK_SHAPE, ids=lambda kind: kind.name)
def test_what_was_encoded_once_stays(kind: GgmlType) -> None:
    """Decoded values are near what they are encoded to: a second pass loses at most half of what the first one lost."""
    x = sample()
    once = decoded(quantize_rows(x, kind), kind, x.shape)
    twice = decoded(quantize_rows(once, kind), kind, x.shape)
    assert rms(twice - once) <= (0 if kind in recipes.FLOATS else 0.5) * rms(once - x)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_hard_rows(kind: GgmlType) -> None:
    """Zeros, one value, all of one sign, the smallest and the largest: finite, and within the format's largest step."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32)
    one = np.zeros(256, np.float32)
    one[77] = -3.5
    rows = np.stack([np.zeros_like(ramp), one, ramp + 1, -ramp - 1, ramp * 1e-30, ramp * 60_000, np.full_like(ramp, 0.25)])
    found = decoded(quantize_rows(rows, kind), kind, rows.shape)
    assert np.isfinite(found).all()
    assert not found[0].any()
    largest = np.abs(rows).max(-1, keepdims=True)
    assert (np.abs(found - rows) <= largest / 2 + 2.0**-24).all()  # the smallest scale that float16 has


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_bytes_depend_on_nothing_but_the_row(kind: GgmlType) -> None:
    x, threads = sample(), _native.threads()
    try:
        _native.set_threads(1)
        alone = [quantize_rows(row[None], kind).tobytes() for row in x]
        _native.set_threads(3)
        assert quantize_rows(x, kind).tobytes() == b"".join(alone)
    finally:
        _native.set_threads(threads)


# ---- recipes -----------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_gguf() -> None:
    for name, (number, _) in FILE_TYPES.items():
        known = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
        if hasattr(gguf.LlamaFileType, known):
            assert gguf.LlamaFileType[known] == number


def layers(count: int, width: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, width), "output_norm.weight": (width,)}
    for i in range(count):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            found[f"blk.{i}.{part}.weight"] = (width, width)
        found |= {f"blk.{i}.ffn_down.weight": (width, 4 * width), f"blk.{i}.attn_norm.weight": (width,)}
    return found


def chosen(name: str, shapes: dict[str, tuple[int, ...]], **model: Any) -> dict[str, str]:
    shape = Shape(**({"layers": 32, "group": 4, "experts": 0, "tied": "output.weight" not in shapes} | model))
    found = tensor_types(name, shape, shapes, dict.fromkeys(shapes, GgmlType.F32))
    return {tensor: kind.name for tensor, kind in found.items()}


def test_q4_k_m_of_32_layers() -> None:
    shapes = layers(32, 4096) | {"output.weight": (1000, 4096)}
    found = chosen("Q4_K_M", shapes)
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for part in ("attn_v", "ffn_down"):
        assert [i for i in range(32) if found[f"blk.{i}.{part}.weight"] == "Q6_K"] == more
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q4_K"
    assert found["output_norm.weight"] == "F32"


def test_narrow_matrices_get_a_type_that_fits() -> None:
    kinds = {name: chosen(name, layers(8, 576), layers=8)["blk.4.attn_q.weight"] for name in FILE_TYPES}
    assert kinds["Q4_K_M"] == "Q5_0"
    assert kinds["Q5_K_M"] == "Q5_1"
    assert kinds["Q6_K"] == "Q8_0"
    assert kinds["Q3_K_M"] == kinds["Q2_K"] == "Q4_0"
    assert kinds["IQ4_XS"] == "IQ4_NL"
    assert set(chosen("Q4_0", {"blk.0.attn_q.weight": (8, 40)}).values()) == {"F16"}


def test_eight_experts_keep_keys_and_values_at_eight_bits() -> None:
    found = chosen("Q4_K_M", layers(32, 4096) | {"blk.0.ffn_gate_inp.weight": (8, 4096)}, experts=8)
    assert found["blk.5.attn_k.weight"] == found["blk.5.attn_v.weight"] == "Q8_0"
    assert found["blk.5.attn_output.weight"] == "Q5_K"
    assert found["blk.0.ffn_gate_inp.weight"] == "F32"


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.gguf])
def test_a_folder_becomes_the_gguf_of_its_model(name: str, tmp_path: Path) -> None:
    folder, known = ROWS[name].folder(tmp_path / "model"), ROWS[name].gguf_file(tmp_path / "known.gguf")
    written = quantize(folder, "F32", tmp_path / "out.gguf")
    with open_gguf(written.path) as found, open_gguf(known) as expected:
        assert found.tensors.keys() == expected.tensors.keys()
        for tensor in expected.tensors:
            assert np.allclose(found.data(tensor).view("<f4"), expected.data(tensor).view("<f4"), rtol=0, atol=3e-7), tensor
        for key, value in expected.metadata.items():
            if not key.startswith(("general.", "tokenizer.")):
                mine = found.metadata[key]
                same = mine.numbers().tolist() == value.numbers().tolist() if isinstance(value, LazyArray) else mine == value  # type: ignore[union-attr]
                assert same, key
        theirs = Tokenizer.from_folder(folder)
        ours = Tokenizer.from_gguf(found)
        assert ours.encode(TEXT) == theirs.encode(TEXT)
        assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (theirs.bos_id, theirs.eos_ids, theirs.add_bos)


def test_smollm2_keeps_its_metadata_and_tokenizer(smollm2: Path, tmp_path: Path) -> None:
    written = quantize(smollm2, "Q4_K_M", tmp_path / "out.gguf")
    assert written.types == {"Q5_0": 166, "F32": 61, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}
    with open_gguf(smollm2) as before, open_gguf(written.path) as after:
        kept = before.metadata.keys() - {"general.file_type", "general.quantization_version"}
        assert all(before.entry(key) == after.entry(key) for key in kept)
        assert Tokenizer.from_gguf(before).vocab_hash() == Tokenizer.from_gguf(after).vocab_hash()
        assert after.get_int("general.file_type") == 15
        assert list(before.tensors) == list(after.tensors)
    reader = gguf.GGUFReader(written.path)
    assert len(reader.tensors) == 272
    tokens = list(range(100, 164))
    exact, found = (Model.load(path).logits(tokens, precision="f32") for path in (smollm2, written.path))
    assert np.corrcoef(exact.reshape(-1), found.reshape(-1))[0, 1] > 0.99


def test_a_type_that_is_there_already_is_copied(smollm2: Path, tmp_path: Path) -> None:
    quantize(smollm2, "Q4_1", tmp_path / "out.gguf")
    with open_gguf(smollm2) as before, open_gguf(tmp_path / "out.gguf") as after:
        same = [name for name in before.tensors if before.tensors[name].type is after.tensors[name].type]
        assert all(before.data(name).tobytes() == after.data(name).tobytes() for name in same)
        assert len(same) >= len(before.tensors) - 1


@pytest.mark.parametrize("to", FILE_TYPES)
def test_every_type_loads(to: str, tmp_path: Path) -> None:
    written = quantize(ROWS["llama"].folder(tmp_path / "model"), to, tmp_path / "out.gguf")
    assert written.path.stat().st_size == written.bytes
    assert np.isfinite(Model.load(written.path).logits(TOKENS[:8], precision="f32")).all()


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ROWS["llama"].folder(tmp_path / "model")


def test_an_unknown_type_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'Q9_X' is not known; expected one of F32") as error:
        quantize(folder, "Q9_X", tmp_path / "out.gguf")
    assert error.value.code == "E_TYPE"


def test_the_source_is_never_overwritten(folder: Path, tmp_path: Path) -> None:
    source = quantize(folder, "F16", tmp_path / "a.gguf").path
    (tmp_path / "link.gguf").symlink_to(source)
    before = source.read_bytes()
    for output in (source, tmp_path / "link.gguf"):
        with pytest.raises(InputError, match="is the source itself"):
            quantize(source, "Q8_0", output, overwrite=True)
    assert source.read_bytes() == before


def test_an_existing_file_stays_unless_told(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_text("mine")
    with pytest.raises(InputError, match="--overwrite") as error:
        quantize(folder, "Q8_0", output)
    assert error.value.code == "E_DUP"
    assert output.read_text() == "mine"
    quantize(folder, "Q8_0", output, overwrite=True)
    assert output.read_bytes()[:4] == b"GGUF"
    with pytest.raises(InputError, match="is a folder"):
        quantize(folder, "Q8_0", tmp_path, overwrite=True)


def test_a_full_disk_is_noticed_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="the Q8_0 file needs") as error:
        quantize(folder, "Q8_0", tmp_path / "out.gguf")
    assert error.value.code == "E_DISK"
    assert not list(tmp_path.glob("*out.gguf*"))


def test_weights_that_are_no_numbers_leave_nothing(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        quantize(folder, "Q8_0", tmp_path / "out.gguf")
    data[-4:] = np.float32(1e6).tobytes()
    file.write_bytes(data)
    with pytest.raises(NonFiniteError, match="Use BF16 or F32"):
        quantize(folder, "F16", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


def test_a_type_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    source = quantize(folder, "Q8_0", tmp_path / "a.gguf").path
    data = source.read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 16
    (tmp_path / "b.gguf").write_bytes(data[:at] + int(GgmlType.IQ2_XS).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(InputError, match="IQ2_XS"):
        quantize(tmp_path / "b.gguf", "Q8_0", tmp_path / "out.gguf")


def test_a_pre_tokenizer_without_a_name_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "tokenizer.json"
    root = json.loads(file.read_text())
    root["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, root["pre_tokenizer"]]}
    file.write_text(json.dumps(root))
    with pytest.raises(ModelError, match="cut in a way") as error:
        quantize(folder, "Q8_0", tmp_path / "out.gguf")
    assert error.value.code == "E_PRE"


def test_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(folder), "--to", "q8_0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["type"]) == ("model.Q8_0.gguf", "Q8_0")
    assert main(["quantize", "model.Q8_0.gguf", "--to", "Q4_0"]) == 0
    shown = capsys.readouterr()
    assert "model.Q4_0.gguf" in shown.out
    assert "quantized already (Q8_0)" in shown.err
    assert main(["quantize", "model.Q8_0.gguf", "--to", "nonsense"]) == 2
