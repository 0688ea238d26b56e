"""tools/make_model.py: random blocks that decode to what was asked for, vocabularies that work, published shapes, equal bytes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tools.make_model import make
from tools.synthetic import blocks
from tools.synthetic.blocks import LAYOUTS, block_bytes
from tools.synthetic.randomness import Stream
from tools.synthetic.sizes import FAMILIES, PUBLISHED, configuration, sizes
from tools.synthetic.weights import file_tensors

from nomoat.files.gguf import open_gguf
from nomoat.models import gguf_form, spec_from_gguf, spec_from_hf
from nomoat.text.template import template_for
from nomoat.text.tokenizer import Tokenizer

#: Parameters that the models' publishers count, every tensor of the language model included.
PARAMETERS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "phi-3-mini": 3_821_079_552,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "granite-3-2b": 2_533_531_648,
    "starcoder2-3b": 3_030_371_328,
}
TEXT = "the cat ate: 3 \u00e9clairs\n\t{in}gredients  and \U0001f600!"


def test_streams_are_the_same_everywhere() -> None:
    """Digests of the bytes themselves: PCG64 and exact arithmetic, whatever the machine or NumPy's version."""
    normals = Stream(7, "blk.0.q").normals(1000).astype("<f4").tobytes()
    assert hashlib.sha256(normals).hexdigest()[:16] == "7861312dcc7dc248"
    made = b"".join(b"".join(map(bytes, block_bytes(kind, Stream(7, kind), 3, 512, 0.1))) for kind in LAYOUTS)
    assert hashlib.sha256(made).hexdigest()[:16] == "9843adb3f74e1186"
    assert np.array_equal(Stream(7, "x", skip=5).words(4), Stream(7, "x").words(9)[5:])
    assert not np.array_equal(Stream(7, "x").words(4), Stream(7, "y").words(4))


def test_normals() -> None:
    """The mean of n values is off by 1 / sqrt(n), their variance by sqrt(2 / n): five times that."""
    values = Stream(1, "normals").normals(1 << 16).astype(np.float64)
    assert abs(values.mean()) < 5 / 256
    assert abs(values.var() - 1) < 5 * math.sqrt(2) / 256
    assert np.abs(values).max() <= 2 * math.sqrt(3)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_decode_to_the_deviation_asked_for(kind: str) -> None:
    rows, columns, deviation = 64, 2048, 1 / 45
    stored = np.concatenate(list(block_bytes(kind, Stream(0, kind), rows, columns, deviation)))
    weights = dequantize(stored.reshape(rows, -1), gguf.GGMLQuantizationType[kind]).astype(np.float64)
    assert weights.shape == (rows, columns)
    # the 512 superblocks' scales are the coarsest choice made: a few percent; MXFP4 has powers of two only
    assert weights.std() == pytest.approx(deviation, rel=2**0.5 - 1 if kind == "MXFP4" else 0.05)
    assert abs(weights.mean()) < 0.02 * deviation
    assert np.linalg.norm(weights, 2) < 1.4 * deviation * (math.sqrt(rows) + math.sqrt(columns))  # no direction stands out


def test_pieces_of_another_size_hold_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = b"".join(map(bytes, block_bytes("Q6_K", Stream(3, "a"), 40, 512, 0.1)))
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 8 * 210)
    assert b"".join(map(bytes, block_bytes("Q6_K", Stream(3, "a"), 40, 512, 0.1))) == whole


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of llama"):
        sizes("gpt2")
    with pytest.raises(ValueError, match="expected one of mistral-7b, tiny"):
        configuration("mistral", "mistral-8b")
    with pytest.raises(ValueError, match=r"320 columns of Q4_K: expected one of Q4_0, .* and a multiple of its block"):
        next(block_bytes("Q4_K", Stream(0, ""), 1, 320, 1.0))


@pytest.mark.parametrize(("model_type", "size"), [(kind, size) for kind, found in PUBLISHED.items() for size in found])
def test_published_shapes_have_the_published_parameters(model_type: str, size: str) -> None:
    config = configuration(model_type, size)
    for spec in (spec_from_hf(config, None), gguf_form(config)[0]):
        assert sum(math.prod(tensor.shape) for tensor in file_tensors(spec)) == PARAMETERS[size]


@pytest.mark.parametrize("model_type", ["qwen3", "mistral"])
def test_text_goes_in_and_out_of_both_vocabularies(model_type: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", model_type, "tiny", "hf-bf16")
    with open_gguf(make(tmp_path / "model.gguf", model_type, "tiny", "F16")) as file:
        pair = Tokenizer.from_gguf(file), Tokenizer.from_folder(folder)
        templates = template_for(file, pair[0]), template_for(folder, pair[1])
    for tokenizer in pair:
        ids = tokenizer.encode(TEXT, add_bos=False)
        assert tokenizer.decode(ids).removeprefix(" ") == TEXT
        assert len(ids) < len(TEXT.encode())  # some merges
        assert tokenizer.encode("<|im_end|>", parse_special=True, add_bos=False)[-1] in tokenizer.eos_ids
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (288, 1, 2)
    assert pair[0].encode(TEXT) == pair[1].encode(TEXT)
    assert None not in templates


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K_M", "F16"])
def test_a_seed_is_a_model(type: str, tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{number}.gguf", "smollm3", "tiny", type, seed=seed) for number, seed in enumerate((5, 5, 6))]
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert len(first) == len(other)
    assert first != other


def test_holes_are_a_file_of_the_same_size(tmp_path: Path) -> None:
    full = make(tmp_path / "full.gguf", "qwen3", "tiny", "Q4_K_M").read_bytes()
    path = make(tmp_path / "holes.gguf", "qwen3", "tiny", "Q4_K_M", holes=True)
    assert len(path.read_bytes()) == len(full)
    with open_gguf(path) as file, open_gguf(tmp_path / "full.gguf") as other:
        assert file.tensors == other.tensors


def test_a_published_shape_with_fewer_layers(tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf", "llama", "smollm2-135m", "Q4_K_M", layers=2)
    with open_gguf(path) as file:
        spec = spec_from_gguf(file)
        types = {file.tensors[source.names[0]].type.name for source in spec.tensors.values()}
    assert (spec.layers, spec.width, spec.vocab) == (2, 576, 49152)
    assert {"F32"} < types <= set(FAMILY_OF_Q4_K_M)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


#: What Q4_K_M mixes, and what takes its place where 576 columns are no multiple of 256.
FAMILY_OF_Q4_K_M = ("F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0")


def test_every_model_type_is_tiny_too() -> None:
    assert all(sizes(model_type)[-1] == "tiny" for model_type in FAMILIES)
