"""What an architecture file produces: everything the engine needs to know about a model, as data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

#: The linears of one layer that an adapter may target, by the names a user knows, in the order used everywhere.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
#: Those of an expert that every row goes through, which a user asks for as gate, up and down.
SHARED_TARGETS = ("shared_gate", "shared_up", "shared_down")
#: All linears of one layer, in the order of the native engine.
LINEARS = (*TARGETS, *SHARED_TARGETS)
#: Those that exist once for each expert where a layer has experts.
EXPERT_TARGETS = ("gate", "up", "down")
#: What an adapter may be asked to cover: the linears outside of experts by name, and those of all experts.
EXPERTS = "experts"
COVERABLE = (*TARGETS, EXPERTS)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) with its scaling already folded into the frequencies.

    `inv_freq[i]` is the angle per position of pair i, float32 [dim / 2]. `interleaved` pairs (2i, 2i+1), as GGUF files of
    architecture `llama` store q and k; otherwise pairs are (i, i + dim / 2), as Hugging Face does.
    """

    dim: int
    interleaved: bool
    inv_freq: npt.NDArray[np.float32]
    magnitude: float = 1.0  # cos and sin are multiplied by it (yarn, longrope)


@dataclass(frozen=True)
class LayerSpec:
    """What a layer has of its own. H = heads, K = kv_heads, F = ffn (of one expert, where there are experts)."""

    heads: int
    kv_heads: int
    ffn: int
    window: int = 0  # keys that a row sees, its own included; 0 = all
    rope: int | None = 0  # index into ModelSpec.ropes; None = positions are not encoded
    experts: int = 0  # 0 = one dense MLP
    shared: int = 0  # width of the expert that every row goes through beside those; 0 = there is none


@dataclass(frozen=True)
class Source:
    """Where a weight comes from: whole tensors of the source file one after another, or some rows of a single one.

    `one_row`: a vector that the file has as a matrix of one row, as Hugging Face does where a linear has one output.
    `add` is added to every value: Hugging Face stores Gemma's norm weights less one, GGUF as they are.
    """

    names: tuple[str, ...]
    first: int = 0
    rows: int | None = None
    add: float = 0.0
    one_row: bool = False


