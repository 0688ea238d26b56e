"""A model in memory: packed weights, and the walk over its layers, forward and backward.

    tokens -> embedding rows -> [attention block -> MLP block] x L -> head -> logits or log-probabilities

A batch is rows of several segments, one segment a run of one sequence. Training records the same walk on a tape.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from nomoat import _native, settings
from nomoat.engine import kv
from nomoat.engine.kv import KV_TYPES, KvPool, KvType
from nomoat.engine.lora import TrainableLora, native_set
from nomoat.engine.stack import Stack
from nomoat.engine.weights import PackedTensor, Weights, load_weights, read_spec
from nomoat.errors import InputError, ModelError, NonFiniteError
from nomoat.files.gguf import open_gguf
from nomoat.models.spec import LINEARS, ModelSpec, layer_and_part
from nomoat.text.template import ChatTemplate, template_for
from nomoat.text.tokenizer import Tokenizer

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
#: Sequences, their next tokens, and the adapters that apply to these.
Segments = Sequence[tuple[kv.Sequence, Sequence[int], Stack | None]]

#: Rows of one step when nothing is recorded: enough for the int8 kernels' full speed, small enough to stay in cache.
FORWARD_ROWS = 256
#: A common beginning is taken apart where it saves at least so many rows.
MIN_SHARED_ROWS = 16
#: Activations of a training step that are kept rather than computed again, at least, in bytes: of SmolLM2-135M 768 rows.
ACTIVATION_BUDGET = 288 << 20


def activation_budget(weights: int) -> int:
    """The same for a model of so many bytes: as many as its weights take, if they are more."""
    return max(ACTIVATION_BUDGET, weights)


class Rows(Protocol):
    """Training rows (`nomoat.data.pack.Pack`)."""

    @property
    def tokens(self) -> Int32: ...
    @property
    def starts(self) -> Int32: ...
    @property
    def targets(self) -> Int32: ...
    @property
    def weights(self) -> Float32: ...


class Model:
    """A loaded model. One call at a time: the native engine owns one set of scratch memory."""

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        weights: Weights,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        kv_type: KvType = "bf16",
    ) -> None:
        self.path, self.spec, self.tokenizer, self.template = path, spec, tokenizer, template
        self.weights, self.kv_type = weights, kv_type
        self._engine = _build_engine(spec, weights)
        self._pools: dict[str, KvPool] = {}
        self._tapes: dict[str, _native.Tape] = {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        quantize: str = "Q8_0",
        context: int | None = None,
        kv_type: KvType = "bf16",
        progress: Callable[[int, int], None] | None = None,
        admit: Callable[[int], None] | None = None,
    ) -> Model:
        """Opens a GGUF file or a Hugging Face folder (quantized to `quantize`: Q8_0, Q4_K, none).

        `context` is how many tokens it will run with, by default all that it was trained for; see `spec_from_gguf`. `kv_type`
        is what keys and values are kept in: "int8" takes half the memory of "bf16" (docs/concepts/precision.md). `admit` is
        asked with the bytes of the packed weights before they are read.

        Raises InputError, ModelError, FileFormatError, NotFoundError, ResourceError, and what `admit` raises.
        """
        path = Path(path)
        if kv_type not in KV_TYPES:
            raise InputError(f"kv_type = {kv_type!r}; expected one of {', '.join(KV_TYPES)}")
        use_machine(threads)
        with _no_collection():
            spec = read_spec(path, context=context)
            weights = load_weights(path, spec, quantize=quantize, progress=progress, admit=admit)
            if path.is_dir():
                tokenizer = Tokenizer.from_folder(path)
                return cls(path, spec, weights, tokenizer, template_for(path, tokenizer), kv_type)
            with open_gguf(path) as file:
                tokenizer = Tokenizer.from_gguf(file)
                return cls(path, spec, weights, tokenizer, template_for(file, tokenizer), kv_type)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What an adapter remembers of its base: architecture, dimensions, vocabulary hash, exact file digest."""
        s = self.spec
        dimensions = {
            "layers": s.layers,
            "width": s.width,
            "heads": s.heads,
            "kv_heads": s.kv_heads,
            "head_dim": s.head_dim,
            "ffn": s.ffn,
            "vocab": s.vocab,
        }
        return {
            "architecture": s.architecture,
            "name": s.name,
            "dimensions": dimensions,
            "vocabulary": self.tokenizer.vocab_hash(),
            "digest": self.weights.digest,
        }

    # ---- forward -------------------------------------------------------------------------------------------------------

    def pool(self, precision: str = "int8") -> KvPool:
        """The key/value pages of a precision: float32 for "f32", the model's `kv_type` for "int8", else bf16."""
        if precision not in self._pools:
            type = "f32" if precision == "f32" else self.kv_type if precision == "int8" else "bf16"
            self._pools[precision] = KvPool(self._engine, type)
        return self._pools[precision]

    def step(self, segments: Segments, rows: Sequence[int], *, precision: str = "int8") -> Float32:
        """Runs new tokens of several sequences, appends them to the cache, returns logits [len(rows), vocab] of some rows.

        `segments` are (sequence, its next tokens, adapters), their tokens the rows, `rows` ascending. Raises InputError for a
        token id out of range or a context that is too long; then nothing has changed.
        """
        logits = np.empty((len(rows), _padded(self.spec.vocab)), np.float32)
        self._forward(segments, precision, rows, None, logits)
        return logits if logits.shape[1] == self.spec.vocab else logits[:, : self.spec.vocab]

    def _forward(
        self, segments: Segments, precision: str, read: Sequence[int], x: Float32 | None, logits: Float32 | None = None
    ) -> None:
        """Fills x [M, width padded to 32], right in the rows that are read, or logits [len(read), vocab padded to 32]."""
        pool = self.pool(precision)
        for sequence, tokens, _ in segments:
            if len(sequence.tokens) + len(tokens) > self.spec.context:
                raise InputError(
                    f"{len(sequence.tokens) + len(tokens):,} tokens exceed the model's context of {self.spec.context:,}",
                    code="E_LIMIT",
                )
        flat = [int(token) for _, tokens, _ in segments for token in tokens]
        if flat and not 0 <= min(flat) <= max(flat) < self.spec.vocab:
            raise InputError(f"token ids must be below {self.spec.vocab:,}; found {min(flat)} to {max(flat)}", code="E_LIMIT")
        for sequence, tokens, _ in segments:
            pool.grow(sequence, len(sequence.tokens) + len(tokens))
        loras = [native_set(stack, self.spec.layers) if stack is not None and stack.linears else None for _, _, stack in segments]
        batch = _native.Batch(
            [len(tokens) for _, tokens, _ in segments],
            [len(sequence.tokens) for sequence, _, _ in segments],
            [sequence.pages for sequence, _, _ in segments],
            # None is the base model, which the generated stub of a C++ vector of pointers cannot say
            cast(list[_native.LoraSet], loras),
            read=None if len(read) == len(flat) else read,
        )
        self._engine.forward(precision, flat, batch, pool.native, x, logits)
        for sequence, tokens, _ in segments:
            sequence.tokens += [int(token) for token in tokens]

    def next_logits(self, sequence: kv.Sequence, tokens: Sequence[int], stack: Stack | None = None) -> Float32:
        """Runs the next tokens of a sequence, however many; logits [vocab] of what follows them. Raises as `step`."""
        for begin in range(0, len(tokens), FORWARD_ROWS):
            part = tokens[begin : begin + FORWARD_ROWS]
            last = [len(part) - 1] if begin + len(part) == len(tokens) else []
            logits = self.step([(sequence, part, stack)], last)
        found: Float32 = logits[0]
        return found

    def logits(self, tokens: Sequence[int], *, stack: Stack | None = None, precision: str = "int8") -> Float32:
        """Logits [T, vocab] of one sequence."""
        sequence = kv.Sequence()
        parts = []
        try:
            for begin in range(0, len(tokens), FORWARD_ROWS):
                part = tokens[begin : begin + FORWARD_ROWS]
                parts.append(self.step([(sequence, part, stack)], range(len(part)), precision=precision))
        finally:
            self.pool(precision).cut(sequence, 0)
        return np.concatenate(parts)

    def logprobs(self, pack: Rows, *, stack: Stack | None = None, precision: str = "int8") -> Float32:
        """Log-probability of every weighted target, in row order. Raises NonFiniteError."""
        pool = self.pool(precision)
        found: list[Float32] = []
        bounds = pack.starts.tolist()
        for begin, end in itertools.pairwise(bounds):
            sequence = kv.Sequence()
            try:
                for at in range(begin, end, FORWARD_ROWS):
                    stop = min(at + FORWARD_ROWS, end)
                    rows = _weighted(pack, at, stop)
                    x = np.empty((stop - at, _padded(self.spec.width)), np.float32)
                    self._forward([(sequence, pack.tokens[at:stop].tolist(), stack)], precision, (rows - at).tolist(), x)
                    logp = np.empty(len(rows), np.float32)
                    if len(rows):
                        self._engine.logprobs(precision, x, rows - at, pack.targets[rows], logp)
                    found.append(logp)
            finally:
                pool.cut(sequence, 0)
        return _finite(np.concatenate(found))

    # ---- training ------------------------------------------------------------------------------------------------------

    def loss_gradients(
        self, pack: Rows, lora: TrainableLora, d_logp: Float32, *, precision: str = "bf16", budget: int | None = None
    ) -> Float32:
        """Log-probabilities of the weighted targets; adds sum_i d_logp[i] * d logp[i] / d parameter to `lora.gradients`.

        `d_logp` has one value for each row whose weight is not 0. Rows that all segments begin with, as a system prompt, are
        computed once: attention looks back only, so they are the same rows. Activations beyond `budget` bytes (by default those
        of `activation_budget`) are computed again, with the same bits. Raises NonFiniteError, then the gradients are not to be
        used.
        """
        tokens, lengths, positions, prefix, kept = _share_prefix(pack)
        weighted = _weighted(pack, 0, len(pack.tokens))
        rows = kept[weighted]
        pages = _page_tables(lengths, prefix)
        batch = _native.Batch(lengths, positions, pages, [lora.native] * len(lengths), prefix, rows.tolist())
        if budget is None:
            budget = activation_budget(sum(tensor.data.nbytes for tensor in self.weights.tensors.values()))
        tape = self._tape(precision, len(tokens), lora, budget)
        x = np.empty((len(tokens), _padded(self.spec.width)), np.float32)
        self._engine.embed(tokens.tolist(), x)
        for layer in range(self.spec.layers):
            self._engine.record_layer(layer, x, batch, tape)
        logp = np.empty(len(rows), np.float32)
        dx = np.zeros_like(x)
        self._engine.logprobs(precision, x, rows, pack.targets[weighted], logp, np.ascontiguousarray(d_logp, np.float32), dx)
        for layer in reversed(range(self.spec.layers)):
            self._engine.backward_layer(layer, dx, batch, tape, layer > 0)
        return _finite(logp)

    def _tape(self, precision: str, rows: int, lora: TrainableLora, budget: int) -> _native.Tape:
        tape = self._tapes.get(precision)
        if tape is None:
            tape = self._tapes[precision] = _native.Tape(self._engine, precision)
        left = budget
        for layer in reversed(range(self.spec.layers)):  # the last layers: what is kept longest is needed first
            ranks = lora.rank * sum(
                self.spec.experts_used if self.spec.experts_at(target, layer) else 1 for at, target in lora.places if at == layer
            )
            left -= rows * activation_bytes(self.spec, layer, ranks, precision)
            tape.keep(layer, left >= 0)
        return tape


