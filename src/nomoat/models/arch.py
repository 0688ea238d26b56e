"""What the file of an architecture consists of: a table of names, and hooks for what only it has.

`read_hf`, `read_gguf` and `write_gguf` work on it; a hook completes the draft that they have read so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nomoat.errors import InputError
from nomoat.models.fields import Fields
from nomoat.models.rope import Rotation
from nomoat.models.spec import SHARED_TARGETS, LayerSpec, ModelSpec, RopeSpec

#: Parts of a layer in the order of ModelSpec.tensors.
PARTS = (
    *("attn_norm", "q", "k", "v", "o", "q_norm", "k_norm", "attn_post_norm"),
    *("mlp_norm", "router", "gate", "up", "down", "shared_router", *SHARED_TARGETS, "mlp_post_norm"),
)


@dataclass
class Draft:
    """A model as far as it is read. Lists have one item for each layer, with the meaning of LayerSpec's fields."""

    layers: int
    width: int
    head_dim: int
    context: int  # trained
    heads: list[int]
    kv_heads: list[int]
    ffn: list[int]
    rotations: list[Rotation]
    windows: list[int] = field(default_factory=list)
    ropes: list[int | None] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    biases: set[str] = field(default_factory=set)  # parts that have one
    fields: dict[str, Any] = field(default_factory=dict)  # of ModelSpec, beside the ones above

    def __post_init__(self) -> None:
        self.windows = self.windows or [0] * self.layers
        self.ropes = self.ropes or [0] * self.layers
        self.experts = self.experts or [0] * self.layers
        self.shared = self.shared or [0] * self.layers

    def spec(self, architecture: str, *, name: str, interleaved: bool, context: int | None) -> ModelSpec:
        """The model without its tensors. `context` is what it will run with; None leaves the choice to `usable_context`."""
        usable, notes = self.usable_context(context)
        alike = (self.heads, self.kv_heads, self.ffn, self.windows, self.ropes, self.experts, self.shared)
        return ModelSpec(
            architecture=architecture,
            name=name,
            width=self.width,
            head_dim=self.head_dim,
            context=usable,
            blocks=tuple(LayerSpec(*values) for values in zip(*alike, strict=True)),
            ropes=self.rope_specs(usable, interleaved=interleaved),
            notes=notes,
            **self.fields,
        )

    def rope_specs(self, context: int, *, interleaved: bool) -> tuple[RopeSpec, ...]:
        return tuple(rotation.spec(context, interleaved=interleaved) for rotation in self.rotations)

    def usable_context(self, wanted: int | None) -> tuple[int, tuple[str, ...]]:
        """(context to run with, notes). With short and long rotary factors it is the original context if nothing is wanted.

        Up to there the short factors hold, here as in transformers and llama.cpp. A longer context means the long ones for
        every position from the first: llama.cpp decides so by the context it was started with, transformers by the length
        of each input.
        """
        if wanted is not None:
            if wanted < 1:
                raise InputError(f"context is {wanted:,}; expected 1 or more", code="E_LIMIT")
            return min(wanted, self.context), ()
        original = min((rotation.original for rotation in self.rotations if rotation.long is not None), default=self.context)
        if original >= self.context:
            return self.context, ()
        note = (
            f"context limited to {original:,} of {self.context:,} tokens, where the model's short rotary factors hold; "
            "Model.load(context=...) takes more of it, with the long factors at every position"
        )
        return original, (note,)


Hook = Callable[[Fields, Draft], None]


def _nothing(keys: Fields, model: Draft) -> None:
    """The hook of an architecture without anything of its own."""


@dataclass(frozen=True)
class Architecture:
    """One architecture. Names of modules are those inside `model.layers.<i>.` of transformers."""

    name: str  # general.architecture, which is also the prefix of its metadata keys
    #: target -> module, as PEFT adapters name it; targets of one module are fused in it, their rows in the order of LINEARS
    modules: Mapping[str, str]
    #: norms (parts of a layer) -> module
    norms: Mapping[str, str]
    #: routers and the targets of experts -> module, with {e} where each expert has its own; empty without experts
    experts: Mapping[str, str] = field(default_factory=dict)
    #: what config.json may leave out, with the value that transformers then takes
    defaults: Mapping[str, object] = field(default_factory=dict)
    #: flag of config.json -> parts that then have a bias
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: ModelSpec fields that are the same for every model
    constants: Mapping[str, Any] = field(default_factory=dict)
    #: config.json's names for the activation and the norm's epsilon
    activation_key: str = "hidden_act"
    epsilon_key: str = "rms_norm_eps"
    partial_rotary: bool = False
    #: layer type of config.json whose part of `rope_parameters` is the first rotation
    rope_section: str | None = None
    #: what comes before `embed_tokens`, `layers` and `norm` -> the head; the first that a folder has
    roots: Mapping[str, str] = field(default_factory=lambda: {"model.": "lm_head"})
    #: Hugging Face stores norm weights less this
    norm_offset: float = 0.0

    #: whether GGUF files hold q and k for rotation of pairs (2i, 2i + 1), with their rows in that order
    interleaved: bool = False
    #: whether GGUF files may hold experts
    gguf_experts: bool = False
    #: whether layers with experts have a shared one
    shared_expert: bool = False
    #: whether llama.cpp reads the tensors of rotary divisors
    rope_divisors: bool = False
    #: parts whose GGUF name is not the usual one of `tensors.GGUF`
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    #: parts that may have a bias in GGUF files, beside those of `biases`
    gguf_biases: tuple[str, ...] = ()
    #: every n-th layer has no window, 0: all have one; a GGUF that knows better has a key for it
    window_pattern: int = 0
    #: window where a GGUF does not say
    default_window: int = 0
    #: layers with a window have a rotation of their own, by this base if nothing is said, 0: by that of the others
    local_base: float | None = None

    from_config: Hook = _nothing
    from_metadata: Hook = _nothing
    #: keys that a GGUF has beside the usual ones, for a model as config.json describes it
    to_metadata: Callable[[ModelSpec], dict[str, object]] = lambda spec: {}

    def qk_permuted(self, source: str) -> bool:
        """Whether q and k rows are stored for interleaved rotation: in GGUF files of some architectures, never in folders."""
        return source == "gguf" and self.interleaved
