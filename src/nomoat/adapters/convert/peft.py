"""PEFT's LoRA format: what `adapter_config.json` may say, and how its tensors are named.

Format: https://github.com/huggingface/peft, `LoraConfig` (fields checked against 0.21.2).
Tensors are `base_model.model.model.layers.<i>.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], in the row
order of the Hugging Face model. Files of architecture `llama` in GGUF hold the rows of q and k in another order (rotary
pairs side by side), and an adapter trained on one must follow: `to_base_rows` and `to_huggingface_rows` permute B.

Text out of a package never reaches a regular-expression engine: patterns are plain names that match at a dot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from nomoat.engine.stack import Adapter, Float32, Place
from nomoat.errors import AdapterError, printable
from nomoat.models.spec import TARGETS, ModelSpec

MAX_RANK = 4096
MAX_ALPHA = 1e6
PREFIX = "base_model.model.model.layers."

#: Fields that change what the adapter computes, in ways that nomoat does not do, and how to get an adapter without them.
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA changes the base weights' magnitude; merge it into the model instead",
        "lora_bias": "biases on B",
        "modules_to_save": "whole layers trained beside the adapter; train without modules_to_save",
        "trainable_token_indices": "trained token embeddings; train without trainable_token_indices",
        "target_parameters": "adapters on raw parameters (experts of a mixture)",
        "layer_replication": "repeated layers",
        "alora_invocation_tokens": "an adapter that acts only after an invocation sequence",
        "use_qalora": "QALoRA's pooled inputs",
        "use_bdlora": "block-diagonal LoRA",
        "arrow_config": "Arrow routing between several adapters",
        "velora_config": "VeLoRA",
        "monteclora_config": "MonteCLoRA",
        "kasa_config": "KaSA",
        "fan_in_fan_out": "weights stored as [in, out]",
        "megatron_config": "Megatron layers",
    }
)
#: Fields without influence on the result: provenance, training-time settings, or what the tensor names say better.
IGNORED = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r"}
    | {"target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights"}
    | {"layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "parent_library"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"}
    | {"ensure_weight_tying"}
)
#: Initializations that leave the base weights as they are; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraConfig:
    """The part of adapter_config.json that decides numbers. Patterns: module name -> rank or alpha."""

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | None  # None: decided by the tensor names alone
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank that the configuration gives a module, `model.layers.0.self_attn.q_proj`."""
        key = _matching(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_of(self, module: str) -> float:
        """Strength of a module: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        key = _matching(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def parse_config(config: object) -> LoraConfig:
    """Checks adapter_config.json (already JSON). Raises AdapterError: E_TYPE, E_LIMIT or E_ARCH."""
    if not isinstance(config, dict):
        raise AdapterError(f"adapter_config.json holds a {type(config).__name__}; expected an object", code="E_JSON")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"adapter_config.json: peft_type is {_shown(kind)}; nomoat reads LORA adapters only", code="E_ARCH")
    _refuse_unsupported(config)
    rank = _integer("r", config.get("r", 8), MAX_RANK)
    alpha = _number("lora_alpha", config.get("lora_alpha", 8), MAX_ALPHA)
    dropout = config.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout <= 1:
        raise AdapterError(f"adapter_config.json: lora_dropout is {_shown(dropout)}; expected 0 to 1", code="E_LIMIT")
    rslora = config.get("use_rslora", False)
    if not isinstance(rslora, bool | None):
        raise AdapterError(f"adapter_config.json: use_rslora is {_shown(rslora)}; expected true or false", code="E_TYPE")
    ranks = {key: _integer(f"rank_pattern.{key}", value, MAX_RANK) for key, value in _pattern(config, "rank_pattern")}
    alphas = {key: _number(f"alpha_pattern.{key}", value, MAX_ALPHA) for key, value in _pattern(config, "alpha_pattern")}
    return LoraConfig(rank, alpha, bool(rslora), _targets(config.get("target_modules")), ranks, alphas)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, reason in UNSUPPORTED.items():
        if config.get(key):
            raise AdapterError(f"adapter_config.json: {key} is set, which nomoat does not support ({reason})", code="E_ARCH")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter_config.json: bias is {_shown(config['bias'])}; only 'none' is supported", code="E_ARCH")
    initialization = config.get("init_lora_weights", True)
    if isinstance(initialization, str) and initialization not in PLAIN_INITIALIZATIONS:
        raise AdapterError(
            f"adapter_config.json: init_lora_weights is {_shown(initialization)}, which changes the base weights too. "
            "Convert it to a plain LoRA first: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
            code="E_ARCH",
        )
    for key, value in config.items():
        if value and key not in IGNORED and key not in UNSUPPORTED:
            raise AdapterError(
                f"adapter_config.json: unknown setting {_shown(key)}. It may change what the adapter computes, so it is not "
                "ignored; remove it if it does not",
                code="E_ARCH",
            )


def _targets(value: object) -> tuple[str, ...] | None:
    """A list is checked against the tensor names later; a string (a pattern, or "all-linear") only for its length."""
    if value is None or (isinstance(value, str) and len(value) <= 4096):
        return None
    if isinstance(value, list) and len(value) <= 4096 and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise AdapterError(
        "adapter_config.json: target_modules must be a list of module names, or a string of at most 4,096 characters",
        code="E_LIMIT" if isinstance(value, str | list) else "E_TYPE",
    )


def _pattern(config: Mapping[str, Any], field: str) -> Iterator[tuple[str, object]]:
    value = config.get(field)
    if value is None:
        return
    if not isinstance(value, dict) or len(value) > 65536:
        raise AdapterError(f"adapter_config.json: {field} must be an object of at most 65,536 entries", code="E_TYPE")
    for key in value:
        if len(key) > 512 or not all(c.isascii() and (c.isalnum() or c in "._") for c in key):
            raise AdapterError(
                f"adapter_config.json: {field} key {_shown(key)} is a regular expression; only plain module names are read "
                "(letters, digits, dots and underscores)",
                code="E_TYPE",
            )
    yield from value.items()


def _matching(patterns: Collection[str], module: str) -> str | None:
    """PEFT's rule without its regular expressions: the first key that is the name, or its end after a dot."""
    return next((key for key in patterns if module == key or module.endswith("." + key)), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(field: str, value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise AdapterError(f"adapter_config.json: {printable(field)} is {_shown(value)}; expected a whole number", code="E_TYPE")
    if not 1 <= value <= limit:
        raise AdapterError(f"adapter_config.json: {printable(field)} is {_shown(value)}; expected 1 to {limit}", code="E_LIMIT")
    return value


def _number(field: str, value: object, limit: float) -> float:
    if not _is_number(value):
        raise AdapterError(f"adapter_config.json: {printable(field)} is {_shown(value)}; expected a number", code="E_TYPE")
    assert isinstance(value, int | float)
    if not 0 < value <= limit:  # NaN fails here as well
        raise AdapterError(
            f"adapter_config.json: {printable(field)} is {_shown(value)}; expected above 0 and at most {limit:g}", code="E_LIMIT"
        )
    return float(value)


def _shown(value: object) -> str:
    """A value out of a file, short and safe to print. A huge integer is not converted to text (its digits cost time)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = printable(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def place_of(name: str, modules: Mapping[str, str]) -> tuple[Place, str]:
    """ "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight" -> ((3, "up"), "B").

    `modules` maps targets to module paths below the layer. Raises AdapterError E_ARCH for anything else.
    """
    for mark, reason in (
        ("lora_magnitude_vector", "DoRA changes the base weights' magnitude; merge it into the model instead"),
        ("lora_embedding_", "adapters on embeddings or the output head are not supported"),
        ("lora_B.bias", "biases on B are not supported"),
    ):
        if mark in name:
            raise AdapterError(f"tensor {_shown(name)}: {reason}", code="E_ARCH")
    layer, _, rest = name.removeprefix(PREFIX).partition(".")
    module, _, side = rest.rpartition(".lora_")
    target = next((target for target, path in modules.items() if path == module), None)
    if not name.startswith(PREFIX) or target is None or side not in ("A.weight", "B.weight"):
        raise AdapterError(
            f"tensor {_shown(name)}: expected {PREFIX}<layer>.<module>.lora_A.weight or .lora_B.weight with a module of "
            f"{', '.join(modules.values())}; nomoat refuses an adapter rather than leave out a part of it",
            code="E_ARCH",
        )
    if not (layer.isascii() and layer.isdigit() and len(layer) <= 5 and str(int(layer)) == layer):
        raise AdapterError(f"tensor {_shown(name)}: {_shown(layer)} is not a layer number", code="E_ARCH")
    return (int(layer), target), side[0]


def from_peft(config: LoraConfig, arrays: Mapping[str, Float32], spec: ModelSpec) -> Adapter:
    """Builds the adapter, B rows in the base file's order. Raises AdapterError: E_ARCH, E_SHAPE, E_NONFINITE.

    A place whose strength differs from the whole adapter's (patterns) gets the difference multiplied into its B.
    """
    modules = peft_modules(spec)
    sides: dict[Place, dict[str, Float32]] = {}
    for name, array in arrays.items():
        place, side = place_of(name, modules)
        sides.setdefault(place, {})[side] = array
    alpha = config.alpha * math.sqrt(config.rank) if config.rslora else config.alpha
    tensors: dict[Place, tuple[Float32, Float32]] = {}
    for (layer, target), pair in sides.items():
        module = f"model.layers.{layer}.{modules[target]}"
        if len(pair) != 2:
            raise AdapterError(f"{module}: lora_{next(iter(pair))} has no partner; A and B belong together", code="E_SHAPE")
        if config.targets is not None and _matching(config.targets, module) is None:
            raise AdapterError(f"{module} has weights, but target_modules does not name it", code="E_SHAPE")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or a.shape[0] != config.rank_of(module):
            raise AdapterError(
                f"{module}: A is {list(a.shape)}, but adapter_config.json says rank {config.rank_of(module)}", code="E_SHAPE"
            )
        factor = config.scale_of(module) / (alpha / config.rank)
        if factor != 1.0 and not math.isclose(factor, 1.0, rel_tol=1e-12):
            b = b * np.float32(factor)
        tensors[layer, target] = (np.ascontiguousarray(a), b)
    targets = tuple(target for target in TARGETS if any(target == place[1] for place in tensors))
    Adapter(config.rank, alpha, targets, tensors).check(spec)  # shapes first: rows can be permuted only where they fit
    ordered = {place: (a, to_base_rows(b, place[1], spec)) for place, (a, b) in tensors.items()}
    return Adapter(config.rank, alpha, targets, ordered)


def to_peft(adapter: Adapter, spec: ModelSpec, *, base: str | None = None) -> tuple[dict[str, Any], dict[str, Float32]]:
    """(adapter_config.json, tensors in Hugging Face row order), both in a fixed order: same adapter, same bytes."""
    modules = peft_modules(spec)
    arrays: dict[str, Float32] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for layer, target in adapter.places():
        a, b = adapter.tensors[layer, target]
        stem = f"{PREFIX}{layer}.{modules[target]}"
        arrays[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a, dtype=np.float32)
        arrays[f"{stem}.lora_B.weight"] = np.ascontiguousarray(to_huggingface_rows(b, target, spec), dtype=np.float32)
        if a.shape[0] != adapter.rank:
            module = f"model.layers.{layer}.{modules[target]}"
            rank_pattern[module] = a.shape[0]
            alpha_pattern[module] = adapter.scale * a.shape[0]
    config = {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": [modules[target].rpartition(".")[2] for target in TARGETS if target in adapter.targets],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return config, arrays


def peft_modules(spec: ModelSpec) -> Mapping[str, str]:
    """Target -> module path below `model.layers.<i>`, from the architecture's file."""
    from nomoat.models import architecture

    modules: Mapping[str, str] = architecture(spec).PEFT_MODULES
    return modules


def _permuted(spec: ModelSpec) -> bool:
    """Whether this base file holds q and k rows in another order than Hugging Face: GGUF with rotary pairs side by side."""
    from nomoat.models import architecture

    return bool(spec.ropes[0].interleaved and architecture(spec).qk_permuted("gguf"))


def _heads(target: str, spec: ModelSpec) -> int:
    return {"q": spec.heads, "k": spec.kv_heads}.get(target, 0)


def to_base_rows(b: Float32, target: str, spec: ModelSpec) -> Float32:
    """B [N, r] from Hugging Face order (first halves of all pairs, then second halves) to the base file's row order."""
    heads = _heads(target, spec)
    if not heads or not _permuted(spec):
        return np.ascontiguousarray(b)
    rank = b.shape[1]
    return np.ascontiguousarray(b.reshape(heads, 2, spec.head_dim // 2, rank).swapaxes(1, 2)).reshape(-1, rank)


def to_huggingface_rows(b: Float32, target: str, spec: ModelSpec) -> Float32:
    """The inverse of `to_base_rows`."""
    heads = _heads(target, spec)
    if not heads or not _permuted(spec):
        return np.ascontiguousarray(b)
    rank = b.shape[1]
    return np.ascontiguousarray(b.reshape(heads, spec.head_dim // 2, 2, rank).swapaxes(1, 2)).reshape(-1, rank)
