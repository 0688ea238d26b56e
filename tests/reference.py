"""Every model that `ModelSpec` describes, in plain NumPy, with LoRA: the oracle of the forward pass and, by complex step, of
every gradient.

All of it is analytic arithmetic, so it runs unchanged in float64 and in complex128. The derivative of f along v is then
Im f(x + i h v) / h with h = 1e-30: no subtraction, hence exact to rounding (Squire and Trapp 1998). Softmax takes its
maximum over the real part, which is a constant to the derivative. Leading axes broadcast: an A of [P, r, K] is P adapters
at once, which is how P entries of a gradient are found in one pass.

Shapes: T tokens, D width, H heads, K key/value heads, d head dimension, F MLP width, V vocabulary, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nomoat.files.gguf import open_gguf
from nomoat.models import ModelSpec, spec_from_gguf, spec_from_hf
from nomoat.models.hf import read_config
from nomoat.models.spec import COVERABLE, RopeSpec

Array: TypeAlias = Any  # npt.NDArray of float64 or complex128: NumPy's stubs do not follow arithmetic on either
Ints = Sequence[int] | npt.NDArray[np.int32]
Floats = Sequence[float] | npt.NDArray[np.float32]
Place = tuple[int, str]  # (layer, target)
#: (A [r, K], B [N, r], scale) of each adapted linear; where a layer has E experts, (A [E, r, K], B [E, N, r], scale)
Lora = Mapping[Place, tuple[Array, Array, float]]

STEP = 1e-30


def rmsnorm(x: Array, gain: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def layernorm(x: Array, gain: Array, bias: Array | float, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * gain + bias over the last axis."""
    return rmsnorm(x - x.mean(-1, keepdims=True), gain, eps) + bias


def rope(x: Array, positions: Array, spec: RopeSpec) -> Array:
    """Rotates pairs of x [..., T, heads, d] by position * inv_freq; dimensions beyond spec.dim stay."""
    angle = np.asarray(positions, np.float64)[:, None, None] * spec.inv_freq.astype(np.float64)
    cos, sin = np.cos(angle) * spec.magnitude, np.sin(angle) * spec.magnitude
    half = spec.dim // 2
    first, second = (
        (slice(0, spec.dim, 2), slice(1, spec.dim, 2)) if spec.interleaved else (slice(0, half), slice(half, spec.dim))
    )
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def softmax(scores: Array, allowed: Array | None = None) -> Array:
    """Softmax over the last axis; entries that are not allowed get 0."""
    real = scores.real if allowed is None else np.where(allowed, scores.real, -np.inf)
    power = np.exp(scores - real.max(-1, keepdims=True))
    if allowed is not None:
        power = np.where(allowed, power, 0)
    return power / power.sum(-1, keepdims=True)


def log_softmax(scores: Array) -> Array:
    """log of softmax over the last axis."""
    shifted = scores - scores.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def attention(q: Array, k: Array, v: Array, allowed: Array, scale: float | None = None, cap: float = 0.0) -> Array:
    """Grouped-query attention: q [..., T, H, d], k and v [..., T, K, d], allowed [T, T] -> [..., T, H, d].

    Scores are multiplied by `scale` (None: 1 / sqrt(d)), then capped.
    """
    groups = q.shape[-2] // k.shape[-2]
    k, v = np.repeat(k, groups, axis=-2), np.repeat(v, groups, axis=-2)  # head h reads key/value head h // groups
    q, k, v = (np.swapaxes(x, -2, -3) for x in (q, k, v))  # [..., H, T, d]
    scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return np.swapaxes(softmax(capped(scores, cap), allowed) @ v, -2, -3)


def capped(x: Array, cap: float) -> Array:
    """cap tanh(x / cap); x where there is no cap."""
    return cap * np.tanh(x / cap) if cap else x