def layer_and_part(engine_name: str) -> tuple[int, str]:
    """(3, "q") of "blk.3.q"; (-1, the name) of what belongs to no layer."""
    if not engine_name.startswith("blk."):
        return -1, engine_name
    _, index, part = engine_name.split(".")
    return int(index), part


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions: D = width, d = head_dim, V = vocab, L = layers; those that layers may differ in are in `blocks`.

    One layer, where [..] is there if its weight is, s = score_scale, and caps and scales do nothing by default:

        h = [norm](x)                 q, k, v = Wq h [+ b], Wk h [+ b], Wv h [+ b]       q, k = rope([norm](q), [norm](k))
        a = softmax(cap(s q k^T)) v   x += residual_scale * [post_norm](Wo a [+ b])
        h = [norm](x)                 x += residual_scale * [post_norm](Wdown (act(Wgate h [+ b]) * (Wup h [+ b])) [+ b])  (gated)
                                      x += residual_scale * [post_norm](Wdown act(Wup h [+ b]) [+ b])       (not gated)
                                      x += sum over the experts_used best of p_e * MLP_e(h), p = softmax(router h)   (experts)
                                           [+ sigmoid(shared_router . h) * MLP_shared(h)]
        logits = cap(logit_scale * Whead norm(x)), x of the first layer = embed_scale * embedding rows, cap(z) = c tanh(z / c)
    """

    architecture: str
    name: str
    width: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    tied_head: bool
    blocks: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu"] = "silu"  # gelu: the tanh form
    gated: bool = True
    qk_norm: Literal["none", "head", "row"] = "none"  # over the d values of a head, or over all heads of a row
    score_scale: float | None = None  # None: 1 / sqrt(d)
    score_cap: float = 0.0  # 0: none
    logit_cap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    experts_used: int = 0
    expert_norm: bool = True  # the weights of the experts used are divided by their sum
    #: engine name -> source: "embed", "head", "final_norm[_bias]", and for layer i "blk.i." + one of LINEARS, "q_bias",
    #: "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias", "attn_norm[_bias]", "attn_post_norm", "q_norm",
    #: "k_norm", "mlp_norm[_bias]", "mlp_post_norm", "router", "shared_router"
    tensors: dict[str, Source] = field(default_factory=dict)
    #: sentences for the user: unused tensors, a context that was shortened
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def heads(self) -> int:
        """Query heads, of the layer that has most."""
        return max(block.heads for block in self.blocks)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, of the layer that has most."""
        return max(block.kv_heads for block in self.blocks)

    @property
    def ffn(self) -> int:
        """Width of the MLP (of one expert), of the layer where it is widest."""
        return max(block.ffn for block in self.blocks)

    def targets(self, layer: int) -> tuple[str, ...]:
        """The linears of a layer, all of which an adapter can cover."""
        block = self.blocks[layer]
        usual = TARGETS if self.gated or block.experts else tuple(target for target in TARGETS if target != "gate")
        return (*usual, *SHARED_TARGETS) if block.shared else usual

    def places(self, wanted: Collection[str] = COVERABLE) -> Iterator[tuple[int, str]]:
        """(layer, target) of every linear that an adapter of `wanted` (of COVERABLE) covers, in the order used everywhere."""
        for layer in range(self.layers):
            for target in self.targets(layer):
                if (EXPERTS if self.experts_at(target, layer) else target.removeprefix("shared_")) in wanted:
                    yield layer, target

    def experts_at(self, target: str, layer: int) -> int:
        """How many experts have this linear; 0 where it is one of the layer."""
        return self.blocks[layer].experts if target in EXPERT_TARGETS else 0

    def linear_shape(self, target: str, layer: int = 0) -> tuple[int, int]:
        """(rows N, columns K) of a target's weight (of one expert): y[N] = W[N, K] x[K]."""
        block = self.blocks[layer]
        q, kv = block.heads * self.head_dim, block.kv_heads * self.head_dim
        shapes = {
            "q": (q, self.width),
            "k": (kv, self.width),
            "v": (kv, self.width),
            "o": (self.width, q),
            "gate": (block.ffn, self.width),
            "up": (block.ffn, self.width),
            "down": (self.width, block.ffn),
            "shared_gate": (block.shared, self.width),
            "shared_up": (block.shared, self.width),
            "shared_down": (self.width, block.shared),
        }
        return shapes[target]

    def tensor_shape(self, engine_name: str) -> tuple[int, ...]:
        """Shape of a weight by engine name, rows first. Weights of experts are [experts, N, K], vectors [N]."""
        if engine_name in ("embed", "head"):
            return (self.vocab, self.width)
        layer, part = layer_and_part(engine_name)
        if layer < 0:
            return (self.width,)
        block = self.blocks[layer]
        if part in LINEARS:
            shape = self.linear_shape(part, layer)
            return (block.experts, *shape) if self.experts_at(part, layer) else shape
        if part == "router":
            return (block.experts, self.width)
        if part in ("q_norm", "k_norm"):
            return (self.head_dim,) if self.qk_norm == "head" else (self.linear_shape(part[0], layer)[0],)
        target = part.removesuffix("_bias")
        return (self.linear_shape(target, layer)[0],) if target in TARGETS else (self.width,)

    def parameters(self) -> int:
        """Weights in all matrices (norms, biases and routers left out): what decides size."""
        return self._tables() + self._linears(lambda block: block.experts)

    def active_parameters(self) -> int:
        """Those that one token is multiplied with, which decides speed: of experts only the ones used."""
        return self._tables() + self.active_linears()

    def active_linears(self) -> int:
        """Those of them in the layers: without embedding and head."""
        return self._linears(lambda block: min(self.experts_used, block.experts))

    def _tables(self) -> int:
        return (1 if self.tied_head else 2) * self.vocab * self.width

    def _linears(self, experts: Callable[[LayerSpec], int]) -> int:
        found = 0
        for layer, block in enumerate(self.blocks):
            for target in self.targets(layer):
                rows, columns = self.linear_shape(target, layer)
                found += rows * columns * (experts(block) if self.experts_at(target, layer) else 1)
        return found
