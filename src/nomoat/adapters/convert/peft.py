"""PEFT's LoRA format: what `adapter_config.json` may say, and how its tensors are named.

Format: https://github.com/huggingface/peft, `LoraConfig` (fields checked against 0.21.2).
Tensors are `base_model.model.model.layers.<i>.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], in the row
order of the Hugging Face model. GGUF files of some architectures hold the rows of q and k in another order (rotary pairs
side by side), and an adapter trained on one must follow: `to_base_rows` and `to_huggingface_rows` permute B.

A module may hold several targets, their rows one below the other (q, k, v in Phi 3). Its B is then split by rows under one A;
adapters that were trained apart become A = [Aq; Ak; Av] and a B that is block-diagonal, and are taken apart again by its zeros.

Each expert of a mixture has modules of its own (`mlp.experts.3.up_proj`), as transformers had them before version 5, and so they
are written; PEFT with transformers 5 converts them when it loads them. What it saves itself is read too: there gate and up of all
experts are one parameter and down another, E experts in one A [E r, in] and B [out, r E] (`target_parameters`).

Text out of a package never reaches a regular-expression engine: patterns are plain names that match at a dot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from nomoat.engine.stack import Adapter, Float32, Place
from nomoat.errors import AdapterError, printable
from nomoat.models.spec import LINEARS, ModelSpec

MAX_RANK = 4096
MAX_MODULE_RANK = 3 * MAX_RANK  # of a module that holds three targets
MAX_ALPHA = 1e6
PREFIX = "base_model.model."

#: Fields that change what the adapter computes, in ways that nomoat does not do, and how to get an adapter without them.
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA changes the base weights' magnitude; merge it into the model instead",
        "lora_bias": "biases on B",
        "modules_to_save": "whole layers trained beside the adapter; train without modules_to_save",
        "trainable_token_indices": "trained token embeddings; train without trainable_token_indices",
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
    | {"ensure_weight_tying", "target_parameters"}
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
    parameters: tuple[str, ...]  # those that an adapter is on, in place of modules
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
    ranks = {key: _integer(f"rank_pattern.{key}", value, MAX_MODULE_RANK) for key, value in _pattern(config, "rank_pattern")}
    alphas = {key: _number(f"alpha_pattern.{key}", value, MAX_ALPHA) for key, value in _pattern(config, "alpha_pattern")}
    targets, parameters = _targets(config, "target_modules"), _targets(config, "target_parameters") or ()
    other = [name for name in parameters if not any(_matching((name,), known) for known in EXPERT_PARAMETERS)]
    if other:
        raise AdapterError(
            f"adapter_config.json: target_parameters names {_shown(other[0])}; expected some of {', '.join(EXPERT_PARAMETERS)}",
            code="E_ARCH",
        )
    return LoraConfig(rank, alpha, bool(rslora), targets, parameters, ranks, alphas)


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


def _targets(config: Mapping[str, Any], field: str) -> tuple[str, ...] | None:
    """A list is checked against the tensor names later; a string (a pattern, or "all-linear") only for its length."""
    value = config.get(field)
    if value is None or (isinstance(value, str) and len(value) <= 4096):
        return None
    if isinstance(value, list) and len(value) <= 4096 and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise AdapterError(
        f"adapter_config.json: {field} must be a list of names, or a string of at most 4,096 characters",
        code="E_LIMIT" if isinstance(value, str | list) else "E_TYPE",
    )


def _pattern(config: Mapping[str, Any], field: str) -> Iterator[tuple[str, object]]:
    value = config.get(field)
    if value is None:
        return
    if not isinstance(value, dict) or len(value) > 65536:
        raise AdapterError(f"adapter_config.json: {field} must be an object of at most 65,536 entries", code="E_TYPE")
    for key in value:
        plain = key.removeprefix(r".*\.")  # as PEFT itself writes for experts, and the same as without
        if len(key) > 512 or not all(c.isascii() and (c.isalnum() or c in "._") for c in plain):
            raise AdapterError(
                f"adapter_config.json: {field} key {_shown(key)} is a regular expression; only plain module names are read "
                "(letters, digits, dots and underscores)",
                code="E_TYPE",
            )
        yield plain, value[key]


def _matching(patterns: Collection[str], module: str) -> str | None:
    """PEFT's rule without its regular expressions: the first key that is the name, or its end after a dot."""
    return next((key for key in patterns if module == key or module.endswith("." + key)), None)


def _is_number_text(text: str) -> bool:
    """Whether a part of a name is the number of a layer or an expert."""
    return text.isascii() and text.isdigit() and len(text) <= 5 and str(int(text)) == text


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


