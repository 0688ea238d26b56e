"""Options out of range are refused at the start; a plan counts steps and refuses what cannot fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomoat.errors import InputError, ResourceError
from nomoat.train.plan import TrainOptions, check_resources, default_learning_rate, make_plan
from toy import toy_spec

COUNTS = {"rows": 100, "validation_rows": 5, "tokens": 3200, "loss_tokens": 500, "longest": 40, "weight_bytes": 1 << 20}


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
        make_plan(TrainOptions(rank=64), toy_spec(), **COUNTS)
    with pytest.raises(InputError, match="context is 100"):
        make_plan(TrainOptions(rank=2, context=100), toy_spec(), **COUNTS)


def test_plan_counts() -> None:
    spec = toy_spec()
    plan = make_plan(TrainOptions(rank=2, epochs=3), spec, **COUNTS)
    assert (plan.steps_per_epoch, plan.steps) == (7, 21)
    assert plan.trainable == 2 * 2 * sum(n + k for n, k in map(spec.linear_shape, TrainOptions().targets))
    assert make_plan(TrainOptions(rank=2, max_steps=4), spec, **COUNTS).steps == 4
    larger = make_plan(TrainOptions(rank=4, max_tokens=4096), spec, **COUNTS)
    assert larger.memory_bytes > plan.memory_bytes
    assert larger.disk_bytes == 2 * plan.disk_bytes
    with pytest.raises(InputError, match="no row"):
        make_plan(TrainOptions(rank=2), spec, **{**COUNTS, "rows": 0})
    with pytest.raises(InputError, match="steps"):
        make_plan(TrainOptions(rank=2, epochs=10_000, batch_sequences=1), spec, **{**COUNTS, "rows": 10_000})


def test_too_little_memory_or_disk_is_refused_with_numbers(tmp_path: Path) -> None:
    options = TrainOptions(rank=2)
    plan = make_plan(options, toy_spec(), **COUNTS)
    check_resources(plan, options, tmp_path / "not" / "yet", available=1 << 40)
    with pytest.raises(ResourceError, match=r"MiB of memory, and 1 MiB are free.*--max-tokens 512"):
        check_resources(plan, options, tmp_path, available=1 << 20)
    with pytest.raises(ResourceError, match="checkpoints need"):
        check_resources(replace(plan, disk_bytes=1 << 62), options, tmp_path, available=1 << 40)


def test_learning_rate_falls_with_size() -> None:
    small = toy_spec()
    large = replace(small, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128_256)
    assert default_learning_rate(small) > default_learning_rate(large) > 0
