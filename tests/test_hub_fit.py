"""The memory model, and what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nomoat import memory
from nomoat.errors import ResourceError
from nomoat.hub import fit
from nomoat.hub.fit import Machine, estimate
from nomoat.models.spec import LayerSpec, ModelSpec, RopeSpec

MACHINE = Machine(
    memory=16 * 10**9,
    available=10 * 10**9,
    disk_free=50 * 10**9,
    threads=2,
    bf16_flops=0.75e12,
    read_bandwidth=40e9,
)


def spec(**change: object) -> ModelSpec:
    """The dimensions of SmolLM2-135M."""
    smollm2 = ModelSpec(
        architecture="llama",
        name="smollm2",
        width=576,
        head_dim=64,
        vocab=49152,
        context=8192,
        norm_eps=1e-5,
        tied_head=True,
        blocks=(LayerSpec(9, 3, 1536),) * 30,
        ropes=(RopeSpec(64, True, np.ones(32, np.float32)),),
    )
    return dataclasses.replace(smollm2, **change)  # type: ignore[arg-type]


BIG = spec(blocks=(LayerSpec(32, 8, 14336),) * 32, width=4096, head_dim=128, vocab=128256)


def test_figures_that_can_be_counted_by_hand() -> None:
    assert fit.kv_bytes_per_token(spec()) == 2 * 2 * 30 * 3 * 64
    assert fit.kv_bytes_per_token(spec(), "int8") == 2 * 30 * 3 * (64 + 4)
    per_layer = 2 * (576 + 576) + 2 * (192 + 576) + 3 * (576 + 1536)  # rows + columns of the seven linears
    assert fit.adapter_parameters(spec(), 16) == 30 * 16 * per_layer
    assert fit.adapter_parameters(spec(), 8, ["q"]) == 30 * 8 * (576 + 576)
    assert fit.weight_bytes(100) == 103


def test_recomputing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    whole, least = (fit.activation_bytes_per_token(spec(), recompute=recompute) for recompute in (False, True))
    one = whole // 30
    assert whole == 30 * one
    assert least == one + 29 * 4 * 576
    single = spec(blocks=(LayerSpec(9, 3, 1536),))
    assert fit.activation_bytes_per_token(single) == fit.activation_bytes_per_token(single, recompute=True)


def experts() -> ModelSpec:
    """Two layers with 8 experts of width 128, of which 2 are used, behind one with an MLP of width 512."""
    blocks = (LayerSpec(9, 3, 512), LayerSpec(9, 3, 128, experts=8), LayerSpec(9, 3, 128, experts=8))
    return spec(blocks=blocks, experts_used=2)


def test_of_experts_those_used_are_computed_and_all_are_stored() -> None:
    attention = 2 * (576 * 576 + 192 * 576)
    dense, expert, table = 3 * 512 * 576, 3 * 128 * 576, 49152 * 576
    assert experts().parameters() == 3 * attention + dense + 2 * 8 * expert + table
    assert experts().active_parameters() == 3 * attention + dense + 2 * 2 * expert + table
    assert fit.train_flops_per_token(experts(), 0, length=0) == 4 * experts().active_parameters()
    per_layer = 2 * (576 + 576) + 2 * (192 + 576)
    assert fit.adapter_parameters(experts(), 16) == 16 * (3 * per_layer + 3 * (576 + 512))  # none on experts
    kept = [2 * (2 * 576 + 2 * 576 + 2 * 192 + 3 * ffn) + 8 * 576 for ffn in (512, 2 * 128, 2 * 128)]
    assert fit.activation_bytes_per_token(experts()) == sum(kept)
    assert fit.activation_bytes_per_token(experts(), recompute=True) == kept[0] + 2 * 4 * 576
    assert fit.weight_bytes(10**9) == estimate(experts(), 10**9, MACHINE).weights_bytes  # all have to be there
    share = experts().active_parameters() / experts().parameters()
    dense_speed = estimate(spec(), 10**9, MACHINE).decode_tokens_per_second
    assert estimate(experts(), 10**9, MACHINE).decode_tokens_per_second == pytest.approx(dense_speed / share)


def test_a_shared_expert_is_computed_for_every_token() -> None:
    plain, width = experts(), 256
    beside = dataclasses.replace(
        plain, blocks=tuple(dataclasses.replace(block, shared=width if block.experts else 0) for block in plain.blocks)
    )
    assert beside.parameters() - plain.parameters() == 2 * 3 * width * 576
    assert beside.active_parameters() - plain.active_parameters() == 2 * 3 * width * 576
    assert fit.adapter_parameters(beside, 16) - fit.adapter_parameters(plain, 16) == 16 * 2 * 3 * (576 + width)
    assert fit.adapter_parameters(beside, 16, ("experts",)) == fit.adapter_parameters(plain, 16, ("experts",))
    assert fit.activation_bytes_per_token(beside) - fit.activation_bytes_per_token(plain) == 2 * 2 * 3 * width


@pytest.mark.parametrize("larger", [False, True])
def test_weights_beyond_memory_are_refused_unless_asked_for(larger: bool) -> None:
    assert fit.check_weights(10 * 10**9, MACHINE, larger_than_memory=larger) is None  # what is free is enough
    slow = fit.check_weights(10 * 10**9 + 1, MACHINE, larger_than_memory=larger)
    assert slow is not None
    assert slow.startswith("the packed weights take 10.00 GB, and 10.00 GB of 16.00 GB of memory are free")
    most = MACHINE.memory - (2 << 30)
    assert fit.check_weights(most, MACHINE, larger_than_memory=larger)
    if larger:
        slow = fit.check_weights(most + 1, MACHINE, larger_than_memory=True)
        assert slow is not None
        assert "take 13.85 GB; this machine has 16.00 GB of memory, of which 2.15 GB are kept" in slow
        return
    with pytest.raises(ResourceError, match=r"13\.85 GB; this machine has 16\.00 GB .*--larger-than-memory") as fault:
        fit.check_weights(most + 1, MACHINE)
    assert fault.value.exit_code == 3


def test_training_work_is_four_flops_a_weight() -> None:
    """2 forward and 2 for dX, no gradient of frozen weights; the head counts where tokens carry loss."""
    matrices = spec().parameters()
    assert fit.train_flops_per_token(spec(), 0, length=0) == 4 * matrices
    assert fit.train_flops_per_token(spec(), 0, length=0, loss_share=0) == 4 * (matrices - 49152 * 576)
    assert fit.train_flops_per_token(spec(), 1000, length=0) == 4 * matrices + 6000
    longer = fit.train_flops_per_token(spec(), 0, length=512) - fit.train_flops_per_token(spec(), 0, length=256)
    assert longer == 7 * 30 * 576 * 256


def test_a_small_model_fits() -> None:
    result = estimate(spec(), 98_362_432, MACHINE, data_tokens=96_000, epochs=2)
    assert result.chat_fits
    assert result.train_fits
    assert result.disk_fits
    assert not result.recompute
    assert result.train_seconds == pytest.approx(2 * 96_000 / result.train_tokens_per_second)
    assert "Chat fits" in result.verdict
    assert "Training fits" in result.verdict
    assert fit.duration(result.train_seconds or 0) in result.verdict


def test_layers_are_recomputed_before_anything_is_refused() -> None:
    tight = dataclasses.replace(MACHINE, available=1_000_000_000)
    result = estimate(spec(), 98_362_432, tight)
    assert result.train_fits
    assert result.recompute
    assert "by recomputing" in result.verdict
    assert result.train_tokens_per_second < estimate(spec(), 98_362_432, MACHINE).train_tokens_per_second
    assert result.train_bytes < 1_000_000_000 < fit.train_bytes(spec(), 98_362_432, 2048, result.adapter_parameters)


def test_what_does_not_fit_comes_with_a_way_out() -> None:
    result = estimate(BIG, 8 * 10**9, MACHINE, batch_tokens=16_384)
    assert result.chat_fits
    assert not result.train_fits
    assert "--batch-tokens" in result.verdict
    assert estimate(BIG, 8 * 10**9, MACHINE, batch_tokens=128, rank=4).train_fits
    assert "Chat does not fit" in estimate(BIG, 16 * 10**9, MACHINE).verdict
    full = dataclasses.replace(MACHINE, disk_free=10**9)
    assert "disk is too full" in estimate(BIG, 8 * 10**9, full).verdict


@pytest.mark.parametrize("change", ["context", "batch_tokens", "rank"])
def test_more_costs_more(change: str) -> None:
    few, many = (estimate(spec(), 10**8, MACHINE, **{change: value}) for value in (64, 128))  # type: ignore[arg-type]
    assert few.chat_bytes + few.train_bytes < many.chat_bytes + many.train_bytes


def test_context_defaults_to_the_models_but_not_beyond_4096() -> None:
    assert estimate(spec(), 10**8, MACHINE).context == 4096
    assert estimate(spec(context=512), 10**8, MACHINE).context == 512


def test_this_machine_is_measured(tmp_path: Path) -> None:
    machine = fit.this_machine(tmp_path / "not" / "yet", 2)
    assert 0 < machine.available <= machine.memory
    assert 1e9 < machine.bf16_flops < 1e16
    assert 1e8 < machine.read_bandwidth < 1e13
    assert machine.disk_free > 0


def test_memory_limits_of_containers_count(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\nfile 500000\n")
    assert memory._container_memory(tmp_path) == (1_000_000, 100_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_memory(tmp_path)[0] > 10**18
    assert memory._container_memory(tmp_path / "none")[1] == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (6_000, "1 h 40 min"), (360_000, "100 h 0 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert fit.duration(seconds) == text


def test_sizes() -> None:
    assert fit.gigabytes(98_362_432) == "98.4 MB"
    assert fit.gigabytes(4.2e9) == "4.20 GB"
