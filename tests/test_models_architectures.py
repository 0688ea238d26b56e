"""Every architecture: the config.json and tensors that transformers writes, and the GGUF that llama.cpp's converter would."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from golden.make_transformers_configs import FILE
from nomoat.cli import main
from nomoat.errors import InputError, ModelError
from nomoat.files.gguf import open_gguf
from nomoat.hub.describe import describe
from nomoat.models import GGUF_ARCHITECTURES, HF_MODEL_TYPES, architecture, gguf_form, spec_from_gguf, spec_from_hf
from nomoat.models.check import source_shapes
from nomoat.models.spec import SHARED_TARGETS, TARGETS, LayerSpec, ModelSpec, RopeSpec
from tiny import _add

GOLDEN: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
# transformers computes powers and scalings in float32: a few roundings
RELATIVE = 4 * float(np.finfo(np.float32).eps)

BLOCK = LayerSpec(heads=4, kv_heads=2, ffn=48)
#: What every tiny model is, and what the cases are beside it.
USUAL: dict[str, Any] = {
    "layers": 2, "width": 32, "head_dim": 8, "vocab": 64, "context": 128, "norm_eps": 1e-6, "tied_head": False,
    "norm": "rms", "activation": "silu", "gated": True, "qk_norm": "none", "score_scale": None, "score_cap": 0.0,
    "logit_cap": 0.0, "logit_scale": 1.0, "embed_scale": 1.0, "residual_scale": 1.0, "experts_used": 0, "expert_norm": True,
}  # fmt: skip
ROOT_32 = 32**0.5


def blocks(*windows: int, **others: Any) -> tuple[LayerSpec, ...]:
    """Layers with these windows."""
    return tuple(LayerSpec(**{"heads": 4, "kv_heads": 2, "ffn": 48, **others, "window": window}) for window in windows)


EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "blocks": (BLOCK,) * 2},
    "llama_biases": {"architecture": "llama", "tied_head": True},
    "llama_linear": {"architecture": "llama"},
    "llama_dynamic": {"architecture": "llama"},
    "llama_llama3": {"architecture": "llama", "head_dim": 16},
    "llama_longrope": {"architecture": "llama", "context": 64},
    "mistral": {"architecture": "llama", "blocks": blocks(16, 16)},
    "mixtral": {"architecture": "llama", "norm_eps": 1e-5, "experts_used": 2, "blocks": blocks(0, 0, experts=4)},
    "qwen2": {"architecture": "qwen2", "blocks": (BLOCK,) * 2},
    "qwen2_window": {"architecture": "qwen2", "layers": 3, "blocks": blocks(0, 16, 16)},
    "qwen2_yarn": {"architecture": "qwen2"},
    "qwen2_moe": {
        "architecture": "qwen2moe", "experts_used": 2, "expert_norm": False,
        "blocks": blocks(0, 0, experts=4, ffn=16, shared=24),
    },
    "qwen2_moe_dense_layers": {
        "architecture": "qwen2moe", "layers": 4, "experts_used": 2,
        "blocks": (*blocks(16), *blocks(0, 16, 0, experts=4, ffn=16, shared=24)),
    },
    "qwen3": {"architecture": "qwen3", "tied_head": True, "head_dim": 16, "qk_norm": "head"},
    "qwen3_yarn": {"architecture": "qwen3", "head_dim": 16, "qk_norm": "head"},
    "qwen3_untruncated": {"architecture": "qwen3", "head_dim": 16, "qk_norm": "head"},
    "qwen3_moe": {
        "architecture": "qwen3moe", "qk_norm": "head", "experts_used": 2, "blocks": blocks(0, 0, experts=4, ffn=16),
    },
    "qwen3_moe_dense_layers": {
        "architecture": "qwen3moe", "layers": 4, "qk_norm": "head", "experts_used": 2, "expert_norm": False,
        "blocks": (*blocks(4096), *blocks(4096, experts=4, ffn=16), *blocks(4096, 4096)),
    },
    "gemma2": {
        "architecture": "gemma2", "layers": 3, "head_dim": 16, "tied_head": True, "activation": "gelu", "score_cap": 50.0,
        "logit_cap": 30.0, "score_scale": 1 / 16, "embed_scale": ROOT_32, "blocks": blocks(16, 0, 16),
    },
    "gemma2_uncapped": {
        "architecture": "gemma2", "tied_head": True, "activation": "gelu", "score_scale": 8**-0.5, "embed_scale": ROOT_32,
        "blocks": blocks(4096, 0),
    },
    "gemma3_text": {
        "architecture": "gemma3", "layers": 7, "head_dim": 16, "tied_head": True, "activation": "gelu", "qk_norm": "head",
        "score_scale": 1 / 16, "embed_scale": ROOT_32,
        "blocks": (*blocks(16, 16, 16, 16, 16, rope=1), *blocks(0, rope=0), *blocks(16, rope=1)),
    },
    "gemma3": {
        "architecture": "gemma3", "head_dim": 16, "tied_head": True, "activation": "gelu", "qk_norm": "head",
        "score_scale": 1 / 16, "embed_scale": ROOT_32, "blocks": blocks(4096, 4096, rope=1),
    },
    "phi3": {"architecture": "phi3", "norm_eps": 1e-5, "head_dim": 16, "blocks": blocks(16, 16, heads=2, kv_heads=1)},
    "phi3_longrope": {"architecture": "phi3", "norm_eps": 1e-5, "context": 64, "blocks": (BLOCK,) * 2},
    "smollm3": {
        "architecture": "smollm3", "layers": 5, "tied_head": True,
        "blocks": (*blocks(0, 0, 0), *blocks(0, rope=None), *blocks(0)),
    },
    "smollm3_own_layers": {
        "architecture": "smollm3", "tied_head": True, "blocks": (*blocks(16, rope=None), *blocks(0)),
    },
    "olmo2": {"architecture": "olmo2", "norm_eps": 1e-5, "qk_norm": "row"},
    "granite": {
        "architecture": "granite", "tied_head": True, "embed_scale": 12.0, "score_scale": 0.25, "residual_scale": 0.22,
        "logit_scale": 1 / 8,
    },
    "starcoder2": {
        "architecture": "starcoder2", "norm_eps": 1e-5, "tied_head": True, "norm": "layer", "activation": "gelu", "gated": False,
        "blocks": blocks(16, 16),
    },
    "starcoder2_no_bias": {
        "architecture": "starcoder2", "norm_eps": 1e-5, "norm": "layer", "activation": "gelu", "gated": False,
    },
}  # fmt: skip
#: GGUF files of these hold q and k for rotation of pairs (2i, 2i + 1).
INTERLEAVED = {"llama", "granite", "smollm3"}
#: Dense layers in a mixture, which llama.cpp does not have there
DENSE = {name: {"ffn_gate", "ffn_up", "ffn_down"} for name in ("qwen2moe", "qwen3moe")}
#: What GGUF has no key for.
NOT_IN_GGUF = {"qwen3_untruncated": "ropes", "gemma2_uncapped": "score_cap", "smollm3_own_layers": "blocks"}


def slots(name: str) -> dict[str, Any]:
    """Tensors of a case as an open safetensors file shows them."""
    return {tensor: SimpleNamespace(shape=shape, dtype="BF16") for tensor, shape in GOLDEN[name]["tensors"].items()}


def test_every_row_has_a_golden() -> None:
    """A row of the tables that nothing checks: add it to golden/make_transformers_configs.py."""
    assert set(EXPECTED) == set(GOLDEN)
    types = {case["config"].get("model_type") for case in GOLDEN.values()}
    assert types == set(HF_MODEL_TYPES)
    assert {expected["architecture"] for expected in EXPECTED.values()} == set(GGUF_ARCHITECTURES)


def test_every_row_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs/reference/models.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| `")]
    assert {cell[0].strip("`") for cell in cells} >= set(GGUF_ARCHITECTURES)
    assert {kind.strip("` ") for cell in cells for kind in cell[1].split(",")} >= set(HF_MODEL_TYPES)


@pytest.mark.parametrize("name", GOLDEN)
def test_config_of_transformers(name: str) -> None:
    spec = spec_from_hf(GOLDEN[name]["config"], slots(name), name=name)
    for key, value in {**USUAL, **EXPECTED[name]}.items():
        found = getattr(spec, key)
        assert found == (pytest.approx(value, rel=1e-15) if isinstance(value, float) else value), key
    assert spec_from_hf(GOLDEN[name]["config"], None, name=name).tensors.keys() == spec.tensors.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_of_transformers_is_used(name: str) -> None:
    """With its whole shape, and no tensor but those of the vision part is left over."""
    spec = spec_from_hf(GOLDEN[name]["config"], slots(name), name=name)
    shapes = source_shapes(spec)
    tensors = GOLDEN[name]["tensors"]
    assert {tensor: list(shape) for tensor, shape in shapes.items()} == {t: tensors[t] for t in shapes}
    left = [tensor for tensor in tensors if tensor not in shapes]
    assert all(tensor.startswith(("vision_tower.", "multi_modal_projector.")) for tensor in left)
    assert [note for note in spec.notes if "are not used" in note] == (
        [f"{len(left)} tensors are not used: " + ", ".join(f"`{t}`" for t in left[:4]) + f" and {len(left) - 4} more"]
        if left
        else []
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_ropes_of_transformers(name: str) -> None:
    config, golden = GOLDEN[name]["config"], GOLDEN[name]["ropes"]
    ropes = spec_from_hf(config, None).ropes
    by_section = {"full_attention": ropes[0], "sliding_attention": ropes[-1], "all": ropes[0]}
    if "long" in golden:
        by_section["long"] = spec_from_hf(config, None, context=10**6).ropes[0]
        assert spec_from_hf(config, None, context=65).ropes[0].inv_freq == pytest.approx(by_section["long"].inv_freq)
        assert spec_from_hf(config, None, context=64).ropes[0].inv_freq == pytest.approx(ropes[0].inv_freq)
    for section, expected in golden.items():
        found = by_section[section]
        np.testing.assert_allclose(found.inv_freq, expected["inv_freq"], rtol=RELATIVE)
        assert found.magnitude == pytest.approx(expected["magnitude"], rel=1e-12)
        assert not found.interleaved


def test_long_context_is_chosen_once() -> None:
    config = GOLDEN["phi3_longrope"]["config"]
    usual = spec_from_hf(config, None)
    assert usual.context == 64
    assert usual.notes[0].startswith("context limited to 64 of 128 tokens")
    for wanted, context in ((10**6, 128), (100, 100), (64, 64), (5, 5)):
        spec = spec_from_hf(config, None, context=wanted)
        assert (spec.context, spec.notes) == (context, ())
    assert spec_from_hf(GOLDEN["llama"]["config"], None, context=100).context == 100
    with pytest.raises(InputError, match="context is 0; expected 1 or more"):
        spec_from_hf(config, None, context=0)


def test_context_of_a_gguf(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", *gguf_form(GOLDEN["phi3_longrope"]["config"]))
    assert read(path).context == 64
    long, short = read(path, context=128).ropes[0], read(path).ropes[0]
    np.testing.assert_allclose(short.inv_freq / long.inv_freq, [1.1, 2.5 / 1.05, 4 / 1.2], rtol=RELATIVE)
    assert long.magnitude == short.magnitude > 1


def write(path: Path, spec: ModelSpec, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A GGUF with these keys, and random weights beside `tensors`; one that is None is left out."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, spec.architecture)
    for key, value in {"general.name": "model", **metadata}.items():
        _add(writer, key, value)
    shapes = source_shapes(spec)
    for tensor in [*shapes, *(extra for extra in tensors if extra not in shapes)]:
        values = tensors.get(tensor, None if tensor in tensors else rng.standard_normal(shapes[tensor], np.float32))
        if values is not None:
            writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path, **options: Any) -> ModelSpec:
    with open_gguf(path) as file:
        return spec_from_gguf(file, **options)


def plain(value: Any) -> Any:
    """Arrays as lists, so that descriptions can be compared."""
    if isinstance(value, RopeSpec):
        return (value.dim, value.interleaved, value.inv_freq.tolist(), value.magnitude)
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in NOT_IN_GGUF])
def test_gguf_form(name: str, tmp_path: Path) -> None:
    """What is written is what is read; names, keys and the order of rows are llama.cpp's."""
    form, metadata, divisors = gguf_form(GOLDEN[name]["config"])
    spec = read(write(tmp_path / "model.gguf", form, metadata, divisors))
    for key in ModelSpec.__dataclass_fields__:
        assert plain(getattr(spec, key)) == plain(getattr(form, key)), key
    folder = spec_from_hf(GOLDEN[name]["config"], None)
    assert spec.tensors.keys() == folder.tensors.keys()
    assert spec.blocks == folder.blocks
    assert all(rope.interleaved == bool({spec.architecture} & INTERLEAVED) for rope in spec.ropes)
    assert architecture(spec).qk_permuted("gguf") == spec.ropes[0].interleaved
    for ours, theirs in zip(spec.ropes, folder.ropes, strict=True):
        np.testing.assert_allclose(ours.inv_freq, theirs.inv_freq, rtol=RELATIVE)
        assert ours.magnitude == pytest.approx(theirs.magnitude, rel=1e-6)
    for source in spec.tensors.values():
        assert source.add == 0  # GGUF holds Gemma's norms as they are
    assert_names_of_gguf_py(spec, metadata, divisors)


