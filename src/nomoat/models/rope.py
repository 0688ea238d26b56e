"""Rotary position embedding: its settings from config.json and from GGUF, the frequencies, and the two row orders of q and k."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nomoat.models.fields import MAX_CONTEXT, Fields
from nomoat.models.spec import RopeSpec

FloatArray = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

#: Ranges that hold every published model; outside them a file is damaged.
BASE_RANGE = (1.0, 1e12)
FACTOR_RANGE = (1e-3, 1e6)
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

#: GGUF tensors of divisors: at every length, up to the original context, beyond it.
DIVISORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class Yarn:
    """Pairs that turn more than `fast` times within `original` tokens stay, those that turn less than `slow` times are slowed."""

    original: int
    fast: float = 32.0
    slow: float = 1.0
    whole: bool = True  # the two borders are rounded to whole pairs


@dataclass(frozen=True)
class Rotation:
    """One rotary embedding with its scaling still apart, in the terms that Hugging Face and GGUF share.

    The angle per position of pair i is base^(-2 i / dim) / factor / divisors[i]; yarn divides only some pairs by `factor`.
    `long` replaces `divisors` where the model runs with a context above `original`.
    """

    dim: int
    base: float
    factor: float = 1.0
    yarn: Yarn | None = None
    divisors: Float32 | None = None
    long: Float32 | None = None
    original: int = 0
    magnitude: float = 1.0

    def spec(self, context: int, *, interleaved: bool) -> RopeSpec:
        """The frequencies for a model that runs with `context` tokens."""
        inv_freq = frequencies(self.dim, self.base)
        if self.yarn is None:
            inv_freq = inv_freq / self.factor
        else:
            inv_freq = yarn(inv_freq, self.base, self.factor, self.yarn)
        divisors = self.long if self.long is not None and context > self.original else self.divisors
        if divisors is not None:
            inv_freq = inv_freq / divisors.astype(np.float64)
        return RopeSpec(self.dim, interleaved, inv_freq.astype(np.float32), self.magnitude)

    def metadata(self) -> dict[str, object]:
        """GGUF keys below the architecture's prefix; what they leave open is in `tensors`."""
        found: dict[str, object] = {"rope.dimension_count": self.dim, "rope.freq_base": float(self.base)}
        magnitude = self.magnitude
        if self.yarn is not None:
            found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(self.factor)}
            found["rope.scaling.original_context_length"] = self.yarn.original
            found |= {"rope.scaling.yarn_beta_fast": self.yarn.fast, "rope.scaling.yarn_beta_slow": self.yarn.slow}
            # llama.cpp multiplies by this in every architecture; it does not read `yarn_attn_factor`, which says the same
            magnitude /= yarn_magnitude(self.factor)
        elif self.factor != 1.0:
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(self.factor)}
        elif self.long is not None:
            found |= {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": self.original}
        if not math.isclose(magnitude, 1.0, rel_tol=1e-9):
            found["rope.scaling.attn_factor"] = magnitude
        return found

    def tensors(self) -> dict[str, Float32]:
        """GGUF tensors of divisors, by name."""
        if self.long is None:
            return {} if self.divisors is None else {DIVISORS: self.divisors}
        assert self.divisors is not None
        return {LONG: self.long, SHORT: self.divisors}


def frequencies(dim: int, base: float) -> FloatArray:
    """Angle per position of each pair: base^(-2 i / dim), float64 [dim / 2]."""
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def llama3(inv_freq: FloatArray, *, factor: float, low: float, high: float, original: int) -> FloatArray:
    """Divisors of the frequencies in Llama 3.1 and later.

    A pair that turns more than `high` times within the original context stays, one that turns less than `low` times is
    slowed by `factor`, and between the two the frequency is blended linearly in the number of turns.
    """
    turns = original * inv_freq / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: FloatArray = 1 / (keep + (1 - keep) / factor)
    return divisors


def yarn(inv_freq: FloatArray, base: float, factor: float, settings: Yarn) -> FloatArray:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): between the borders `fast` and `slow` the blend is linear in the pair."""
    dim = 2 * len(inv_freq)

    def pair(turns: float) -> float:
        return dim * math.log(settings.original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(settings.fast), pair(settings.slow)
    if settings.whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slowed = np.clip((np.arange(len(inv_freq)) - low) / (high - low or 0.001), 0.0, 1.0)
    blend: FloatArray = slowed * inv_freq / factor + (1 - slowed) * inv_freq
    return blend


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """How much YaRN enlarges q and k where the model does not say: 1 + 0.1 scale ln(factor)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original: int) -> float:
    """The same for LongRoPE (Ding et al. 2024, arXiv 2402.13753)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


# ---- config.json -------------------------------------------------------------------------------------------------------


def from_config(keys: Fields, head_dim: int, context: int, *, partial: bool = False, section: str | None = None) -> Rotation:
    """The rotation of a Hugging Face model: `rope_theta` and `rope_scaling`, or `rope_parameters`, which replaced both.

    `partial`: `partial_rotary_factor` counts. `section` is the layer type whose part of `rope_parameters` is meant.
    """
    scaling = settings(keys, section)
    owner = scaling if scaling.has("rope_theta") else keys
    base = owner.number("rope_theta", *BASE_RANGE, default=10000.0)
    owner = scaling if scaling.has("partial_rotary_factor") else keys
    share = owner.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    if share != 1.0 and not partial:
        raise owner.fail("partial_rotary_factor", share, "1: this architecture turns whole heads", "E_ARCH")
    return scaled(scaling, int(head_dim * share), base, keys, context)


def settings(keys: Fields, section: str | None = None, *, shared: bool = True) -> Fields:
    """The object of a config.json that holds the scaling, empty where there is none.

    It may have a part for each layer type. `shared`: if it has not, all of it counts for `section`, else nothing does.
    """
    name = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    found = _object(keys, name, keys.values.get(name))
    nested = [key for key, value in found.items() if isinstance(value, Mapping)]
    if section is None and nested:
        raise keys.fail(name, nested, "one setting for all layers", "E_ARCH")
    if nested:
        name = f"{name}.{section}"
        found = _object(keys, name, found.get(str(section)))
    elif not shared:
        found = {}
    return Fields(found, f"{keys.where}: {name}")


def _object(keys: Fields, name: str, value: object) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise keys.fail(name, value, "an object", "E_TYPE")
    return value


def scaled(scaling: Fields, dim: int, base: float, keys: Fields, context: int) -> Rotation:
    """One rotation by its `rope_type`. `dynamic` changes nothing within the trained context, where nomoat stays."""
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "su" or (kind == "yarn" and scaling.has("long_factor")):  # earlier names of longrope, in Phi-3
        kind = "longrope"
    if kind in ("default", "dynamic"):
        return Rotation(dim, base)
    if kind == "linear":
        return Rotation(dim, base, factor=scaling.number("factor", *FACTOR_RANGE))
    owner = keys if keys.has("original_max_position_embeddings") else scaling
    original = owner.integer("original_max_position_embeddings", 1, MAX_CONTEXT, default=context)
    if kind == "llama3":
        low = scaling.number("low_freq_factor", 0.0, 1e6)
        high = scaling.number("high_freq_factor", 0.0, 1e6)
        if high <= low:
            raise scaling.fail("high_freq_factor", high, f"more than low_freq_factor, which is {low:g}", "E_LIMIT")
        factor = scaling.number("factor", *FACTOR_RANGE)
        divisors = llama3(frequencies(dim, base), factor=factor, low=low, high=high, original=original)
        return Rotation(dim, base, divisors=divisors.astype(np.float32))
    factor = scaling.number("factor", *FACTOR_RANGE, default=context / original)
    if kind == "yarn":
        return _yarn_from_config(scaling, dim, base, factor, original)
    if kind == "longrope":
        if original < 2:
            raise owner.fail("original_max_position_embeddings", original, "2 or more", "E_ARCH")
        return Rotation(
            dim,
            base,
            divisors=np.array(scaling.numbers("short_factor", *FACTOR_RANGE, length=dim // 2), np.float32),
            long=np.array(scaling.numbers("long_factor", *FACTOR_RANGE, length=dim // 2), np.float32),
            original=original,
            magnitude=scaling.number("attention_factor", *FACTOR_RANGE, default=longrope_magnitude(factor, original)),
        )
    raise scaling.fail("rope_type", kind, f"one of {', '.join(KINDS)}: no other scaling is supported", "E_ARCH")


def _yarn_from_config(scaling: Fields, dim: int, base: float, factor: float, original: int) -> Rotation:
    magnitude = yarn_magnitude(factor)
    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        whole, part = (scaling.number(name, 0.0, 1e3) for name in ("mscale_all_dim", "mscale"))
        if whole and part:
            magnitude = yarn_magnitude(factor, part) / yarn_magnitude(factor, whole)
    found = Rotation(
        dim,
        base,
        factor=factor,
        yarn=Yarn(
            original,
            scaling.number("beta_fast", 0.0, 1e6, default=32.0) or 32.0,  # 0 counts as absent, as in transformers
            scaling.number("beta_slow", 0.0, 1e6, default=1.0) or 1.0,
            scaling.flag("truncate", default=True),
        ),
        magnitude=scaling.number("attention_factor", *FACTOR_RANGE, default=magnitude),
    )
    return _checked(scaling, found, "rope_theta", "beta_fast")


def _checked(keys: Fields, rotation: Rotation, base: str, fast: str) -> Rotation:
    """What YaRN's logarithms need. `base` and `fast` are the names of two settings."""
    assert rotation.yarn is not None
    if rotation.base <= 1:
        raise keys.fail(base, rotation.base, "more than 1 with yarn", "E_LIMIT")
    if rotation.yarn.fast < rotation.yarn.slow:
        raise keys.fail(fast, rotation.yarn.fast, f"at least {rotation.yarn.slow:g}, the border of the slow pairs", "E_LIMIT")
    return rotation


