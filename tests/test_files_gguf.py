"""The GGUF reader against the `gguf` package: what that writes or reads, ours reads the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile.gguf_bytes import small
from nomoat.errors import FileFormatError, NomoatError
from nomoat.files.ggml import BLOCK_SHAPE, GgmlType
from nomoat.files.gguf import GgufFile, LazyArray, ValueType, open_gguf

QUIET = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def plain(value: object) -> object:
    """A metadata value as Python objects."""
    if not isinstance(value, LazyArray):
        return value
    return value.strings() if value.type is ValueType.STRING else value.numbers().tolist()


def assert_same(ours: GgufFile, path: Path) -> None:
    """Every key, tensor description and byte as the `gguf` package reads them."""
    theirs = gguf.GGUFReader(path)
    keys = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) == set(keys)
    for name, field in keys.items():
        assert plain(ours.metadata[name]) == field.contents(), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert list(info.shape) == tensor.shape[::-1].tolist()
        assert (info.type.name, info.offset, info.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert np.array_equal(ours.data(tensor.name), tensor.data.view(np.uint8).reshape(-1))


def test_types_are_those_of_the_gguf_package() -> None:
    assert {t.name: int(t) for t in GgmlType} == {t.name: int(t) for t in gguf.GGMLQuantizationType}
    for kind, shape in BLOCK_SHAPE.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == shape


def test_real_model(smollm2: Path) -> None:
    with open_gguf(smollm2) as file:
        assert_same(file, smollm2)
        assert len(file.get_array("tokenizer.ggml.tokens")) == 49_152


def test_real_vocabularies(shared_data: Path) -> None:
    """Files without tensors, as llama.cpp ships its vocabularies."""
    paths = sorted((shared_data / "llamacpp_vocabs").rglob("*.gguf"))
    assert paths
    for path in paths:
        with open_gguf(path) as file:
            assert file.tensors == {}
            assert file.get_int("tokenizer.ggml.bos_token_id") < len(file.get_array("tokenizer.ggml.tokens").strings())
    smallest = min(paths, key=lambda path: path.stat().st_size)  # the `gguf` package takes seconds for each
    with open_gguf(smallest) as file:
        assert_same(file, smallest)


def test_typed_getters(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small().build())
    with open_gguf(path) as file:
        assert file.get_str("general.architecture") == "llama"
        assert file.get_int("llama.block_count") == 1
        assert file.get_float("llama.rope.freq_base") == 10000.0
        assert file.get_bool("tokenizer.ggml.add_bos_token") is True
        assert file.get_int("none", default=7) == 7
        assert file.get_array("tokenizer.ggml.scores").numbers().dtype == np.float32
        wrong: list[Callable[[], object]] = [
            lambda: file.get_int("general.architecture"),
            lambda: file.get_str("llama.block_count"),
            lambda: file.get_float("llama.block_count"),
            lambda: file.get_bool("llama.block_count"),
            lambda: file.get_int("tokenizer.ggml.add_bos_token"),
            lambda: file.get_array("llama.block_count"),
            lambda: file.get_str("tokenizer.ggml.tokens"),
            lambda: file.get_array("tokenizer.ggml.tokens").numbers(),
            lambda: file.get_array("tokenizer.ggml.scores").strings(),
        ]
        for get in wrong:
            with pytest.raises(FileFormatError) as caught:
                get()
            assert caught.value.code == "E_TYPE"
        with pytest.raises(FileFormatError, match="`none` is missing") as caught:
            file.get_str("none")
        assert caught.value.code == "E_ARCH"


def test_large_vocabulary_opens_fast(tmp_path: Path) -> None:
    """150,000 tokens, merges, scores and types: under 50 ms; the test allows four times that on a busy machine."""
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [f"token{i}" + "x" * (i % 11) for i in range(150_000)]
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{token[:5]} {token[5:]}" for token in tokens])
    writer.add_token_scores([-float(i) for i in range(150_000)])
    writer.add_token_types([1] * 150_000)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    finish(writer)
    best = 1.0
    for _ in range(5):
        began = time.process_time()
        file = open_gguf(path)
        best = min(best, time.process_time() - began)
        assert file.get_array("tokenizer.ggml.tokens").strings()[-1] == tokens[-1]
        file.close()
    assert best < 4 * 0.050


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- properties ---------------------------------------------------------------------------------------------------------------

NAMES = st.text("abcdefghij._-0123456789", min_size=1, max_size=20).filter(lambda name: ".." not in name and name[0] != "g")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
VALUES = st.one_of(
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.booleans(),
    TEXT.filter(bool),  # the writer leaves empty strings out
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    st.lists(TEXT, min_size=1, max_size=40),
    st.lists(st.booleans(), min_size=1, max_size=10),
)
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4)
ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}


@settings(QUIET, max_examples=60)
@given(st.dictionaries(NAMES, VALUES, max_size=8), st.dictionaries(NAMES, SHAPES, max_size=6), st.sampled_from([8, 32, 128]))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any], shapes: dict[str, list[int]], alignment: int
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name, value in keys.items():
        getattr(writer, ADD[type(value)])(name, value)
    arrays = {}
    for i, (name, shape) in enumerate(shapes.items()):
        # Q8_0 rows take blocks of 32; the writer is given the raw blocks.
        kind = (np.float32, np.float16, np.uint8)[i % 3]
        rows = [*shape[:-1], 34 * shape[-1]] if kind is np.uint8 else shape
        arrays[name] = (np.arange(np.prod(rows)) % 251).reshape(rows).astype(kind)
        writer.add_tensor(name, arrays[name], raw_dtype=gguf.GGMLQuantizationType.Q8_0 if kind is np.uint8 else None)
    finish(writer)
    with open_gguf(path) as file:
        for name, value in keys.items():
            assert plain(file.metadata[name]) == value
        for name, array in arrays.items():
            assert file.data(name).tobytes() == array.tobytes()
            if array.dtype == np.uint8:
                assert file.tensors[name].shape[-1] == array.shape[-1] // 34 * 32
            else:
                assert file.tensors[name].shape == array.shape


HEADER = len(small().header())
MUTATIONS = st.lists(
    st.tuples(st.integers(0, HEADER + 64), st.sampled_from(["set", "cut", "double"]), st.binary(min_size=1, max_size=9))
)


def exit_code_of_reading(path: Path) -> int:
    """What a command that reads all of the file would return: 0, or that of the error."""
    try:
        with open_gguf(path) as file:
            for value in file.metadata.values():
                plain(value)
            for name, tensor in file.tensors.items():
                assert len(file.data(name).tobytes()) == tensor.nbytes
    except NomoatError as error:
        return error.exit_code
    return 0


@settings(QUIET, max_examples=300)
@given(MUTATIONS)
def test_mutated_files_load_or_give_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[int, str, bytes]]
) -> None:
    data = bytearray(small().build())
    for at, what, new in mutations:
        if what == "set":
            data[at : at + len(new)] = new
        elif what == "cut":
            del data[at : at + len(new)]
        else:
            data[at:at] = data[at : at + 50]
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(data)
    assert exit_code_of_reading(path) in (0, 2)