class Module(NamedTuple):
    """A linear of the Hugging Face model, or a parameter that holds one of every expert, and the targets whose rows it holds."""

    layer: int
    path: str  # below the layer: "self_attn.q_proj"
    root: str  # before `layers`: "model."
    targets: tuple[str, ...]
    expert: int | None = None  # whose linear it is
    every: bool = False  # of all experts

    @property
    def name(self) -> str:
        return f"{self.root}layers.{self.layer}.{self.path}"

    def fits(self, spec: ModelSpec) -> bool:
        """Whether the model has such a layer, with these linears in it."""
        if self.layer >= spec.layers or not set(self.targets) <= set(spec.targets(self.layer)):
            return False
        experts = spec.experts_at(self.targets[0], self.layer)
        return experts > (self.expert or 0) if self.every or self.expert is not None else not experts

    def stacked(self, spec: ModelSpec) -> int:
        """How many adapters lie in its A and B."""
        return spec.experts_at(self.targets[0], self.layer) if self.every and self.fits(spec) else 1

    def shape(self, spec: ModelSpec) -> tuple[int, int]:
        """(rows, columns) of the linear, all its targets together."""
        layer = self.layer if self.layer < spec.layers else 0
        shapes = [spec.linear_shape(target, layer) for target in self.targets]
        return sum(rows for rows, _ in shapes), shapes[0][1]


def module_of(name: str, spec: ModelSpec, config: LoraConfig) -> tuple[Module, str]:
    """ "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight" -> (up of layer 3, "B").

    The layer need not exist. Raises AdapterError E_ARCH for anything that is no adapter of one of the model's linears.
    """
    for mark, reason in (
        ("lora_magnitude_vector", "DoRA changes the base weights' magnitude; merge it into the model instead"),
        ("lora_embedding_", "adapters on embeddings or the output head are not supported"),
        ("lora_B.bias", "biases on B are not supported"),
    ):
        if mark in name:
            raise AdapterError(f"tensor {_shown(name)}: {reason}", code="E_ARCH")
    paths, roots = _paths(spec), _roots(spec)
    root = next((root for root in roots if name.startswith(f"{PREFIX}{root}layers.")), None)
    layer, _, rest = name.removeprefix(f"{PREFIX}{root}layers.").partition(".")
    path, _, side = rest.rpartition(".lora_")
    expert = _expert_module(path, spec, config)
    if root is None or (path not in paths and expert is None) or side not in ("A.weight", "B.weight"):
        known = [*paths, *(template.format(e="<expert>") for template in _experts(spec).values())]
        raise AdapterError(
            f"tensor {_shown(name)}: expected {PREFIX}{roots[0]}layers.<layer>.<module>.lora_A.weight or .lora_B.weight with a "
            f"module of {', '.join(known)}; nomoat refuses an adapter rather than leave out a part of it",
            code="E_ARCH",
        )
    if not _is_number_text(layer):
        raise AdapterError(f"tensor {_shown(name)}: {_shown(layer)} is not a layer number", code="E_ARCH")
    if expert is not None:
        return expert._replace(layer=int(layer), root=root), side[0]
    return Module(int(layer), path, root, paths[path]), side[0]


#: Parameters of all experts in transformers 5, in the order in which PEFT wraps them: around the last is the name of the module.
EXPERT_PARAMETERS = {"mlp.experts.gate_up_proj": ("gate", "up"), "mlp.experts.down_proj": ("down",)}


def _expert_module(path: str, spec: ModelSpec, config: LoraConfig) -> Module | None:
    """What a path below a layer is among experts, the layer left open; None where it is nothing there."""
    templates = _experts(spec)
    for target, template in templates.items():
        before, _, after = template.partition("{e}")
        number = path.removeprefix(before).removesuffix(after)
        if path == f"{before}{number}{after}" and _is_number_text(number):
            return Module(0, path, "", (target,), expert=int(number))
    wrapped = [name for name in EXPERT_PARAMETERS if _matching(config.parameters, name) is not None]
    paths = ["mlp.experts" + ".base_layer" * depth for depth in reversed(range(len(wrapped)))]
    if templates and path in paths:
        name = wrapped[paths.index(path)]
        return Module(0, name, "", EXPERT_PARAMETERS[name], every=True)
    return None


