"""Safetensors: what the reference library writes, ours reads, and the other way round."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile.safetensors_cases import DATA, GOOD, file, read_by_the_library
from nomoat.errors import NomoatError
from nomoat.files.safetensors import open_safetensors, write_safetensors

QUIET = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
Arrays = dict[str, npt.NDArray[np.float32]]


def arrays(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"b.weight": (3, 5), "a.weight": (2, 2, 2), "scalar": (), "empty": (0, 4), "é": (7,)}
    out: Arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    out["half"] = rng.standard_normal(9).astype(np.float16)
    return out


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(arrays(), path, {"format": "pt"})
    with open_safetensors(path) as opened:
        assert opened.metadata == {"format": "pt"}
        assert set(opened.tensors) == set(arrays())
        for name, array in arrays().items():
            found = opened.array(name)
            assert found.dtype == np.float32
            assert found.shape == array.shape
            assert np.array_equal(found, array.astype(np.float32))
            assert opened.raw(name).tobytes() == array.tobytes()


def test_writes_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, arrays(), {"b": "ü", "a": "1"})
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(arrays())
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {"a": "1", "b": "ü"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0  # so that float32 data is aligned in memory maps


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([0.0, -0.0, 1.0, -1.5, 3.0e38, np.inf, 1e-40], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    path = tmp_path / "m.safetensors"
    header = {"x": {"dtype": "BF16", "shape": [7], "data_offsets": [0, 14]}}
    path.write_bytes(file(header, halves.tobytes()))
    with open_safetensors(path) as opened:
        assert np.array_equal(opened.array("x").view(np.uint32), halves.astype(np.uint32) << 16)


def test_same_bytes_whatever_the_order_and_the_process(tmp_path: Path) -> None:
    """Metadata of ten keys: the library orders those by a hash that differs from process to process."""
    metadata = {str(i): "x" for i in range(10)}
    write_safetensors(tmp_path / "a", arrays(), metadata)
    turned = dict(reversed(arrays().items()))
    write_safetensors(tmp_path / "b", turned, dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    program = (
        "import sys, numpy as np; from nomoat.files.safetensors import write_safetensors;"
        "write_safetensors(sys.argv[1], {n: np.ones(3, np.float32) for n in 'ba'}, {str(i): 'x' for i in range(10)})"
    )
    digests = set()
    for seed in ("1", "2"):
        path = tmp_path / f"p{seed}"
        source = Path(__file__).resolve().parent.parent / "src"
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(source)}
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_columns_and_slices_are_written_in_row_order(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_safetensors(tmp_path / "m", {"turned": base.T, "slice": base[::2, 1::2]})
    found = safetensors.numpy.load_file(tmp_path / "m")
    assert np.array_equal(found["turned"], base.T)
    assert np.array_equal(found["slice"], base[::2, 1::2])


def test_other_types_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="float64"):
        write_safetensors(tmp_path / "m", {"x": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


HEADER = 8 + len(json.dumps(GOOD))


@settings(QUIET, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, HEADER + 20), st.sampled_from(["set", "cut", "insert"]), st.binary(min_size=1, max_size=4)))
)
def test_mutated_files_get_the_verdict_of_the_library_or_a_stricter_one(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[int, str, bytes]]
) -> None:
    data = bytearray(file(GOOD, DATA))
    for at, what, new in mutations:
        data[at : at + (0 if what == "insert" else len(new))] = b"" if what == "cut" else new
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    try:
        with open_safetensors(path) as opened:
            found = {name: opened.raw(name).tobytes() for name in opened.tensors}
    except NomoatError:
        return
    assert found == read_by_the_library(bytes(data))