def assert_names_of_gguf_py(spec: ModelSpec, metadata: dict[str, Any], divisors: dict[str, Any]) -> None:
    arch = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == spec.architecture)
    stems = {gguf.TENSOR_NAMES[kind].format(bid=i) for kind in gguf.MODEL_TENSORS[arch] for i in range(spec.layers)}
    stems |= {f"blk.{i}.{part}" for i in range(spec.layers) for part in DENSE.get(spec.architecture, ())}
    assert {name.removesuffix(".weight") for name in divisors} <= set(gguf.TENSOR_NAMES.values())
    for tensor in source_shapes(spec):
        assert tensor.removesuffix(".weight").removesuffix(".bias") in stems
    groups = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
    known = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    for key, value in metadata.items():
        assert key.replace(f"{spec.architecture}.", "{arch}.", 1) in known
        assert isinstance(value, int | float | str | list)


@pytest.mark.parametrize("name", NOT_IN_GGUF)
def test_what_gguf_cannot_hold(name: str) -> None:
    with pytest.raises(ModelError, match=f"cannot hold this model: its `{NOT_IN_GGUF[name]}`") as caught:
        gguf_form(GOLDEN[name]["config"], name=name)
    assert caught.value.code == "E_ARCH"


@pytest.mark.parametrize("kind", ["llama3", "longrope"])
def test_rotary_divisors_only_where_llama_cpp_reads_them(kind: str) -> None:
    config = {**GOLDEN["qwen2"]["config"], "rope_parameters": GOLDEN[f"llama_{kind}"]["config"]["rope_parameters"]}
    config["num_attention_heads"] = 2 if kind == "llama3" else 4
    spec_from_hf(config, None)
    with pytest.raises(ModelError, match=r"its `(ropes|context)`"):
        gguf_form(config)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """Older GGUF files of Mixtral have a tensor for each expert."""
    form, metadata, _ = gguf_form(GOLDEN["mixtral"]["config"])
    fused = {n: None for n in source_shapes(form) if "_exps" in n}
    apart = {
        name.replace("_exps.", f".{e}."): np.zeros(shape[1:], np.float32)
        for name, shape in source_shapes(form).items()
        if "_exps" in name
        for e in range(4)
    }
    spec = read(write(tmp_path / "m.gguf", form, metadata, fused | apart))
    assert spec.tensors["blk.1.up"].names == tuple(f"blk.1.ffn_up.{e}.weight" for e in range(4))
    assert spec.tensor_shape("blk.1.up") == (4, 48, 32)
    with pytest.raises(ModelError, match=r"2 of .* tensors are missing: `blk.0.ffn_gate.2.weight`, `blk.0.ffn_gate.3.weight`"):
        read(write(tmp_path / "m.gguf", form, metadata, fused | apart | {f"blk.0.ffn_gate.{e}.weight": None for e in (2, 3)}))
    routers = {f"blk.{i}.ffn_gate_inp.weight": np.zeros((3, 32), np.float32) for i in range(2)}
    path = write(tmp_path / "m.gguf", form, metadata | {"llama.expert_count": 3}, fused | apart | routers)
    with pytest.raises(ModelError, match="6 tensors of experts are in the file"):
        read(path)