def silu(x: Array) -> Array:
    """x / (1 + exp(-x))"""
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))"""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def experts(h: Array, router: Array, mlp: Callable[[int, Array], Array], used: int, renormalized: bool) -> Array:
    """The sum of p_e * MLP_e(h) over the `used` best experts e of a row, p = softmax(router h).

    `renormalized`: those p over their sum. h [..., T, D], router [E, D]. The choice is a constant to the derivative.
    """
    p = softmax(h @ router.T)
    best = np.argsort(-p.real, axis=-1, kind="stable")[..., :used]  # stable: the lower index where two are equal
    chosen = np.zeros(p.shape, bool)
    np.put_along_axis(chosen, best, True, axis=-1)
    p = np.where(chosen, p, 0)
    if renormalized:
        p = p / p.sum(-1, keepdims=True)
    return sum(p[..., [e]] * mlp(e, h) for e in range(len(router)))


def linear(x: Array, weight: Array, lora: tuple[Array, Array, float] | None = None, bias: Array | float = 0.0) -> Array:
    """x W^T + scale (x A^T) B^T + bias for x [..., T, K], W [N, K]."""
    y = x @ weight.T + bias
    if lora is not None:
        a, b, scale = lora
        y = y + scale * (x @ np.swapaxes(a, -1, -2)) @ np.swapaxes(b, -1, -2)
    return y


def segments(starts: Ints) -> tuple[Array, Array]:
    """(position within its segment [T], may row attend to column [T, T]) for segment bounds 0 = s0 < s1 < ... < T."""
    bounds = np.asarray(starts)
    lengths = np.diff(bounds)
    index = np.arange(bounds[-1])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    position = index - np.repeat(bounds[:-1], lengths)
    return position, (owner[:, None] == owner[None, :]) & (index[:, None] >= index[None, :])


class Reference:
    """A model in float64. `weights` by engine name, in the row order that `spec.ropes` says."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Array], dtype: npt.DTypeLike = np.float64) -> None:
        self.spec = spec
        self.weights = {name: np.asarray(weight, dtype) for name, weight in weights.items()}

    @classmethod
    def load(cls, path: Path, dtype: npt.DTypeLike = np.float64) -> Reference:
        """From a .gguf file, dequantized by the `gguf` package, or from a Hugging Face folder."""
        return cls(*(weights_from_hf(path) if path.is_dir() else weights_from_gguf(path)), dtype)

    def hidden(self, tokens: Ints, starts: Ints | None = None, lora: Lora | None = None) -> Array:
        """Final hidden states after the last norm, [..., T, D]."""
        spec, w, lora = self.spec, self.weights, lora or {}
        position, allowed = segments((0, len(tokens)) if starts is None else starts)
        distance = position[:, None] - position[None, :]
        x: Array = spec.embed_scale * w["embed"][np.asarray(tokens)]
        for i, block in enumerate(spec.blocks):
            seen = allowed & (distance < block.window) if block.window else allowed
            mixed = self._attention(i, lora, self._norm(f"blk.{i}.attn_norm", x), position, seen)
            x = x + spec.residual_scale * self._norm(f"blk.{i}.attn_post_norm", mixed)
            mixed = self._mlp(i, lora, self._norm(f"blk.{i}.mlp_norm", x))
            x = x + spec.residual_scale * self._norm(f"blk.{i}.mlp_post_norm", mixed)
        return self._norm("final_norm", x)

    def _norm(self, name: str, x: Array) -> Array:
        """The model's kind of norm; x where it has none of this name."""
        if name not in self.weights:
            return x
        if self.spec.norm == "layer":
            return layernorm(x, self.weights[name], self.weights.get(f"{name}_bias", 0.0), self.spec.norm_eps)
        return rmsnorm(x, self.weights[name], self.spec.norm_eps)

    def _linear(self, i: int, target: str, lora: Lora, x: Array, expert: int | None = None) -> Array:
        name, adapter = f"blk.{i}.{target}", lora.get((i, target))
        if expert is None:
            return linear(x, self.weights[name], adapter, self.weights.get(f"{name}_bias", 0.0))
        if adapter is not None:
            adapter = (adapter[0][..., expert, :, :], adapter[1][..., expert, :, :], adapter[2])
        return linear(x, self.weights[name][expert], adapter)

    def _attention(self, i: int, lora: Lora, h: Array, position: Array, seen: Array) -> Array:
        spec, block = self.spec, self.spec.blocks[i]
        q, k, v = (self._linear(i, target, lora, h) for target in "qkv")
        if spec.qk_norm == "row":
            q, k = (rmsnorm(x, self.weights[f"blk.{i}.{name}_norm"], spec.norm_eps) for x, name in ((q, "q"), (k, "k")))
        q, k, v = (split_heads(x, spec.head_dim) for x in (q, k, v))
        if spec.qk_norm == "head":
            q, k = (rmsnorm(x, self.weights[f"blk.{i}.{name}_norm"], spec.norm_eps) for x, name in ((q, "q"), (k, "k")))
        if block.rope is not None:
            q, k = (rope(x, position, spec.ropes[block.rope]) for x in (q, k))
        mixed = attention(q, k, v, seen, spec.score_scale, spec.score_cap)
        return self._linear(i, "o", lora, mixed.reshape(*mixed.shape[:-2], -1))

    def _mlp(self, i: int, lora: Lora, h: Array) -> Array:
        act = gelu if self.spec.activation == "gelu" else silu
        if self.spec.blocks[i].experts:

            def mlp(e: int, h: Array) -> Array:
                return self._linear(
                    i, "down", lora, act(self._linear(i, "gate", lora, h, e)) * self._linear(i, "up", lora, h, e), e
                )

            found = experts(h, self.weights[f"blk.{i}.router"], mlp, self.spec.experts_used, self.spec.expert_norm)
            return found + self._shared_expert(i, lora, h, act) if self.spec.blocks[i].shared else found
        up = self._linear(i, "up", lora, h)
        return self._linear(i, "down", lora, act(self._linear(i, "gate", lora, h)) * up if self.spec.gated else act(up))

    def _shared_expert(self, i: int, lora: Lora, h: Array, act: Callable[[Array], Array]) -> Array:
        """sigmoid(shared_router . h) * MLP_shared(h)"""
        weight = 1 / (1 + np.exp(-(h * self.weights[f"blk.{i}.shared_router"]).sum(-1, keepdims=True)))
        middle = act(self._linear(i, "shared_gate", lora, h)) * self._linear(i, "shared_up", lora, h)
        return weight * self._linear(i, "shared_down", lora, middle)

    def _head(self, hidden: Array) -> Array:
        logits = self.spec.logit_scale * (hidden @ self.weights.get("head", self.weights["embed"]).T)
        return capped(logits, self.spec.logit_cap)

    def logits(self, tokens: Ints, starts: Ints | None = None, lora: Lora | None = None) -> Array:
        """[..., T, V]"""
        return self._head(self.hidden(tokens, starts, lora))

    def logprobs(
        self,
        tokens: Ints,
        targets: Ints,
        weights: Floats,
        starts: Ints | None = None,
        lora: Lora | None = None,
    ) -> Array:
        """Log-probability of the target of every row whose weight is not 0, [..., n] in row order."""
        rows = np.flatnonzero(np.asarray(weights))
        hidden = self.hidden(tokens, starts, lora)[..., rows, :]
        found = log_softmax(self._head(hidden))
        return found[..., np.arange(len(rows)), np.asarray(targets)[rows]]

    def loss(
        self,
        tokens: Ints,
        targets: Ints,
        weights: Floats,
        starts: Ints | None = None,
        lora: Lora | None = None,
    ) -> Array:
        """Weighted mean cross entropy, [...]."""
        w = np.asarray(weights, np.float64)
        w = w[w != 0]
        return -(self.logprobs(tokens, targets, weights, starts, lora) * w).sum(-1) / w.sum()

    def gradient(
        self,
        place: Place,
        part: int,
        lora: Lora,
        tokens: Ints,
        targets: Ints,
        weights: Floats,
        starts: Ints | None = None,
        *,
        entries: Iterable[int] | None = None,
        chunk: int = 64,
    ) -> Array:
        """d loss / d A (part 0) or d B (part 1) at one place: all entries in its shape, or the flat `entries` asked for."""
        whole: Array = lora[place][part]
        wanted = np.arange(whole.size) if entries is None else np.fromiter(entries, dtype=np.intp)
        found = np.empty(len(wanted))
        for begin in range(0, len(wanted), chunk):
            some = wanted[begin : begin + chunk]
            shifted = np.repeat(whole[None].astype(np.complex128), len(some), axis=0)
            shifted.reshape(len(some), -1)[np.arange(len(some)), some] += 1j * STEP
            pair = (shifted, lora[place][1]) if part == 0 else (lora[place][0], shifted)
            changed = {**lora, place: (*pair, lora[place][2])}
            found[begin : begin + len(some)] = self.loss(tokens, targets, weights, starts, changed).imag / STEP
        return found.reshape(whole.shape) if entries is None else found

    def derivative(
        self,
        directions: Mapping[Place, tuple[Array, Array]],
        lora: Lora,
        tokens: Ints,
        targets: Ints,
        weights: Floats,
        starts: Ints | None = None,
    ) -> float:
        """Derivative of the loss along (dA, dB) at the places given: equals the inner product with the gradient."""
        changed = dict(lora)
        for place, (da, db) in directions.items():
            a, b, scale = lora[place]
            changed[place] = (a + 1j * STEP * da, b + 1j * STEP * db, scale)
        return float(self.loss(tokens, targets, weights, starts, changed).imag / STEP)

    def greedy(self, tokens: Ints, count: int, lora: Lora | None = None) -> list[int]:
        """`count` most likely next tokens, each by a whole forward pass."""
        found = [int(token) for token in tokens]
        for _ in range(count):
            found.append(int(self.logits(found, lora=lora)[-1].argmax()))
        return found[len(tokens) :]


