"""Options out of range are refused at the start; a plan counts steps and refuses what cannot fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import ACTIVATION_BUDGET
from nomoat.errors import InputError, ResourceError
from nomoat.hub import fit
from nomoat.hub.fit import Machine
from nomoat.models.spec import TARGETS, LayerSpec
from nomoat.train.plan import TrainOptions, check_resources, default_learning_rate, make_plan
from toy import toy_spec

COUNTS = {"rows": 100, "validation_rows": 5, "tokens": 3200, "loss_tokens": 500, "longest": 40, "file_bytes": 1 << 20}
MACHINE = Machine(memory=1 << 40, available=1 << 40, disk_free=1 << 40, threads=2, bf16_flops=1e12, read_bandwidth=1e10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("learning_rate", 1e10),
        ("learning_rate", "1e-4"),
        ("batch_sequences", 0),
        ("batch_sequences", 2.0),
        ("rank", 0),
        ("rank", True),
        ("rank", 1 << 31),
        ("alpha", float("inf")),
        ("alpha", 0),
        ("epochs", -1),
        ("max_steps", 1 << 63),
        ("warmup", 1.5),
        ("clip", 0.0),
        ("seed", -1),
        ("targets", ()),
        ("targets", ("q", "q")),
        ("targets", ("q", "lm_head")),
        ("schedule", "polynomial"),
        ("validation", 1.0),
        ("max_tokens", 0),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name) as caught:
        TrainOptions(**{name: value})
    assert caught.value.code == "E_LIMIT"


def test_rank_and_context_must_fit_the_model() -> None:
    with pytest.raises(InputError, match="rank is 64"):
        make_plan(TrainOptions(rank=64), toy_spec(), MACHINE, **COUNTS)
    with pytest.raises(InputError, match="context is 100"):
        make_plan(TrainOptions(rank=2, context=100), toy_spec(), MACHINE, **COUNTS)


def test_plan_counts() -> None:
    spec = toy_spec()
    plan = make_plan(TrainOptions(rank=2, epochs=3), spec, MACHINE, **COUNTS)
    assert (plan.steps_per_epoch, plan.steps) == (7, 21)
    assert plan.trainable == 2 * 2 * sum(n + k for n, k in map(spec.linear_shape, TrainOptions().targets))
    assert make_plan(TrainOptions(rank=2, max_steps=4), spec, MACHINE, **COUNTS).steps == 4
    larger = make_plan(TrainOptions(rank=4, max_tokens=4096), spec, MACHINE, **COUNTS)
    assert larger.memory_bytes > plan.memory_bytes
    assert larger.disk_bytes == 2 * plan.disk_bytes
    with pytest.raises(InputError, match="no row"):
        make_plan(TrainOptions(rank=2), spec, MACHINE, **{**COUNTS, "rows": 0})
    with pytest.raises(InputError, match="steps"):
        make_plan(TrainOptions(rank=2, epochs=10_000, batch_sequences=1), spec, MACHINE, **{**COUNTS, "rows": 10_000})


def test_time_grows_with_epochs_and_memory_is_saved_by_computing_twice() -> None:
    spec = toy_spec()
    plan = make_plan(TrainOptions(rank=2), spec, MACHINE, **COUNTS)
    assert make_plan(TrainOptions(rank=2, epochs=2), spec, MACHINE, **COUNTS).seconds == pytest.approx(2 * plan.seconds)
    assert not plan.recompute
    tight = make_plan(TrainOptions(rank=2), spec, replace(MACHINE, available=plan.memory_bytes), **COUNTS)
    assert tight.recompute
    assert tight.memory_bytes < plan.memory_bytes
    assert "7 steps of 16 rows" in plan.text(TrainOptions(rank=2))


def test_too_little_memory_or_disk_is_refused_with_numbers() -> None:
    options = TrainOptions(rank=2)
    plan = make_plan(options, toy_spec(), MACHINE, **COUNTS)
    check_resources(plan, options, MACHINE)
    with pytest.raises(ResourceError, match=r"of memory, and 0\.9 MB can be used.*--max-tokens 384"):
        check_resources(plan, options, replace(MACHINE, available=10**6))
    with pytest.raises(ResourceError, match=r"of disk, and 0\.0 MB are free"):
        check_resources(plan, options, replace(MACHINE, disk_free=1000))


def test_learning_rate_falls_with_size() -> None:
    small = toy_spec()
    large = replace(small, blocks=(LayerSpec(32, 8, 14336),) * 32, width=4096, head_dim=128, vocab=128_256)
    assert default_learning_rate(small) > default_learning_rate(large) > 0


def test_targets_that_a_model_has() -> None:
    """All means all that there are; one that is named must be there."""
    plain = replace(toy_spec(), gated=False)
    mixture = replace(toy_spec(), blocks=(replace(toy_spec().blocks[0], experts=4),) * 2, experts_used=2)
    mixed = replace(mixture, blocks=(mixture.blocks[0], toy_spec().blocks[0]))
    for spec, absent in ((plain, ("gate",)), (mixture, ("gate", "up", "down")), (mixed, ())):
        TrainOptions(rank=2).check_model(spec)
        lora = TrainableLora(spec, rank=2)
        assert lora.targets == tuple(target for target in TARGETS if target not in absent)
        assert lora.to_adapter().places() == list(spec.places(TARGETS))
        lora.to_adapter().check(spec)
        plan = make_plan(TrainOptions(rank=2), spec, MACHINE, **COUNTS)
        assert plan.trainable == sum(parameter.size for parameter in lora.parameters)
        for target in absent:
            with pytest.raises(InputError, match=f"cannot cover {target}; it can cover q, k, v, o, "):
                TrainOptions(rank=2, targets=("q", target)).check_model(spec)
            with pytest.raises(InputError, match="the model has none of them"):
                TrainableLora(spec, rank=2, targets=(target,))
    assert [place for place in mixed.places(TARGETS) if place[0] == 0] == [(0, target) for target in "qkvo"]
    with pytest.raises(InputError, match="cannot cover experts; it can cover q"):
        TrainOptions(rank=2, targets=(*TARGETS, "experts")).check_model(plain)


def test_experts_that_are_asked_for_are_counted() -> None:
    """All of them as memory, those that a token uses as work."""
    dense = toy_spec()
    spec = replace(dense, blocks=(replace(dense.blocks[0], experts=4), dense.blocks[0]), experts_used=2)
    mlp = sum(sum(spec.linear_shape(target)) for target in ("gate", "up", "down"))
    options = TrainOptions(rank=2, targets=(*TARGETS, "experts"))
    plan, plain = (make_plan(some, spec, MACHINE, **COUNTS) for some in (options, TrainOptions(rank=2)))
    assert plan.trainable == plain.trainable + 4 * 2 * mlp
    assert plan.trainable == sum(parameter.size for parameter in TrainableLora(spec, rank=2, targets=options.targets).parameters)
    assert plan.memory_bytes == plain.memory_bytes + (fit.ADAPTER_STATE + 4) * 4 * 2 * mlp
    active = fit.adapter_parameters(spec, 2, options.targets, active=True)
    assert active == fit.adapter_parameters(spec, 2) + 2 * 2 * mlp
    assert plan.seconds > plain.seconds


def test_a_large_model_keeps_more_activations() -> None:
    """Beside weights of gigabytes, computing layers twice saves little memory for a tenth of the time."""
    options = TrainOptions(rank=2)
    small, large = (
        make_plan(options, toy_spec(), MACHINE, **{**COUNTS, "file_bytes": size}) for size in (10**6, 2 * ACTIVATION_BUDGET)
    )
    assert (small.activation_bytes, large.activation_bytes) == (ACTIVATION_BUDGET, int(2.06 * ACTIVATION_BUDGET))