@pytest.mark.parametrize("name", ["llama_biases", "qwen2", "phi3"])
def test_q_k_v_in_one_tensor_or_three(name: str, tmp_path: Path) -> None:
    """llama.cpp reads both in every architecture; its converter can fuse them."""
    form, metadata, _ = gguf_form(GOLDEN[name]["config"])
    q, k, v = (form.linear_shape(target)[0] for target in "qkv")
    rows = {"q": (0, q), "k": (q, k), "v": (q + k, v)}
    split: dict[str, Any] = {}
    fused: dict[str, Any] = {}
    for layer in range(form.layers):
        for kind in ("weight", "bias"):
            names = [f"blk.{layer}.attn_{target}.{kind}" for target in "qkv"]
            if kind == "weight" or "blk.0.q_bias" in form.tensors:
                columns = (32,) if kind == "weight" else ()
                split |= {n: np.zeros((form.linear_shape(t)[0], *columns), np.float32) for n, t in zip(names, "qkv", strict=True)}
                fused[f"blk.{layer}.attn_qkv.{kind}"] = np.zeros((q + k + v, *columns), np.float32)
    one = read(write(tmp_path / "one.gguf", form, metadata, dict.fromkeys(split) | fused))
    three = read(write(tmp_path / "three.gguf", form, metadata, dict.fromkeys(fused) | split))
    for target, (first, count) in rows.items():
        for part in (target, f"{target}_bias"):
            if f"blk.1.{part}" in form.tensors:
                source = one.tensors[f"blk.1.{part}"]
                assert (source.names[0].split(".")[2], source.first, source.rows) == ("attn_qkv", first, count)
                assert three.tensors[f"blk.1.{part}"].rows is None
    assert one.tensors.keys() == three.tensors.keys() == form.tensors.keys()