def from_peft(config: LoraConfig, arrays: Mapping[str, Float32], spec: ModelSpec) -> Adapter:
    """Builds the adapter, B rows in the base file's order. Raises AdapterError: E_ARCH, E_SHAPE, E_NONFINITE.

    A place whose strength differs from the whole adapter's (patterns) gets the difference multiplied into its B.
    """
    sides: dict[Module, dict[str, Float32]] = {}
    for name, array in arrays.items():
        module, side = module_of(name, spec, config)
        sides.setdefault(module, {})[side] = array
    alpha = config.alpha * math.sqrt(config.rank) if config.rslora else config.alpha
    tensors: dict[Place, tuple[Float32, Float32]] = {}
    of_experts: dict[Place, dict[int, tuple[Float32, Float32]]] = {}
    for module, pair in sides.items():
        if len(pair) != 2:
            raise AdapterError(f"{module.name}: lora_{next(iter(pair))} has no partner; A and B belong together", code="E_SHAPE")
        if not module.every and config.targets is not None and _matching(config.targets, module.name) is None:
            raise AdapterError(f"{module.name} has weights, but target_modules does not name it", code="E_SHAPE")
        a, b = pair["A"], pair["B"]
        rank, stacked = config.rank_of(module.name), module.stacked(spec)
        if a.ndim != 2 or a.shape[0] != rank * stacked or (module.every and b.shape[1:] != (rank * stacked,)):
            each = f" for each of {stacked} experts" if module.every else ""
            raise AdapterError(
                f"{module.name}: A is {list(a.shape)} and B is {list(b.shape)}, but adapter_config.json says rank {rank}{each}",
                code="E_SHAPE",
            )
        factor = config.scale_of(module.name) / (alpha / config.rank)
        if factor != 1.0 and not math.isclose(factor, 1.0, rel_tol=1e-12):
            b = b * np.float32(factor)
        if module.every:  # A one expert after the other, B one rank after the other
            a, b = a.reshape(stacked, rank, -1), b.reshape(-1, rank, stacked).transpose(2, 0, 1)
        if module.expert is None:
            tensors |= _split(module, np.ascontiguousarray(a), np.ascontiguousarray(b), spec)
        else:
            of_experts.setdefault((module.layer, module.targets[0]), {})[module.expert] = (a, b)
    tensors |= {place: _gathered(place, pairs, spec) for place, pairs in of_experts.items()}
    targets = tuple(target for target in LINEARS if any(target == place[1] for place in tensors))
    Adapter(config.rank, alpha, targets, tensors).check(spec)  # shapes first: rows can be permuted only where they fit
    ordered = {place: (a, to_base_rows(b, place[1], spec)) for place, (a, b) in tensors.items()}
    return Adapter(config.rank, alpha, targets, ordered)


def _gathered(place: Place, pairs: Mapping[int, tuple[Float32, Float32]], spec: ModelSpec) -> tuple[Float32, Float32]:
    """The adapters of all experts as one: A [E, r, K] and B [E, N, r]."""
    layer, target = place
    experts = spec.experts_at(target, layer) if layer < spec.layers else 0
    if pairs.keys() != set(range(experts)):
        raise AdapterError(
            f"layer {layer}, {target}: {len(pairs):,} experts have weights, from {min(pairs)} to {max(pairs)}; the base model "
            f"has {experts:,} there, and all of them need some. Is this adapter for another model?",
            code="E_SHAPE",
        )
    if len({(a.shape, b.shape) for a, b in pairs.values()}) > 1:
        raise AdapterError(f"layer {layer}, {target}: its experts have A or B of several shapes; one is expected", code="E_SHAPE")
    return np.stack([pairs[e][0] for e in range(experts)]), np.stack([pairs[e][1] for e in range(experts)])


def _split(module: Module, a: Float32, b: Float32, spec: ModelSpec) -> dict[Place, tuple[Float32, Float32]]:
    """The adapter of a module as one for each of its targets, without the ranks that are zero in its rows of B."""
    if len(module.targets) == 1:
        return {(module.layer, module.targets[0]): (a, b)}
    if not module.fits(spec) or b.shape[-2:] != (module.shape(spec)[0], a.shape[-2]):
        raise AdapterError(
            f"{module.name}: A is {list(a.shape)} and B is {list(b.shape)}; expected B [{module.shape(spec)[0]}, r] in one of "
            f"{spec.layers} layers. Is this adapter for another model?",
            code="E_SHAPE",
        )
    found: dict[Place, tuple[Float32, Float32]] = {}
    untrained, first = not b.any(), 0
    for target in module.targets:
        rows = spec.linear_shape(target, module.layer)[0]
        part = np.ascontiguousarray(b[..., first : first + rows, :])
        used = np.flatnonzero(part.any(axis=tuple(range(part.ndim - 1))))
        if untrained or len(used) == a.shape[-2]:
            found[module.layer, target] = (a, part)
        elif len(used):
            found[module.layer, target] = (np.ascontiguousarray(a[..., used, :]), np.ascontiguousarray(part[..., used]))
        first += rows
    return found


