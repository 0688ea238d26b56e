"""Kernels of every CPU level that this machine can execute, against NumPy in float64 on the weights as `gguf` decodes them."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from nomoat import _native

LEVELS = _native.usable_levels()
FLOAT = [Kind.F32, Kind.F16, Kind.BF16]
INTEGER = [
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4),
]
FORMATS = FLOAT + INTEGER

#: Formats that `gguf` decodes but cannot quantize to -> where the float16 scales of a block stand.
SCALES_AT = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.level()
    _native.set_level(request.param)
    yield request.param
    _native.set_level(before)


def gguf_bytes(kind: Kind, rows: int, cols: int, seed: int) -> np.ndarray:
    """Random weights in `kind`: quantized where `gguf` can, else random blocks with small finite scales."""
    rng = np.random.default_rng(seed)
    if kind in SCALES_AT:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows * cols // block, size), dtype=np.uint8)
        for at in SCALES_AT[kind]:
            blocks[:, at : at + 2] = rng.uniform(0.001, 0.01, (len(blocks), 1)).astype("<f2").view(np.uint8)
        return blocks.reshape(-1)
    weight = rng.standard_normal((rows, cols)).astype(np.float32)
    return np.ascontiguousarray(gguf.quants.quantize(weight, kind)).view(np.uint8).reshape(-1)


def decoded(kind: Kind, raw: np.ndarray, rows: int, cols: int) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    values: np.ndarray = gguf.quants.dequantize(raw.reshape(rows, cols // block * size), kind)
    return values.reshape(rows, cols).astype(np.float32)


def packed(kind: Kind, raw: np.ndarray, rows: int, cols: int) -> np.ndarray:
    out = np.empty(_native.packed_bytes(int(kind), rows, cols), np.uint8)
    _native.pack(int(kind), rows, cols, raw, out)
    return out


def padded(count: int) -> int:
    return -(-count // 32) * 32


def pad(x: np.ndarray) -> np.ndarray:
    out = np.zeros((len(x), padded(x.shape[1])), np.float32)
    out[:, : x.shape[1]] = x
    return out


def quantized_rows(x: np.ndarray, digits: int) -> np.ndarray:
    """Activations as a block of 32 sees them: x ~ scale * round(x / scale), scale = max |x| / 127, or / (127 * 128)."""
    largest = np.float32(127 if digits == 1 else 127 * 128)
    blocks = x.reshape(len(x), -1, 32)
    peak = np.abs(blocks).max(-1, keepdims=True).astype(np.float32)
    inverse = np.where(peak > 0, largest / np.where(peak > 0, peak, 1), np.float32(0))
    codes = np.rint((blocks * inverse).astype(np.float32))
    seen: np.ndarray = codes.astype(np.float64) * (peak / largest).astype(np.float64)
    return seen.reshape(x.shape)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_rows_decode_bit_for_bit_like_gguf(kind: Kind, level: str) -> None:
    rows, cols = 37, 512
    raw = gguf_bytes(kind, rows, cols, 1)
    ids = np.arange(rows, dtype=np.int32)
    out = np.zeros((rows, cols), np.float32)
    _native.read_rows(int(kind), rows, cols, packed(kind, raw, rows, cols), ids, out)
    assert np.array_equal(out, decoded(kind, raw, rows, cols))


def test_mxfp4_decodes_with_every_scale(level: str) -> None:
    """From subnormal 2^-128 to 2^127, where the largest values overflow as they do in `gguf`."""
    blocks = np.random.default_rng(12).integers(0, 256, (256, 17), dtype=np.uint8)
    blocks[:, 0] = np.arange(256)
    raw = blocks.reshape(-1)
    out = np.zeros((256, 32), np.float32)
    _native.read_rows(int(Kind.MXFP4), 256, 32, packed(Kind.MXFP4, raw, 256, 32), np.arange(256, dtype=np.int32), out)
    with np.errstate(over="ignore"):
        assert np.array_equal(out, decoded(Kind.MXFP4, raw, 256, 32))


def test_every_f16_value_decodes_exactly(level: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(-1, 64)
    rows, cols = values.shape
    out = np.zeros((rows, cols), np.float32)
    weights = packed(Kind.F16, values.view(np.uint8).reshape(-1), rows, cols)
    _native.read_rows(int(Kind.F16), rows, cols, weights, np.arange(rows, dtype=np.int32), out)
    expected = values.view(np.float16).astype(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)


@pytest.mark.parametrize("kind", INTEGER, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [16, 37])
@pytest.mark.parametrize("digits", [1, 2])
def test_int8_product(kind: Kind, rows: int, digits: int, level: str) -> None:
    cols = 512
    raw = gguf_bytes(kind, rows, cols, 2)
    weight = decoded(kind, raw, rows, cols).astype(np.float64)
    weights = packed(kind, raw, rows, cols)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((17, cols)).astype(np.float32)
    seen = quantized_rows(x, digits)
    expected = seen @ weight.T
    # 16 blocks are added in float32, each with a few roundings: (blocks + 8) * eps * sum |x| |w|
    bound = (cols // 32 + 8) * 2**-24 * (np.abs(seen) @ np.abs(weight).T) * 4
    for count in range(1, 18):
        y = np.zeros((count, padded(rows)), np.float32)
        _native.product(int(kind), rows, cols, weights, x[:count], y, "int8", digits=digits)
        assert np.all(np.abs(y[:, :rows] - expected[:count]) <= bound[:count]), f"{count} rows"


@pytest.mark.parametrize("kind", INTEGER, ids=lambda kind: kind.name)
def test_int8_extremes_do_not_saturate(kind: Kind, level: str) -> None:
    """All codes and all activations at their largest: 16-bit intermediate sums would overflow here."""
    rows, cols = 16, 256
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.full((rows * cols // block, size), {Kind.Q8_0: 0x80, Kind.MXFP4: 0x77}.get(kind, 0xFF), np.uint8)
    if kind is Kind.Q6_K:
        raw[:, 192:208] = 0x7F
    for at in SCALES_AT.get(kind, (0,)):
        raw[:, at : at + 2] = np.array([1.0], "<f2").view(np.uint8)
    if kind in (Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K):
        raw[:, 2:4] = 0
    if kind is Kind.MXFP4:
        raw[:, 0], raw[:, 1] = 128, 0x77
    flat = raw.reshape(-1)
    weight = decoded(kind, flat, rows, cols).astype(np.float64)
    for sign, digits in ((1, 1), (-1, 1), (1, 2), (-1, 2)):
        x = np.full((3, cols), sign * 127, np.float32)
        y = np.zeros((3, padded(rows)), np.float32)
        _native.product(int(kind), rows, cols, packed(kind, flat, rows, cols), x, y, "int8", digits=digits)
        assert np.allclose(y[:, :rows], x @ weight.T, rtol=1e-6)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("precision", "unit"), [("bf16", 2**-8), ("f32", 2**-23)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_training_product(kind: Kind, precision: str, unit: float, backward: bool, level: str) -> None:
    rows, cols = 83, 512
    raw = gguf_bytes(kind, rows, cols, 4)
    weight = decoded(kind, raw, rows, cols).astype(np.float64)
    weights = packed(kind, raw, rows, cols)
    matrix = weight if backward else weight.T
    rng = np.random.default_rng(5)
    x = rng.standard_normal((21, matrix.shape[0])).astype(np.float32)
    expected = x @ matrix
    # both factors rounded to the element type, then `depth` float32 additions
    depth = matrix.shape[0] * 2**-23 if precision == "f32" else 2**-20
    bound = (2 * unit + depth) * (np.abs(x) @ np.abs(matrix))
    for count in (1, 2, 5, 8, 9, 16, 21):
        y = np.zeros((count, padded(matrix.shape[1])), np.float32)
        _native.product(int(kind), rows, cols, weights, pad(x[:count]), y, precision, backward)
        assert np.all(np.abs(y[:, : matrix.shape[1]] - expected[:count]) <= bound[:count]), f"{count} rows"
        assert not y[:, matrix.shape[1] :].any(), "padding must stay zero"


@pytest.mark.parametrize(("precision", "unit"), [("bf16", 2**-8), ("f32", 2**-23)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", [(400, 2816), (2816, 512)], ids=["wide", "tall"])
def test_training_product_in_parts(shape: tuple[int, int], precision: str, unit: float, backward: bool, level: str) -> None:
    """Several parts of the contraction, several tasks of several panels and several blocks of rows."""
    rows, cols = shape
    raw = gguf_bytes(Kind.Q4_K, rows, cols, 14)
    weight = decoded(Kind.Q4_K, raw, rows, cols).astype(np.float64)
    weights = packed(Kind.Q4_K, raw, rows, cols)
    matrix = weight if backward else weight.T
    x = np.random.default_rng(15).standard_normal((150, matrix.shape[0])).astype(np.float32)
    y = np.zeros((150, padded(matrix.shape[1])), np.float32)
    _native.product(int(Kind.Q4_K), rows, cols, weights, pad(x), y, precision, backward)
    bound = (2 * unit + matrix.shape[0] * 2**-23) * (np.abs(x) @ np.abs(matrix))
    assert np.all(np.abs(y[:, : matrix.shape[1]] - x @ matrix) <= bound)
    single = np.zeros((1, y.shape[1]), np.float32)
    for row in (0, 15, 128, 149):
        _native.product(int(Kind.Q4_K), rows, cols, weights, pad(x[row : row + 1]), single, precision, backward)
        assert np.array_equal(single[0], y[row]), f"row {row} alone"


@pytest.mark.parametrize("kind", FLOAT, ids=lambda kind: kind.name)
def test_float_weights_keep_float_activations_in_inference(kind: Kind, level: str) -> None:
    rows, cols = 40, 172  # not a multiple of 32: padded inside
    raw = gguf_bytes(kind, rows, cols, 6)
    weight = decoded(kind, raw, rows, cols).astype(np.float64)
    x = np.random.default_rng(7).standard_normal((6, cols)).astype(np.float32)
    y = np.zeros((6, padded(rows)), np.float32)
    _native.product(int(kind), rows, cols, packed(kind, raw, rows, cols), pad(x), y, "int8")
    assert np.all(np.abs(y[:, :rows] - x @ weight.T) <= cols * 2**-23 * (np.abs(x) @ np.abs(weight).T))


@pytest.mark.parametrize("precision", ["int8", "bf16", "f32"])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(precision: str, level: str) -> None:
    rows, cols = 100, 512
    raw = gguf_bytes(Kind.Q4_1, rows, cols, 8)
    weights = packed(Kind.Q4_1, raw, rows, cols)
    x = np.random.default_rng(9).standard_normal((33, cols)).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        _native.set_threads(threads)
        whole = np.zeros((33, padded(rows)), np.float32)
        _native.product(int(Kind.Q4_1), rows, cols, weights, x, whole, precision)
        single = np.zeros((1, padded(rows)), np.float32)
        for row in range(33):
            _native.product(int(Kind.Q4_1), rows, cols, weights, x[row : row + 1], single, precision)
            assert np.array_equal(single[0], whole[row])
        results.append(whole)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_adamw_matches_its_definition(level: str) -> None:
    rng = np.random.default_rng(10)
    w, g = rng.standard_normal((2, 1003)).astype(np.float32)
    m, v = np.zeros_like(w), np.zeros_like(w)
    exact, m64, v64 = w.astype(np.float64), np.zeros(1003), np.zeros(1003)
    for step in range(1, 6):
        _native.adamw(w, g, m, v, 1e-3, 0.9, 0.999, 1e-8, 0.01, step, 0.5)
        gradient = g.astype(np.float64) * 0.5
        m64 = 0.9 * m64 + 0.1 * gradient
        v64 = 0.999 * v64 + 0.001 * gradient**2
        update = (m64 / (1 - 0.9**step)) / (np.sqrt(v64 / (1 - 0.999**step)) + 1e-8)
        exact = exact * (1 - 1e-3 * 0.01) - 1e-3 * update
    assert np.allclose(w, exact, rtol=1e-5, atol=1e-6)


def test_sum_of_squares(level: str) -> None:
    x = np.random.default_rng(11).standard_normal(100_003).astype(np.float32)
    assert np.isclose(_native.sum_squares([x])[0], np.square(x.astype(np.float64)).sum(), rtol=1e-13)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _native.packed_bytes(99, 16, 32), "format 99"),
        (lambda: _native.packed_bytes(int(Kind.Q4_1), 16, 33), "multiple"),
        (lambda: _native.packed_bytes(int(Kind.Q4_1), 0, 32), "positive"),
        (lambda: _native.set_level("mmx"), "usable"),
        (lambda: _native.set_threads(0), "threads"),
    ],
)
def test_bad_arguments_raise(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=words):
        call()