def split_heads(x: Array, head_dim: int) -> Array:
    """[..., T, heads * d] -> [..., T, heads, d]"""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def random_lora(
    spec: ModelSpec, rank: int, scale: float = 1.0, seed: int = 0, targets: Sequence[str] = COVERABLE
) -> dict[Place, Any]:
    """An adapter with nothing zero, so that every gradient is: A as large as a weight, B a tenth of that. float32 values."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer, target in spec.places(targets):
        *experts, n, k = spec.tensor_shape(f"blk.{layer}.{target}")
        a = (rng.standard_normal((*experts, rank, k)) / np.sqrt(k)).astype(np.float32)
        b = (0.1 * rng.standard_normal((*experts, n, rank))).astype(np.float32)
        found[layer, target] = (a.astype(np.float64), b.astype(np.float64), scale)
    return found


def weights_from_gguf(path: Path) -> tuple[ModelSpec, dict[str, Array]]:
    """The description of a GGUF and its weights, float32 by the `gguf` package."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with open_gguf(path) as file:
        spec = spec_from_gguf(file)

        def read(name: str) -> Array:
            info = file.tensors[name]
            rows = np.array(file.data(name)).reshape(*info.shape[:-1], -1)
            kind = GGMLQuantizationType[info.type.name]
            plain = {"F32": "<f4", "F16": "<f2"}.get(kind.name)
            values = rows.view(plain) if plain else dequantize(rows, kind)
            return np.asarray(values, np.float32).reshape(info.shape)

        return spec, gathered(spec, read)


def weights_from_hf(folder: Path) -> tuple[ModelSpec, dict[str, Array]]:
    """The description of a Hugging Face folder with one model.safetensors, and its weights as float32."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    slots = json.loads(raw[8 : 8 + size])
    slots.pop("__metadata__", None)
    spec = spec_from_hf(read_config(folder), slots.keys(), name=folder.name)

    def read(name: str) -> Array:
        begin, end = slots[name]["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end]
        if slots[name]["dtype"] == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[slots[name]["dtype"]]).astype(np.float32)
        return values.reshape(slots[name]["shape"])

    return spec, gathered(spec, read)


def gathered(spec: ModelSpec, read: Callable[[str], Array]) -> dict[str, Array]:
    """Every weight in its shape, out of whole tensors, of rows of one, or of several (`Source`)."""
    weights = {}
    for engine, source in spec.tensors.items():
        shape, parts = spec.tensor_shape(engine), [read(name) for name in source.names]
        values = parts[0] if len(parts) == 1 else np.stack(parts)
        if source.rows is not None:
            values = values[source.first : source.first + source.rows]
        weights[engine] = values.reshape(shape) + np.float32(source.add)
    return weights