def test_olmo3_is_olmo2_with_windows(tmp_path: Path) -> None:
    """llama.cpp gives layers with a window the unscaled rotation."""
    config = {
        **GOLDEN["olmo2"]["config"],
        "num_hidden_layers": 5,
        "rope_parameters": GOLDEN["qwen2_yarn"]["config"]["rope_parameters"],
    }
    form, metadata, _ = gguf_form(config)
    spec = read(write(tmp_path / "m.gguf", form, metadata | {"olmo2.attention.sliding_window": 16}, {}))
    assert spec.blocks == (*blocks(16, 16, 16, rope=1), *blocks(0), *blocks(16, rope=1))
    assert spec.ropes[0].magnitude > 1 == spec.ropes[1].magnitude
    np.testing.assert_allclose(spec.ropes[1].inv_freq, 1e4 ** (-np.arange(0, 8, 2) / 8), rtol=RELATIVE)
    flat = read(write(tmp_path / "m.gguf", form, metadata, {}))
    assert (len(flat.ropes), flat.blocks) == (1, (BLOCK,) * 5)


def test_what_older_files_leave_out(tmp_path: Path) -> None:
    """Defaults of llama.cpp for keys that its converter did not always write."""
    form, metadata, _ = gguf_form(GOLDEN["gemma2"]["config"])
    left = {key: None for key in metadata if "softcapping" in key or "window" in key or "rope" in key}
    spec = read(write(tmp_path / "m.gguf", form, metadata | left, {}))
    assert (spec.score_cap, spec.logit_cap, spec.blocks) == (50.0, 30.0, blocks(4096, 0, 4096))
    form, metadata, _ = gguf_form(GOLDEN["gemma3_text"]["config"])
    spec = read(write(tmp_path / "m.gguf", form, metadata | {"gemma3.rope.freq_base_swa": None}, {}))
    assert plain(spec.ropes) == plain(form.ropes)
    spec = read(write(tmp_path / "m.gguf", form, metadata | {"gemma3.attention.sliding_window": None}, {}))
    assert (spec.blocks, plain(spec.ropes)) == (blocks(*[0] * 7), plain(form.ropes[:1]))
    form, metadata, _ = gguf_form(GOLDEN["qwen2_yarn"]["config"])
    for key, magnitude in (("yarn_attn_factor", 1.5), ("attn_factor", 1.5 * form.ropes[0].magnitude)):
        spec = read(write(tmp_path / "m.gguf", form, metadata | {f"qwen2.rope.scaling.{key}": 1.5}, {}))
        assert spec.ropes[0].magnitude == pytest.approx(magnitude)
    form, metadata, _ = gguf_form(GOLDEN["granite"]["config"])
    left = {f"granite.{key}": None for key in ("attention.scale", "embedding_scale", "residual_scale")}
    spec = read(write(tmp_path / "m.gguf", form, metadata | left, {}))
    assert (spec.embed_scale, spec.residual_scale) == (1.0, 1.0)
    assert spec.score_scale == pytest.approx(8**-0.5)
    spec = read(write(tmp_path / "m.gguf", form, metadata | {"granite.rope.scaling.finetuned": False}, {}))
    assert spec.blocks == blocks(0, 0, rope=None)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemma_scales_scores_by_its_width(name: str, layers: int) -> None:
    """GGUF does not say so: llama.cpp knows the model by its layers."""
    change = {"num_hidden_layers": layers, "layer_types": None, "query_pre_attn_scalar": 8}
    form, metadata, _ = gguf_form({**GOLDEN[name]["config"], **change})
    assert form.score_scale == pytest.approx(8**-0.5)
    assert not any(key.endswith("attention.scale") for key in metadata)
    form, metadata, _ = gguf_form({**GOLDEN[name]["config"], **change, "query_pre_attn_scalar": 16})
    assert form.score_scale == metadata[f"{form.architecture}.attention.scale"] == 0.25