# ---- GGUF --------------------------------------------------------------------------------------------------------------


def from_metadata(keys: Fields, dim: int, context: int, divisors: Callable[[str], Float32 | None]) -> Rotation:
    """The rotation of a GGUF. `divisors(tensor name)` reads one of the tensors [dim / 2], None where it is absent."""
    base = keys.number("rope.freq_base", *BASE_RANGE, default=10000.0)
    kind = keys.text("rope.scaling.type", default="linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.fail("rope.scaling.type", kind, "none, linear, yarn or longrope", "E_ARCH")
    factor = 1.0
    if kind != "none":
        key = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
        factor = keys.number(key, 0.0, FACTOR_RANGE[1], default=1.0) or 1.0  # 0 means not scaled
    magnitude = keys.number("rope.scaling.attn_factor", *FACTOR_RANGE, default=1.0)
    original = keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, default=context)
    everywhere, short, long = (divisors(name) for name in (DIVISORS, SHORT, LONG))
    if everywhere is not None or short is None or long is None:
        short, long = everywhere, None
    if kind != "yarn":
        return Rotation(dim, base, factor, None, short, long, original if long is not None else 0, magnitude)
    settings = Yarn(
        original,
        keys.number("rope.scaling.yarn_beta_fast", 1e-6, 1e6, default=32.0),
        keys.number("rope.scaling.yarn_beta_slow", 1e-6, 1e6, default=1.0),
    )
    magnitude *= keys.number("rope.scaling.yarn_attn_factor", *FACTOR_RANGE, default=yarn_magnitude(factor))
    found = Rotation(dim, base, factor, settings, short, long, original if long is not None else 0, magnitude)
    return _checked(keys, found, "rope.freq_base", "rope.scaling.yarn_beta_fast")


def interleaved_rows(heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Row order that turns Hugging Face q/k weights into GGUF's: `gguf_rows = hf_rows[interleaved_rows(...)]`.

    Within a head, Hugging Face pairs rows (i, i + head_dim / 2); arch-`llama` GGUFs pair (2i, 2i + 1). The inverse is
    `np.argsort` of the result. An adapter's B of q and k has the same rows.
    """
    order = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return order.transpose(0, 2, 1).reshape(-1)
