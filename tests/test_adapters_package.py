"""Packages: exact round trip, the row order of q and k, foreign PEFT settings, and everything hostile."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nomoat.adapters.convert.peft import to_base_rows, to_huggingface_rows
from nomoat.adapters.package import (
    ALLOWED,
    CONFIG,
    MANIFEST,
    WEIGHTS,
    check_base,
    file_digest,
    load_adapter,
    save_adapter,
)
from nomoat.engine.stack import Stack
from nomoat.errors import AdapterError, InputError, NotFoundError
from nomoat.files.safetensors import open_safetensors, write_safetensors
from nomoat.models.spec import TARGETS
from toy import fingerprint, random_adapter, toy_spec

SPEC = toy_spec()
BASE = fingerprint(SPEC)
STEM = "base_model.model.model.layers."


def saved(folder: Path, **manifest: Any) -> Path:
    return save_adapter(folder / "adapter", random_adapter(SPEC, 1), SPEC, {"base": BASE, **manifest})


def foreign(folder: Path, config: Any, arrays: dict[str, np.ndarray] | None = None) -> Path:
    """A package as another tool would write it."""
    folder.mkdir(parents=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / CONFIG).write_bytes(text)
    write_safetensors(folder / WEIGHTS, pair() if arrays is None else arrays, {"format": "pt"})
    return folder


def pair(
    rank: int = 4, target: str = "self_attn.v_proj", layer: int = 0, shape: tuple[int, int] = (4, 12)
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank + layer)
    return {
        f"{STEM}{layer}.{target}.lora_A.weight": rng.standard_normal((rank, shape[1]), dtype=np.float32),
        f"{STEM}{layer}.{target}.lora_B.weight": rng.standard_normal((shape[0], rank), dtype=np.float32),
    }


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"]}


def test_round_trip(tmp_path: Path) -> None:
    adapter = random_adapter(SPEC, 1, targets=("q", "k", "down"))
    folder = save_adapter(tmp_path / "a", adapter, SPEC, {"base": BASE, "recipe": {"epochs": 1}})
    read, manifest = load_adapter(folder, SPEC, base=BASE)
    assert (read.rank, read.alpha, read.targets, read.digest) == (4, 8.0, ("q", "k", "down"), adapter.digest)
    assert manifest["recipe"] == {"epochs": 1}
    assert manifest["rank"] == 4
    assert {path.name for path in folder.iterdir()} <= ALLOWED


def test_same_adapter_same_bytes(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "1"), saved(tmp_path / "2")
    for name in sorted(ALLOWED - {".gitattributes"}):
        assert file_digest(one / name) == file_digest(two / name)


def test_files_hold_huggingface_order(tmp_path: Path) -> None:
    """Against the loop in words: pair i of head h is rows (2 i, 2 i + 1) in the base, rows (i, i + d/2) for Hugging Face."""
    adapter = random_adapter(SPEC, 1)
    folder = save_adapter(tmp_path / "a", adapter, SPEC, {})
    with open_safetensors(folder / WEIGHTS) as file:
        q, k, v = (file.array(f"{STEM}1.self_attn.{name}_proj.lora_B.weight") for name in "qkv")
    half = SPEC.head_dim // 2
    for theirs, target, heads in ((q, "q", SPEC.heads), (k, "k", SPEC.kv_heads)):
        ours = adapter.tensors[1, target][1]
        for head in range(heads):
            first = head * SPEC.head_dim
            for i in range(half):
                assert np.array_equal(theirs[first + i], ours[first + 2 * i])
                assert np.array_equal(theirs[first + half + i], ours[first + 2 * i + 1])
    assert np.array_equal(v, adapter.tensors[1, "v"][1])


def test_permutation_keeps_the_adapted_weight() -> None:
    """W + B A permuted equals permuted W + permuted B times A."""
    rng = np.random.default_rng(0)
    w, a, b = rng.standard_normal((12, 12)), rng.standard_normal((4, 12)), rng.standard_normal((12, 4))
    permuted = to_base_rows((w + b @ a).astype(np.float32), "q", SPEC)
    parts = to_base_rows(w.astype(np.float32), "q", SPEC) + to_base_rows(b.astype(np.float32), "q", SPEC) @ a
    np.testing.assert_allclose(permuted, parts, atol=1e-5)
    assert np.array_equal(to_huggingface_rows(permuted, "q", SPEC), (w + b @ a).astype(np.float32))
    straight = replace(SPEC, ropes=(replace(SPEC.ropes[0], interleaved=False),))
    assert np.array_equal(to_base_rows(b.astype(np.float32), "q", straight), b.astype(np.float32))


def effective(path: Path) -> np.ndarray:
    """scale * B A of the one adapted matrix, v of layer 0."""
    adapter, _ = load_adapter(path, SPEC)
    a, bt, scale = Stack(SPEC, [(adapter, 1.0)])[0, "v"]
    found: np.ndarray = (bt.T * scale) @ a
    return found


def product() -> np.ndarray:
    arrays = pair()
    a, b = (arrays[f"{STEM}0.self_attn.v_proj.lora_{side}.weight"] for side in "AB")
    found: np.ndarray = b @ a
    return found


@pytest.mark.parametrize(
    ("changes", "strength"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"v_proj": 20}}, 5.0),
        ({"alpha_pattern": {"layers.0.self_attn.v_proj": 20, "v_proj": 40}}, 5.0),
        ({"alpha_pattern": {"oj": 20, "model.layers.1.self_attn.v_proj": 20}}, 2.0),
        ({"r": 16, "rank_pattern": {"v_proj": 4}}, 2.0),
        ({"r": 16, "rank_pattern": {"self_attn.v_proj": 4}, "use_rslora": True}, 4.0),
        ({"target_modules": "all-linear"}, 2.0),
        ({"target_modules": "(a+)+$"}, 2.0),  # never run: the tensor names say what is adapted
        ({"target_modules": None}, 2.0),
        ({"auto_mapping": {"base_model_class": "x"}, "base_model_name_or_path": "file:///etc/passwd"}, 2.0),
        ({"layers_to_transform": [0], "exclude_modules": None, "eva_config": {"rho": 2}}, 2.0),
    ],
)
def test_strength_of_foreign_settings(tmp_path: Path, changes: dict[str, Any], strength: float) -> None:
    path = foreign(tmp_path / "a", PLAIN | changes)
    np.testing.assert_allclose(effective(path), strength * product(), rtol=1e-5, atol=1e-5)
    again = save_adapter(tmp_path / "b", load_adapter(path, SPEC)[0], SPEC, {})  # and after writing it ourselves
    np.testing.assert_allclose(effective(again), strength * product(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"r": 0}, "E_LIMIT"),
        ({"r": -1}, "E_LIMIT"),
        ({"r": 2**31}, "E_LIMIT"),
        ({"r": 10**4000}, "E_LIMIT"),
        ({"r": 1.5}, "E_TYPE"),
        ({"r": "8"}, "E_TYPE"),
        ({"r": float("nan")}, "E_TYPE"),
        ({"r": True}, "E_TYPE"),
        ({"r": 8}, "E_SHAPE"),  # A says 4
        ({"lora_alpha": float("nan")}, "E_LIMIT"),
        ({"lora_alpha": float("inf")}, "E_LIMIT"),
        ({"lora_alpha": 0}, "E_LIMIT"),
        ({"lora_alpha": 1e30}, "E_LIMIT"),
        ({"lora_alpha": None}, "E_TYPE"),
        ({"lora_dropout": 2}, "E_LIMIT"),
        ({"peft_type": "IA3"}, "E_ARCH"),
        ({"peft_type": None}, "E_ARCH"),
        ({"use_dora": True}, "E_ARCH"),
        ({"lora_bias": True}, "E_ARCH"),
        ({"bias": "all"}, "E_ARCH"),
        ({"modules_to_save": ["lm_head"]}, "E_ARCH"),
        ({"target_parameters": ["experts"]}, "E_ARCH"),
        ({"layer_replication": [[0, 2]]}, "E_ARCH"),
        ({"alora_invocation_tokens": [1]}, "E_ARCH"),
        ({"init_lora_weights": "pissa"}, "E_ARCH"),
        ({"some_new_setting": 3}, "E_ARCH"),
        ({"target_modules": ["q_proj"]}, "E_SHAPE"),
        ({"target_modules": "x" * 10_000}, "E_LIMIT"),
        ({"target_modules": 7}, "E_TYPE"),
        ({"rank_pattern": {"(a+)+$": 4}}, "E_TYPE"),
        ({"alpha_pattern": {"^model.layers.0": 4}}, "E_TYPE"),
        ({"alpha_pattern": ["v_proj"]}, "E_TYPE"),
        ({"alpha_pattern": {"v_proj": float("nan")}}, "E_LIMIT"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(foreign(tmp_path / "a", PLAIN | changes), SPEC)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "E_JSON"),
        (b"[]", "E_JSON"),
        (b"{", "E_JSON"),
        (b'{"r": 4, "r": 8}', "E_JSON"),
        (b'{"peft_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "E_JSON"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 10_000 + b"}", "E_JSON"),
        (b"\xff\xfe{}", "E_JSON"),
        (b" " * (1 << 20) + b"{}", "E_LIMIT"),
    ],
)
def test_broken_settings_files(tmp_path: Path, text: bytes, code: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(foreign(tmp_path / "a", text), SPEC)
    assert caught.value.code == code


V = f"{STEM}0.self_attn.v_proj."


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({}, "E_SHAPE"),
        ({f"{V}lora_A.weight": pair()[f"{V}lora_A.weight"]}, "E_SHAPE"),
        ({f"{V}lora_B.weight": pair()[f"{V}lora_B.weight"]}, "E_SHAPE"),
        (pair(shape=(8, 12)), "E_SHAPE"),
        (pair(shape=(4, 16)), "E_SHAPE"),
        (pair() | {f"{V}lora_B.weight": np.zeros((4, 3), np.float32)}, "E_SHAPE"),
        (pair() | {f"{V}lora_B.weight": np.zeros(16, np.float32)}, "E_SHAPE"),
        (pair(layer=2), "E_SHAPE"),
        (pair(target="self_attn.qkv_proj"), "E_ARCH"),
        (pair() | {f"{V}lora_B.bias": np.zeros(4, np.float32)}, "E_ARCH"),
        (pair() | {f"{V}lora_magnitude_vector": np.zeros(4, np.float32)}, "E_ARCH"),
        (pair() | {"base_model.model.lm_head.weight": np.zeros((4, 4), np.float32)}, "E_ARCH"),
        (pair() | {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 12), np.float32)}, "E_ARCH"),
        (pair() | {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 4), np.float32)}, "E_ARCH"),
        (pair() | {f"{STEM}0.input_layernorm.weight": np.zeros(12, np.float32)}, "E_ARCH"),
        (pair() | {f"{STEM}00.self_attn.v_proj.lora_A.weight": np.zeros((4, 12), np.float32)}, "E_ARCH"),
        (pair() | {f"{V}lora_A.weight": np.full((4, 12), np.nan, np.float32)}, "E_NONFINITE"),
        (pair() | {f"{V}lora_B.weight": np.full((4, 4), -np.inf, np.float32)}, "E_NONFINITE"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], code: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(foreign(tmp_path / "a", PLAIN | {"target_modules": None}, arrays), SPEC)
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["x.py", "adapter_model.bin", "model.pkl", "code.so", "training_args.pth", "a.txt", "folder"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    path = foreign(tmp_path / "a", PLAIN)
    if name == "folder":
        (path / name).mkdir()
    else:
        (path / name).write_bytes(b"")
    with pytest.raises(AdapterError, match=name.replace(".", r"\.")) as caught:
        load_adapter(path, SPEC)
    assert caught.value.code == "E_TYPE"


def test_a_pickle_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a", PLAIN)
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safe_serialization=True"):
        load_adapter(path, SPEC)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(tmp_path: Path, name: str) -> None:
    path = foreign(tmp_path / "a", PLAIN)
    (path / name).unlink()
    with pytest.raises(AdapterError, match=name):
        load_adapter(path, SPEC)
    with pytest.raises(NotFoundError):
        load_adapter(tmp_path / "absent", SPEC)


def test_a_manifest_that_does_not_match_the_files(tmp_path: Path) -> None:
    path = saved(tmp_path)
    weights = (path / WEIGHTS).read_bytes()
    for changed in (weights[:-1] + bytes([weights[-1] ^ 1]), weights + b"\0"):
        copy = shutil.copytree(path, tmp_path / "copy")
        (copy / WEIGHTS).write_bytes(changed)
        with pytest.raises(AdapterError) as caught:
            load_adapter(copy, SPEC)
        assert caught.value.code == "E_HASH"
        shutil.rmtree(copy)
    manifest = json.loads((path / MANIFEST).read_text())
    listed: list[dict[str, Any]] = [{"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}, {"README.txt": {}}]
    for files in listed:
        (path / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(AdapterError) as caught:
            load_adapter(path, SPEC)
        assert caught.value.code == "E_HASH"


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 2}', "{}", '{"format": 1, "files": []}', '{"format": 1, "base": "x"}'])
def test_broken_manifests(tmp_path: Path, text: str) -> None:
    path = foreign(tmp_path / "a", PLAIN)
    (path / MANIFEST).write_text(text)
    with pytest.raises(AdapterError):
        load_adapter(path, SPEC)


def test_another_base_is_refused_and_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    other = fingerprint(SPEC) | {"name": "other", "vocabulary": "w" * 64}
    with pytest.raises(AdapterError, match="made for toy, the model here is other: vocabulary") as caught:
        load_adapter(path, SPEC, base=other)
    assert caught.value.code == "E_ARCH"


def test_another_quantization_is_allowed_with_a_note() -> None:
    assert check_base({"base": BASE}, BASE) is None
    note = check_base({"base": BASE}, BASE | {"digest": "e" * 64})
    assert note is not None
    assert "quantization" in note
    assert check_base({}, BASE) is None


def test_an_existing_adapter_is_replaced_only_on_purpose(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(AdapterError, match="exists") as caught:
        saved(tmp_path)
    assert caught.value.code == "E_DUP"
    save_adapter(path, random_adapter(SPEC, 2), SPEC, {}, replace=True)
    assert load_adapter(path, SPEC)[0].digest == random_adapter(SPEC, 2).digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_nan_is_never_saved(tmp_path: Path) -> None:
    adapter = random_adapter(SPEC, 1, targets=TARGETS)
    adapter.tensors[0, "q"][0][0, 0] = np.nan
    with pytest.raises(AdapterError, match="NaN"):
        save_adapter(tmp_path / "a", adapter, SPEC, {})
    assert list(tmp_path.iterdir()) == []


def test_text_of_a_package_does_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a", PLAIN | {"\x1b[31mred": 1})
    with pytest.raises(InputError) as caught:
        load_adapter(path, SPEC)
    assert "\x1b" not in str(caught.value)