def activation_bytes(spec: ModelSpec, layer: int, ranks: int, precision: str = "bf16") -> int:
    """Bytes that the tape keeps for one row of one layer whose adapters have `ranks` ranks in all."""
    block = spec.blocks[layer]
    post_norms = sum(f"blk.{layer}.{part}" in spec.tensors for part in ("attn_post_norm", "mlp_post_norm"))
    ffn = block.ffn * (2 if spec.gated else 1) * (spec.experts_used if block.experts else 1) + 2 * block.shared
    kept = (2 + post_norms) * spec.width + 2 * (block.heads + block.kv_heads) * spec.head_dim + ffn
    routing = -(-block.experts // 32) * 32 + spec.experts_used + bool(block.shared) if block.experts else 0
    return (2 if precision == "bf16" else 4) * kept + 4 * (block.heads + ranks + routing)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Vocabularies are hundreds of thousands of objects, none of them garbage: looking for cycles costs a tenth of a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def use_machine(threads: int | None) -> None:
    """Chooses the CPU level and the number of threads that the environment, or the caller, asks for. Raises InputError."""
    wanted = os.environ.get(settings.CPU_VARIABLE)
    if wanted:
        try:
            _native.set_level(wanted)
        except ValueError as error:
            raise InputError(f"{settings.CPU_VARIABLE}: {error}") from None
    _native.set_threads(threads or settings.threads())


def _build_engine(spec: ModelSpec, weights: Weights) -> _native.Engine:
    """The native engine with its rotations, layers and weights, which `weights` keeps alive. Raises ModelError."""
    try:
        engine = _native.Engine(
            layers=spec.layers,
            width=spec.width,
            head_dim=spec.head_dim,
            vocab=spec.vocab,
            context=spec.context,
            eps=spec.norm_eps,
            layer_norm=spec.norm == "layer",
            gelu=spec.activation == "gelu",
            gated=spec.gated,
            qk_norm=("none", "head", "row").index(spec.qk_norm),
            score_scale=spec.score_scale,
            score_cap=spec.score_cap,
            logit_cap=spec.logit_cap,
            logit_scale=spec.logit_scale,
            embed_scale=spec.embed_scale,
            residual_scale=spec.residual_scale,
            experts_used=spec.experts_used,
            expert_norm=spec.expert_norm,
        )
        for rope in spec.ropes:
            engine.add_rope(rope.interleaved, np.ascontiguousarray(rope.inv_freq, np.float32), rope.magnitude)
        for layer, block in enumerate(spec.blocks):
            engine.set_layer(
                layer,
                heads=block.heads,
                kv_heads=block.kv_heads,
                ffn=block.ffn,
                window=block.window,
                rope=-1 if block.rope is None else block.rope,
                experts=block.experts,
                shared=block.shared,
            )
        for name, tensor in weights.tensors.items():
            _set_weight(engine, name, tensor)
        if spec.tied_head:
            embed = weights.tensors["embed"]
            engine.set_table(True, embed.format, embed.data)
    except ValueError as error:
        raise ModelError(f"{spec.name}: {error}", code="E_SHAPE") from None
    return engine


def _set_weight(engine: _native.Engine, name: str, tensor: PackedTensor) -> None:
    """Hands one weight to the engine, by its engine name."""
    layer, part = layer_and_part(name)
    if name in ("embed", "head"):
        engine.set_table(name == "head", tensor.format, tensor.data)
    elif part in LINEARS:
        engine.set_linear(layer, LINEARS.index(part), tensor.format, tensor.data)
    elif part == "router":
        engine.set_router(layer, tensor.format, tensor.data)
    else:
        engine.set_vector(layer, part, tensor.data.view(np.float32))


def _share_prefix(pack: Rows) -> tuple[Int32, list[int], list[int], int, Int32]:
    """Rows of a pack with the common beginning of its segments taken once, as a segment of its own in front of them.

    Returns tokens, rows of each segment, position of each segment, rows of the prefix (0: none), and for every row of the
    pack its new row. No row of the prefix carries loss, since what follows it differs.
    """
    bounds = pack.starts.tolist()
    spans = list(itertools.pairwise(bounds))
    first = pack.tokens[spans[0][0] : spans[0][1]]
    prefix = len(first)
    for begin, end in spans:
        own = pack.tokens[begin:end]
        length = min(prefix, len(own))
        differs = np.flatnonzero(own[:length] != first[:length])
        weighted = np.flatnonzero(pack.weights[begin:end])
        prefix = min(length, *differs[:1].tolist(), *weighted[:1].tolist())
    if len(spans) < 2 or prefix * (len(spans) - 1) < MIN_SHARED_ROWS:
        kept = np.arange(len(pack.tokens), dtype=np.int32)
        return np.ascontiguousarray(pack.tokens, np.int32), [end - begin for begin, end in spans], [0] * len(spans), 0, kept
    tokens = np.concatenate([first[:prefix], *(pack.tokens[begin + prefix : end] for begin, end in spans)]).astype(np.int32)
    lengths = [prefix, *(end - begin - prefix for begin, end in spans)]
    kept = np.zeros(len(pack.tokens), np.int32)
    row = prefix
    for begin, end in spans:
        kept[begin : begin + prefix] = np.arange(prefix)
        kept[begin + prefix : end] = np.arange(row, row + end - begin - prefix)
        row += end - begin - prefix
    return tokens, lengths, [0, *[prefix] * len(spans)], prefix, kept


def _page_tables(lengths: list[int], prefix: int) -> list[list[int]]:
    """Cache pages for the segments of a training step, the whole pages of a prefix shared by all."""
    tables: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        shared = tables[0][: prefix // kv.PAGE_TOKENS] if prefix and index else []
        reach = length + (prefix if index else 0)
        count = -(-reach // kv.PAGE_TOKENS) - len(shared)
        tables.append([*shared, *range(used, used + count)])
        used += count
    return tables


def _weighted(pack: Rows, begin: int, end: int) -> Int32:
    return (np.flatnonzero(pack.weights[begin:end]) + begin).astype(np.int32)


def _finite(logp: Float32) -> Float32:
    if not np.isfinite(logp).all():
        raise NonFiniteError(f"{int((~np.isfinite(logp)).sum())} of {len(logp)} log-probabilities are NaN or infinite")
    return logp


def _padded(count: int) -> int:
    return -(-count // 32) * 32
