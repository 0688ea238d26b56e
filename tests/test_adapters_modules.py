"""Adapters of models whose modules are not Llama's: several targets in one, other names, one for each expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_side import adapter_of
from golden.make_transformers_configs import FILE
from nomoat.adapters.convert.peft import from_peft, parse_config, to_peft
from nomoat.adapters.package import CONFIG, WEIGHTS, load_adapter, save_adapter
from nomoat.engine.stack import Adapter, Float32
from nomoat.errors import AdapterError
from nomoat.files.safetensors import write_safetensors
from nomoat.models import spec_from_hf
from nomoat.models.spec import ModelSpec
from reference import random_lora

GOLDEN: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
PHI3 = spec_from_hf(GOLDEN["phi3"]["config"], None, name="phi3")
RANK, ALPHA = 4, 6.0
STEM = "base_model.model.model.layers."


def random_adapter(spec: ModelSpec, targets: tuple[str, ...], layers: tuple[int, ...] = (0, 1)) -> Adapter:
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in layers:
        for target in targets:
            rows, columns = spec.linear_shape(target, layer)
            a, b = rng.standard_normal((RANK, columns)), rng.standard_normal((rows, RANK))
            tensors[layer, target] = (a.astype(np.float32), b.astype(np.float32))
    return Adapter(RANK, ALPHA, targets, tensors)


def peft_files(folder: Path, config: dict[str, Any], arrays: dict[str, Float32]) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **config}))
    write_safetensors(folder / WEIGHTS, arrays, {"format": "pt"})
    return folder


ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("targets", [ALL, ("q", "k", "v"), ("q",), ("v", "up"), ("k", "v"), ("o", "down"), ("gate",)])
def test_fused_modules_round_trip_exactly(targets: tuple[str, ...], tmp_path: Path) -> None:
    adapter = random_adapter(PHI3, targets)
    read, _ = load_adapter(save_adapter(tmp_path / "a", adapter, PHI3, {}), PHI3)
    assert (read.rank, read.alpha, read.targets, read.digest) == (RANK, ALPHA, targets, adapter.digest)


def test_fused_modules_hold_the_sum_of_their_parts() -> None:
    """A = [Aq; Ak; Av], B block-diagonal, and a strength of alpha / r as before."""
    adapter = random_adapter(PHI3, ALL)
    config, arrays = to_peft(adapter, PHI3)
    assert config["target_modules"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert config["rank_pattern"]["model.layers.1.self_attn.qkv_proj"] == 3 * RANK
    assert config["rank_pattern"]["model.layers.1.mlp.gate_up_proj"] == 2 * RANK
    assert set(config["rank_pattern"]) == {
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    }
    read = parse_config(config)
    for layer in (0, 1):
        for path, targets in (("self_attn.qkv_proj", "q k v"), ("mlp.gate_up_proj", "gate up"), ("mlp.down_proj", "down")):
            name = f"model.layers.{layer}.{path}"
            assert read.scale_of(name) == pytest.approx(ALPHA / RANK)
            a, b = (arrays[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            assert a.shape[0] == b.shape[1] == read.rank_of(name)
            parts = [adapter.tensors[layer, target] for target in targets.split()]
            np.testing.assert_allclose(b @ a, np.concatenate([pb @ pa for pa, pb in parts]), rtol=1e-4, atol=1e-5)


def native(rank: int = RANK, seed: int = 0) -> dict[str, Float32]:
    """What PEFT trains: one A and one B for all of q, k and v."""
    rng = np.random.default_rng(seed)
    rows = sum(PHI3.linear_shape(target)[0] for target in "qkv")
    return {
        f"{STEM}1.self_attn.qkv_proj.lora_A.weight": rng.standard_normal((rank, PHI3.width), dtype=np.float32),
        f"{STEM}1.self_attn.qkv_proj.lora_B.weight": rng.standard_normal((rows, rank), dtype=np.float32),
    }


def test_adapter_of_peft_is_split_by_rows(tmp_path: Path) -> None:
    arrays = native()
    adapter, _ = load_adapter(peft_files(tmp_path / "a", {"target_modules": ["qkv_proj"]}, arrays), PHI3)
    assert adapter.places() == [(1, "q"), (1, "k"), (1, "v")]
    a, b = arrays.values()
    first = 0
    for target in "qkv":
        found_a, found_b = adapter.tensors[1, target]
        assert np.array_equal(found_a, a)
        assert np.array_equal(found_b, b[first : first + len(found_b)])
        first += len(found_b)
    assert first == len(b)
    config, again = to_peft(adapter, PHI3)  # one A again, not three
    assert config["rank_pattern"] == {}
    assert all(np.array_equal(again[name], values) for name, values in arrays.items())


def test_untrained_adapter_of_peft() -> None:
    arrays = native()
    arrays[f"{STEM}1.self_attn.qkv_proj.lora_B.weight"][:] = 0
    adapter = from_peft(parse_config({"peft_type": "LORA", "r": RANK}), arrays, PHI3)
    assert [adapter.tensors[place][1].shape[1] for place in adapter.places()] == [RANK] * 3


def test_ranks_that_are_zero_in_some_rows() -> None:
    arrays = native()
    b = arrays[f"{STEM}1.self_attn.qkv_proj.lora_B.weight"]
    b[:32, 1:] = 0  # q has rank 1, k none
    b[32:48] = 0
    adapter = from_peft(parse_config({"peft_type": "LORA", "r": RANK}), arrays, PHI3)
    assert adapter.targets == ("q", "v")
    assert [adapter.tensors[place][1].shape for place in adapter.places()] == [(32, 1), (16, RANK)]
    assert np.array_equal(adapter.tensors[1, "q"][0], arrays[f"{STEM}1.self_attn.qkv_proj.lora_A.weight"][:1])


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"self_attn.qkv_proj.lora_B.weight": (63, RANK)}, "E_SHAPE", "[64, 32]"),
        ({"self_attn.qkv_proj.lora_B.weight": (32, RANK)}, "E_SHAPE", "[64, 32]"),
        ({"self_attn.qkv_proj.lora_A.weight": (RANK, 31)}, "E_SHAPE", "[64, 32]"),
        ({"self_attn.qkv_proj.lora_B.weight": (64, RANK + 1)}, "E_SHAPE", "r] in one of"),
        ({"self_attn.qkv_proj.lora_B.weight": None}, "E_SHAPE", "has no partner"),
        ({"self_attn.q_proj.lora_A.weight": (RANK, 32)}, "E_ARCH", "self_attn.qkv_proj"),
        ({"mlp.gate_up_proj.lora_A.weight": (RANK, 32)}, "E_SHAPE", "has no partner"),
    ],
)
def test_fused_modules_of_another_model(change: dict[str, Any], code: str, text: str, tmp_path: Path) -> None:
    arrays = native()
    for name, shape in change.items():
        arrays.pop(f"{STEM}1.{name}", None)
        if shape is not None:
            arrays[f"{STEM}1.{name}"] = np.ones(shape, np.float32)
    with pytest.raises(AdapterError) as caught:
        load_adapter(peft_files(tmp_path / "a", {}, arrays), PHI3)
    assert caught.value.code == code, caught.value
    assert text in str(caught.value)


def test_fused_modules_beyond_the_last_layer() -> None:
    arrays = {name.replace(".1.", ".7."): values for name, values in native().items()}
    with pytest.raises(AdapterError, match="2 layers") as caught:
        from_peft(parse_config({"peft_type": "LORA", "r": RANK}), arrays, PHI3)
    assert caught.value.code == "E_SHAPE"


@pytest.mark.parametrize("name", ["gemma3", "starcoder2", "qwen3_moe_dense_layers", "olmo2", "smollm3", "granite", "qwen2"])
def test_every_architecture_round_trips(name: str, tmp_path: Path) -> None:
    spec = spec_from_hf(GOLDEN[name]["config"], None, name=name)
    adapter = adapter_of(random_lora(spec, 2, scale=2.0))
    folder = save_adapter(tmp_path / "a", adapter, spec, {})
    assert load_adapter(folder, spec)[0].digest == adapter.digest
    names = set(GOLDEN[name]["tensors"])
    modules = to_peft(adapter, spec)[1]
    for tensor in modules:  # each is a linear that transformers has, with the root of a model of text alone
        linear = tensor.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight"
        assert linear in names or f"language_model.{linear}" in names


@pytest.mark.parametrize("root", ["model.", "model.language_model.", "language_model.model."])
def test_adapters_of_gemma3_with_images(root: str) -> None:
    """transformers has the language model in another place when it is a part of a model of images and text."""
    spec = spec_from_hf(GOLDEN["gemma3"]["config"], None)
    rows, columns = spec.linear_shape("up")
    name = f"base_model.model.{root}layers.1.mlp.up_proj.lora_"
    arrays = {f"{name}A.weight": np.ones((2, columns), np.float32), f"{name}B.weight": np.ones((rows, 2), np.float32)}
    config = {"peft_type": "LORA", "r": 8, "rank_pattern": {f"{root}layers.1.mlp.up_proj": 2}, "target_modules": ["up_proj"]}
    adapter = from_peft(parse_config(config), arrays, spec)
    assert adapter.places() == [(1, "up")]
    with pytest.raises(AdapterError, match=r"expected base_model.model.model.layers.<layer>"):
        from_peft(parse_config(config), {key.replace(root, "vision."): value for key, value in arrays.items()}, spec)


@pytest.mark.parametrize(
    "path", ["mlp.gate", "mlp.up_proj", "mlp.experts.00.gate_proj", "mlp.experts.x.gate_proj", "mlp.experts"]
)
def test_what_is_no_linear_of_a_mixture_is_refused(path: str, tmp_path: Path) -> None:
    spec = spec_from_hf(GOLDEN["qwen3_moe"]["config"], None)
    arrays = {
        f"{STEM}0.{path}.lora_{side}.weight": np.ones((RANK, 32) if side == "A" else (16, RANK), np.float32) for side in "AB"
    }
    with pytest.raises(AdapterError) as caught:
        load_adapter(peft_files(tmp_path / "a", {}, arrays), spec)
    assert caught.value.code in ("E_ARCH", "E_SHAPE")


def expert_adapter(spec: ModelSpec, targets: tuple[str, ...] = ("experts",), rank: int = RANK) -> Adapter:
    return adapter_of(random_lora(spec, rank, scale=ALPHA / RANK, targets=targets))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_written_one_by_one(name: str, tmp_path: Path) -> None:
    """Under the names that folders have, and read back as they were."""
    spec = spec_from_hf(GOLDEN[name]["config"], None, name=name)
    adapter = expert_adapter(spec, ("q", "experts"))
    read, _ = load_adapter(save_adapter(tmp_path / "a", adapter, spec, {}), spec)
    assert (read.digest, read.targets) == (adapter.digest, ("q", "gate", "up", "down"))
    config, arrays = to_peft(adapter, spec)
    leaves = ["w1", "w3", "w2"] if name == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    assert (config["target_modules"], config["rank_pattern"]) == (["q_proj", *leaves], {})
    names = {tensor.removeprefix("base_model.model.").rpartition(".lora_")[0] for tensor in arrays}
    folder = {one.removesuffix(".weight") for one in GOLDEN[name]["tensors"]}
    assert names == {one for one in folder if "experts." in one or "q_proj" in one}


def test_a_shared_expert_has_modules_of_its_own(tmp_path: Path) -> None:
    """Beside those of the other experts, and of layers without one; a mixture that has none refuses them."""
    for name, first in (("qwen2_moe", 0), ("qwen2_moe_dense_layers", 1)):
        spec = spec_from_hf(GOLDEN[name]["config"], None, name=name)
        adapter = expert_adapter(spec, ("up", "experts"))
        read, _ = load_adapter(save_adapter(tmp_path / name, adapter, spec, {}), spec)
        assert (read.digest, read.targets) == (adapter.digest, ("gate", "up", "down", "shared_up"))
        assert (0, "shared_up") in read.tensors or first
        config, arrays = to_peft(adapter, spec)
        assert config["target_modules"] == ["gate_proj", "up_proj", "down_proj"]
        assert arrays[f"{STEM}{first}.mlp.shared_expert.up_proj.lora_B.weight"].shape == (24, RANK)
        assert (f"{STEM}0.mlp.up_proj.lora_A.weight" in arrays) == bool(first)
    shared = {key: array for key, array in arrays.items() if "shared_expert" in key}
    with pytest.raises(AdapterError, match="refuses an adapter rather than leave out a part of it"):
        load_adapter(peft_files(tmp_path / "a", {}, shared), spec_from_hf(GOLDEN["qwen3_moe"]["config"], None))
    moved = {key.replace(f"{STEM}1.", f"{STEM}0."): array for key, array in shared.items() if key.startswith(f"{STEM}1.")}
    with pytest.raises(AdapterError, match=r"has 4 layers, and its weight there is \[0, 32\]"):
        load_adapter(peft_files(tmp_path / "b", {}, moved), spec)


def parameters_of(adapter: Adapter, spec: ModelSpec) -> tuple[dict[str, Any], dict[str, Float32]]:
    """The same as PEFT has it on the parameters of transformers 5: gate and up in one, each with ranks of its own."""
    arrays = {}
    for layer in range(spec.layers):
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = (adapter.tensors[layer, t] for t in ("gate", "up", "down"))
        both = np.zeros((len(gate_b), 2 * gate_b.shape[1], 2 * RANK), np.float32)
        both[:, : gate_b.shape[1], :RANK], both[:, gate_b.shape[1] :, RANK:] = gate_b, up_b
        pairs = {".base_layer": (np.concatenate([gate_a, up_a], axis=1), both), "": (down_a, down_b)}
        for path, (a, b) in pairs.items():
            stem = f"{STEM}{layer}.mlp.experts{path}.lora_"
            arrays[f"{stem}A.weight"] = np.ascontiguousarray(a.reshape(-1, a.shape[-1]))
            arrays[f"{stem}B.weight"] = np.ascontiguousarray(b.transpose(1, 2, 0).reshape(b.shape[1], -1))
    config = {
        "target_modules": [],
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 2 * RANK},
        "alpha_pattern": {r".*\.gate_up_proj": 2 * ALPHA},
    }
    return config, arrays


def test_parameters_of_all_experts(tmp_path: Path) -> None:
    spec = spec_from_hf(GOLDEN["qwen3_moe"]["config"], None)
    adapter = expert_adapter(spec)
    config, arrays = parameters_of(adapter, spec)
    assert load_adapter(peft_files(tmp_path / "a", config, arrays), spec)[0].digest == adapter.digest


def test_parameters_that_share_an_a(tmp_path: Path) -> None:
    """As PEFT itself trains gate and up; down alone is then the only wrapped parameter."""
    spec = spec_from_hf(GOLDEN["qwen3_moe"]["config"], None)
    rng = np.random.default_rng(0)
    count, (rows, columns) = spec.blocks[0].experts, spec.linear_shape("gate")
    a = rng.standard_normal((count * RANK, columns)).astype(np.float32)
    b = rng.standard_normal((2 * rows, RANK * count)).astype(np.float32)
    stem = f"{STEM}0.mlp.experts.lora_"
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    adapter, _ = load_adapter(peft_files(tmp_path / "a", config, {f"{stem}A.weight": a, f"{stem}B.weight": b}), spec)
    assert adapter.places() == [(0, "gate"), (0, "up")]
    assert np.array_equal(adapter.tensors[0, "gate"][0], adapter.tensors[0, "up"][0])
    up = adapter.tensors[0, "up"]
    expected = np.einsum("ore,erk->eok", b.reshape(2 * rows, RANK, count)[rows:], a.reshape(count, RANK, columns))
    np.testing.assert_allclose(up[1] @ up[0], expected, rtol=1e-5, atol=1e-5)


def lacking(arrays: dict[str, Float32], part: str) -> dict[str, Float32]:
    return {name: values for name, values in arrays.items() if part not in name}


HOSTILE: dict[str, tuple[Any, str]] = {
    "an expert is missing": (lambda arrays: lacking(arrays, ".0.mlp.experts.1.up_proj."), "E_SHAPE"),
    "its A is missing": (lambda arrays: lacking(arrays, ".0.mlp.experts.1.up_proj.lora_A"), "E_SHAPE"),
    "an expert too many": (lambda arrays: {name.replace("experts.3", "experts.4"): a for name, a in arrays.items()}, "E_SHAPE"),
    "a layer too many": (lambda arrays: {name.replace("layers.1", "layers.9"): a for name, a in arrays.items()}, "E_SHAPE"),
    "another rank": (lambda arrays: arrays | {f"{STEM}0.mlp.experts.1.up_proj.lora_A.weight": np.ones((2, 32), "f4")}, "E_SHAPE"),
    "another width": (lambda arrays: {name: a[:, :-1] for name, a in arrays.items()}, "E_SHAPE"),
    "another spelling": (lambda arrays: {name.replace("experts.3", "experts.03"): a for name, a in arrays.items()}, "E_ARCH"),
    "not finite": (lambda arrays: {name: a * np.float32(np.nan) for name, a in arrays.items()}, "E_NONFINITE"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_faults_in_adapters_of_experts(fault: str, tmp_path: Path) -> None:
    spec = spec_from_hf(GOLDEN["qwen3_moe"]["config"], None)
    assert spec.blocks[0].experts == 4
    change, code = HOSTILE[fault]
    arrays = {name: np.ascontiguousarray(a) for name, a in change(to_peft(expert_adapter(spec), spec)[1]).items()}
    with pytest.raises(AdapterError) as caught:
        load_adapter(peft_files(tmp_path / "a", {}, arrays), spec)
    assert caught.value.code == code, caught.value


@pytest.mark.parametrize("count", [3, 5])
def test_parameters_of_another_number_of_experts(count: int, tmp_path: Path) -> None:
    spec = spec_from_hf(GOLDEN["qwen3_moe"]["config"], None)
    config, arrays = parameters_of(expert_adapter(spec), spec)
    name = f"{STEM}0.mlp.experts.lora_A.weight"
    arrays[name] = np.ones((count * RANK, arrays[name].shape[1]), np.float32)
    with pytest.raises(AdapterError, match="for each of 4 experts") as caught:
        load_adapter(peft_files(tmp_path / "a", config, arrays), spec)
    assert caught.value.code == "E_SHAPE"
    with pytest.raises(AdapterError, match="expected base_model"):  # without saying whose it is
        load_adapter(peft_files(tmp_path / "b", {}, arrays), spec)