def test_older_files_of_qwen2moe(tmp_path: Path) -> None:
    """Without widths of experts: the shared one is as wide as a dense MLP, the others share its width. A router may be a row."""
    form, metadata, _ = gguf_form(
        GOLDEN["qwen2_moe"]["config"] | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48}
    )
    older = {key: value for key, value in metadata.items() if not key.startswith("qwen2moe.expert_") or "count" in key}
    assert len(older) == len(metadata) - 3
    older["qwen2moe.feed_forward_length"] = 48
    row = {f"blk.{i}.ffn_gate_inp_shexp.weight": np.zeros((1, 32), np.float32) for i in range(2)}
    for replaced in ({}, row):
        spec = read(write(tmp_path / "m.gguf", form, older, replaced))
        assert (spec.blocks, spec.expert_norm) == (blocks(0, 0, experts=4, ffn=24, shared=48), False)
    column = {name: values.T for name, values in row.items()}
    with pytest.raises(ModelError, match=r"`blk.0.ffn_gate_inp_shexp.weight` has shape \(32, 1\)"):
        read(write(tmp_path / "m.gguf", form, older, column))


def test_tables() -> None:
    for name in set(HF_MODEL_TYPES.values()):
        spec = spec_from_hf(next(c["config"] for c in GOLDEN.values() if HF_MODEL_TYPES[c["config"]["model_type"]] == name), None)
        modules = architecture(spec).PEFT_MODULES
        shared = {target for block in spec.blocks if block.shared for target in SHARED_TARGETS}
        assert set(modules) == (set(TARGETS) - (set() if spec.gated else {"gate"})) | shared
        assert not architecture(spec).qk_permuted("hf")
        dense = [layer for layer, block in enumerate(spec.blocks) if not block.experts]
        for layer in dense:
            for target in spec.targets(layer):
                assert spec.tensors[f"blk.{layer}.{target}"].names[0].endswith(f"layers.{layer}.{modules[target]}.weight")


def test_show_explains_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def types(name: str) -> dict[str, Any]:
        form, metadata, divisors = gguf_form(GOLDEN[name]["config"])
        return describe(write(tmp_path / f"{name}.gguf", form, metadata, divisors)).types

    assert types("mixtral") == {
        "embedding": {"F32": 1}, "norms": {"F32": 5}, "head": {"F32": 1}, "attention": {"F32": 8}, "router": {"F32": 2},
        "mlp": {"F32": 6},
    }  # fmt: skip
    assert types("qwen2_moe")["router"] == {"F32": 2 * 2}
    assert types("starcoder2")["biases"] == {"F32": 2 * 8 + 1}
    write(tmp_path / "gemma2.gguf", *gguf_form(GOLDEN["gemma2"]["config"]))
    for name, text in (
        ("mixtral", "vocabulary 64, 4 experts of which 2 are used"),
        ("qwen2_moe", "4 experts of which 2 are used beside a shared one"),
        ("gemma2", "windows of 16 tokens"),
    ):
        main(["show", str(tmp_path / f"{name}.gguf")])
        assert text in " ".join(capsys.readouterr().out.split())
