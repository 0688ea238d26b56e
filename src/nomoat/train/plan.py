"""What a training run will do and what it needs, before anything starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nomoat.engine.model import activation_budget
from nomoat.errors import InputError, ResourceError, printable
from nomoat.hub import fit
from nomoat.hub.fit import Machine
from nomoat.models.spec import COVERABLE, TARGETS, ModelSpec

#: (largest number of weights, learning rate): what LoRA of all linears at rank 16 learns best with when no probe is run.
DEFAULT_LEARNING_RATES = ((300e6, 1e-3), (1.5e9, 5e-4), (4e9, 3e-4), (math.inf, 2e-4))

MAX_STEPS = 10_000_000


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the numbers of a run (and, last, when to save). Checked when made: InputError E_LIMIT.

    targets             linears that the adapter covers, by name outside of experts, those of all experts by `experts`; by default
                        all that the model has outside of experts, whose adapters take far more memory (docs/concepts/adapters.md)
    warmup              fraction of all steps
    max_tokens          rows of one micro-batch; bounds the memory of activations
    context             longest example in tokens; None: what the model was trained for, at most 2,048
    validation          fraction of the rows held out, at most `validation_rows`; 0 keeps none
    evaluations         how often validation loss is measured in the run
    learning_rate       None: by probe where the run is long enough to pay for it, else by model size
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    epochs: int = 1
    max_steps: int | None = None
    batch_sequences: int = 16
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.03
    clip: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    seed: int = 0
    max_tokens: int = 768
    context: int | None = None
    validation: float = 0.05
    validation_rows: int = 100
    evaluations: int = 4
    precision: str = "bf16"
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        self._whole("rank", 1, 4096)
        self._whole("epochs", 1, 10_000)
        self._whole("batch_sequences", 1, 65_536)
        self._whole("max_tokens", 16, 1 << 20)
        self._whole("validation_rows", 0, 1 << 30)
        self._whole("evaluations", 1, 100_000)
        self._whole("seed", 0, (1 << 63) - 1)
        if self.max_steps is not None:
            self._whole("max_steps", 1, MAX_STEPS)
        if self.context is not None:
            self._whole("context", 2, 1 << 20)
        self._real("alpha", 0, 1e6, above=True)
        self._real("clip", 0, 1e6, above=True)
        self._real("eps", 0, 1, above=True)
        self._real("warmup", 0, 0.5)
        self._real("weight_decay", 0, 1)
        self._real("beta1", 0, 0.9999)
        self._real("beta2", 0, 0.999999)
        self._real("validation", 0, 0.5)
        self._real("checkpoint_seconds", 0, math.inf)
        if self.learning_rate is not None:
            self._real("learning_rate", 0, 1, above=True)
        self._one_of("schedule", ("linear", "cosine", "constant"))
        self._one_of("precision", ("bf16", "f32"))
        if not self.targets or len(set(self.targets)) != len(self.targets) or not set(self.targets) <= set(COVERABLE):
            shown = printable(", ".join(map(str, self.targets)))
            raise InputError(f"targets: {shown or 'none'}; choose one or more of {', '.join(COVERABLE)}", code="E_LIMIT")

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{name} is {value!r}; expected a whole number from {low} to {high}", code="E_LIMIT")

    def _real(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (above and value == low):  # NaN fails the comparison
            least = "above" if above else "at least"
            raise InputError(f"{name} is {value!r}; expected a number {least} {low:g} and at most {high:g}", code="E_LIMIT")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}", code="E_LIMIT")

    def check_model(self, spec: ModelSpec) -> None:
        """Raises InputError E_LIMIT where the options do not fit the model."""
        there = [target for target in COVERABLE if any(spec.places((target,)))]
        named = set(self.targets) - set(TARGETS) if set(TARGETS) <= set(self.targets) else self.targets
        absent = [target for target in named if target not in there]
        if absent:
            raise InputError(
                f"targets: an adapter of this model cannot cover {', '.join(absent)}; it can cover {', '.join(there)}",
                code="E_LIMIT",
            )
        shapes = [spec.linear_shape(target, layer) for layer, target in spec.places(self.targets)]
        smallest = min(map(min, shapes))
        if self.rank > smallest:
            raise InputError(f"rank is {self.rank}, but the narrowest adapted matrix of the model has {smallest}", code="E_LIMIT")
        if self.context is not None and self.context > spec.context:
            raise InputError(f"context is {self.context}; the model was trained for {spec.context} tokens", code="E_LIMIT")

    def identity(self) -> dict[str, Any]:
        """The options that decide numbers, as JSON values."""
        values = asdict(self)
        del values["checkpoint_seconds"]
        return values | {"targets": list(self.targets)}


def default_learning_rate(spec: ModelSpec) -> float:
    """Learning rate by size of the model, where no probe is run."""
    return next(rate for largest, rate in DEFAULT_LEARNING_RATES if spec.parameters() <= largest)


@dataclass(frozen=True)
class Plan:
    """Numbers of the run. `tokens` and `loss_tokens` are those of one epoch; bytes and seconds are estimates.

    `activation_bytes` may be kept for backward; `recompute`: what is beyond them is computed twice, with the same bits.
    """

    rows: int
    validation_rows: int
    steps: int
    steps_per_epoch: int
    tokens: int
    loss_tokens: int
    longest: int
    trainable: int
    memory_bytes: int
    activation_bytes: int
    recompute: bool
    disk_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, options: TrainOptions) -> str:
        """The plan in two lines."""
        held = f", {self.validation_rows:,} held out" if self.validation_rows else ""
        again = " (with layers computed twice)" if self.recompute else ""
        return (
            f"plan: {self.rows:,} rows to learn{held}; {self.steps:,} steps of {options.batch_sequences} rows; "
            f"rank {options.rank}, {self.trainable / 1e6:.1f} million trained weights\n"
            f"      about {fit.duration(self.seconds)} and {fit.gigabytes(self.memory_bytes)} of memory{again}, "
            f"at most {fit.gigabytes(self.disk_bytes)} of disk for checkpoints"
        )


def make_plan(
    options: TrainOptions,
    spec: ModelSpec,
    machine: Machine,
    *,
    rows: int,
    validation_rows: int,
    tokens: int,
    loss_tokens: int,
    longest: int,
    file_bytes: int,
) -> Plan:
    """Counts steps and estimates memory, disk and time. Raises InputError: E_LIMIT for too many steps, E_DATA for no rows."""
    options.check_model(spec)
    if rows < 1:
        raise InputError("no row is left to learn from; the report on the data says why rows were dropped", code="E_DATA")
    per_epoch = math.ceil(rows / options.batch_sequences)
    steps = min(per_epoch * options.epochs, options.max_steps or MAX_STEPS + 1)
    if steps > MAX_STEPS:
        raise InputError(f"{steps:,} steps are more than {MAX_STEPS:,}; use fewer epochs or larger batches", code="E_LIMIT")
    trainable = fit.adapter_parameters(spec, options.rank, options.targets)
    pack_rows = max(options.max_tokens, longest)
    # beside what `fit` counts: the best parameters so far
    least = 4 * trainable + fit.train_bytes(spec, file_bytes, pack_rows, trainable, recompute=True)
    wanted = 4 * trainable + fit.train_bytes(spec, file_bytes, pack_rows, trainable) - least
    budget = max(0, min(activation_budget(fit.weight_bytes(file_bytes)), int(machine.available * fit.MARGIN) - least))
    recompute = wanted > budget
    share = loss_tokens / max(1, tokens)
    active = fit.adapter_parameters(spec, options.rank, options.targets, active=True)
    flops = fit.train_flops_per_token(spec, active, length=max(1, tokens // rows), loss_share=share)
    speed = fit.TRAIN_EFFICIENCY * machine.bf16_flops / flops / (fit.RECOMPUTE_COST if recompute else 1)
    return Plan(
        rows=rows,
        validation_rows=validation_rows,
        steps=steps,
        steps_per_epoch=per_epoch,
        tokens=tokens,
        loss_tokens=loss_tokens,
        longest=longest,
        trainable=trainable,
        memory_bytes=least + min(wanted, budget),
        activation_bytes=budget,
        recompute=recompute,
        # two checkpoints and the one being written, each parameters, two moments and the best so far; the adapter itself
        disk_bytes=(3 * 4 + 1) * 4 * trainable,
        seconds=tokens / speed * steps / per_epoch,
    )


def check_resources(plan: Plan, options: TrainOptions, machine: Machine) -> None:
    """Raises ResourceError, saying what would fit, where memory or disk are too small."""
    limit = machine.available * fit.MARGIN
    if plan.memory_bytes > limit:
        smaller = "a smaller model"
        if options.max_tokens > 256 and plan.longest < options.max_tokens:
            smaller = f"--max-tokens {max(256, options.max_tokens // 2)}, or a smaller model"
        raise ResourceError(
            f"training needs about {fit.gigabytes(plan.memory_bytes)} of memory, and {fit.gigabytes(limit)} can be used. "
            f"Close other programs, or use {smaller}"
        )
    if plan.disk_bytes > machine.disk_free:
        raise ResourceError(
            f"checkpoints need about {fit.gigabytes(plan.disk_bytes)} of disk, and {fit.gigabytes(machine.disk_free)} are free. "
            f"Free some space, use a smaller --rank than {options.rank}, or set NOMOAT_HOME to another disk"
        )