def _joined(module: Module, adapter: Adapter, spec: ModelSpec) -> tuple[Float32, Float32]:
    """The inverse of `_split`: A and B of the module, B in Hugging Face row order."""
    places = [(target, adapter.tensors.get((module.layer, target))) for target in module.targets]
    pairs = [pair for _, pair in places if pair is not None]
    shared = len(pairs) > 1 and all(np.array_equal(pair[0], pairs[0][0]) for pair in pairs)
    a = pairs[0][0] if shared else np.concatenate([pair[0] for pair in pairs])
    b = np.zeros((module.shape(spec)[0], len(a)), np.float32)
    row = rank = 0
    for target, pair in places:
        rows = spec.linear_shape(target, module.layer)[0]
        if pair is not None:
            end = rank + pair[1].shape[1]
            b[row : row + rows, rank:end] = to_huggingface_rows(pair[1], target, spec)
            rank = 0 if shared else end
        row += rows
    return np.ascontiguousarray(a, dtype=np.float32), b


def to_peft(adapter: Adapter, spec: ModelSpec, *, base: str | None = None) -> tuple[dict[str, Any], dict[str, Float32]]:
    """(adapter_config.json, tensors in Hugging Face row order), both in a fixed order: same adapter, same bytes."""
    root, paths = _roots(spec)[0], _paths(spec)
    arrays: dict[str, Float32] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    written: dict[Module, None] = {}
    for layer, target in adapter.places():
        if experts := spec.experts_at(target, layer):
            template = _experts(spec)[target]
            written |= {Module(layer, template.format(e=e), root, (target,), expert=e): None for e in range(experts)}
        else:
            (path,) = (path for path, targets in paths.items() if target in targets)
            written[Module(layer, path, root, paths[path])] = None
    for module in written:
        if module.expert is None:
            a, b = _joined(module, adapter, spec)
        else:
            a, b = (side[module.expert] for side in adapter.tensors[module.layer, module.targets[0]])
        arrays[f"{PREFIX}{module.name}.lora_A.weight"] = a
        arrays[f"{PREFIX}{module.name}.lora_B.weight"] = b
        if a.shape[0] != adapter.rank:
            rank_pattern[module.name] = a.shape[0]
            alpha_pattern[module.name] = adapter.scale * a.shape[0]
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
        "target_modules": _leaves(written),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return config, arrays


def _leaves(modules: Collection[Module]) -> list[str]:
    """The last parts of the names of modules, in the order of their targets."""
    ordered = sorted(modules, key=lambda module: LINEARS.index(module.targets[0]))
    return list(dict.fromkeys(module.path.rpartition(".")[2] for module in ordered))


def _experts(spec: ModelSpec) -> Mapping[str, str]:
    """Target -> module path below `model.layers.<i>`, {e} for the expert; empty where no layer has experts."""
    from nomoat.models import architecture

    found: Mapping[str, str] = architecture(spec).PEFT_EXPERTS if any(block.experts for block in spec.blocks) else {}
    return found


def _paths(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Module path below `model.layers.<i>` -> the targets in it, from the architecture's file."""
    from nomoat.models import architecture

    modules: Mapping[str, str] = architecture(spec).PEFT_MODULES
    return {path: tuple(t for t in LINEARS if modules.get(t) == path) for path in dict.fromkeys(modules.values())}


def _roots(spec: ModelSpec) -> list[str]:
    """What comes before `layers`: "model.", and others where the language model is a part of a larger one."""
    from nomoat.models import architecture

    return list(architecture(spec).ARCHITECTURE.roots)


def _permuted(spec: ModelSpec) -> bool:
    """Whether this base file holds q and k rows in another order than Hugging Face: GGUF with rotary pairs side by side."""
    from nomoat.models import architecture

    return bool(spec.ropes[0].interleaved and architecture(spec).qk_permuted("gguf"))


def _turned(target: str, spec: ModelSpec) -> bool:
    return target in ("q", "k") and _permuted(spec)


def to_base_rows(b: Float32, target: str, spec: ModelSpec) -> Float32:
    """B [N, r] from Hugging Face order (first halves of all pairs, then second halves) to the base file's row order."""
    if not _turned(target, spec):
        return np.ascontiguousarray(b)
    rank = b.shape[1]
    return np.ascontiguousarray(b.reshape(-1, 2, spec.head_dim // 2, rank).swapaxes(1, 2)).reshape(-1, rank)


def to_huggingface_rows(b: Float32, target: str, spec: ModelSpec) -> Float32:
    """The inverse of `to_base_rows`."""
    if not _turned(target, spec):
        return np.ascontiguousarray(b)
    rank = b.shape[1]
    return np.ascontiguousarray(b.reshape(-1, spec.head_dim // 2, 2, rank).swapaxes(1, 2)).reshape(-1, rank)
