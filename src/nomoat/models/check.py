"""Checks that any architecture needs before the engine may trust a model: dimensions that fit together, tensors that exist."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from nomoat.errors import ModelError, printable
from nomoat.files.ggml import ADVICE, BLOCK_SHAPE
from nomoat.models.spec import ModelSpec

#: Weight formats the engine multiplies with; norms are vectors and must be plain floats.
MATRIX_TYPES = tuple(kind.name for kind in BLOCK_SHAPE)
VECTOR_TYPES = ("F32", "F16", "BF16")

#: Routers and experts, in every spelling of GGUF and Hugging Face.
_EXPERTS = re.compile(r"\.ffn_gate_inp|_(ch|sh)?exps?\.|\.ffn_(gate|up|down)\.\d|\.block_sparse_moe\.|\.experts\.|shared_expert")

#: Experts of all layers together: the largest published models have 24,000.
MAX_ALL_EXPERTS = 1 << 15

#: What is known about a tensor of the source file: (shape with rows first, type name).
Known = tuple[tuple[int, ...], str]


def listing(names: Iterable[str], most: int = 12) -> str:
    """`a`, `b` and 5 more."""
    all_names = list(names)
    shown = ", ".join(f"`{printable(name)[:100]}`" for name in all_names[:most])
    return shown + (f" and {len(all_names) - most:,} more" if len(all_names) > most else "")


def shown_name(value: object, fallback: str = "model") -> str:
    """A short printable name of a model."""
    return printable(value if isinstance(value, str) and value else fallback)[:200]


def head_dimension(where: str, *, width: int, heads: int, kv_heads: int, head_dim: int | None) -> int:
    """The head dimension, by default width / heads. Raises ModelError where the three do not fit together."""
    if head_dim is None:
        if width % heads:
            raise ModelError(f"{where}: the embedding length {width:,} is not a multiple of the {heads:,} attention heads")
        head_dim = width // heads
    if heads % kv_heads:
        raise ModelError(f"{where}: {heads:,} attention heads cannot share {kv_heads:,} key/value heads evenly")
    return head_dim


def rotary_dimension(where: str, rope_dim: int, head_dim: int) -> None:
    """Pairs are whole, and within a head. Raises ModelError."""
    if head_dim % 2 or rope_dim % 2 or not 0 < rope_dim <= head_dim:
        raise ModelError(
            f"{where}: rotary embedding over {rope_dim:,} of {head_dim:,} dimensions per head; "
            "both must be even, and the first no larger than the second"
        )


def experts(where: str, counts: Iterable[int], tensors: int | None = None) -> None:
    """The experts of all layers are few enough to be listed, and have three tensors each if the file should have them apart.

    Raises ModelError E_LIMIT or E_ARCH.
    """
    total = sum(counts)
    if total > MAX_ALL_EXPERTS:
        raise ModelError(f"{where}: {total:,} experts in all layers; expected at most {MAX_ALL_EXPERTS:,}", code="E_LIMIT")
    if tensors is not None and 3 * total > tensors:
        raise ModelError(
            f"{where}: {total:,} experts in all layers have {3 * total:,} tensors, but the file holds only {tensors:,}; "
            "it is incomplete, or its expert count is wrong"
        )


def present(where: str, spec: ModelSpec, available: Collection[str]) -> None:
    """Every tensor exists. Raises one ModelError that names all that do not."""
    wanted = _used(spec)
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ModelError(
            f"{where}: {len(missing):,} of {len(wanted):,} tensors are missing: {listing(missing)}; "
            "the file is incomplete, or its layer count is wrong"
        )


def shapes_and_types(where: str, spec: ModelSpec, known: Mapping[str, Known]) -> None:
    """Every tensor has the shape its dimensions ask for, in a format the engine has. Raises ModelError E_SHAPE or E_DTYPE."""
    for name, expected in source_shapes(spec).items():
        shape, kind = known[name]
        if tuple(shape) != expected:
            raise ModelError(
                f"{where}: tensor `{printable(name)}` has shape {tuple(shape)}, but the model's dimensions ask for {expected}",
                code="E_SHAPE",
            )
        supported = VECTOR_TYPES if len(expected) == 1 else MATRIX_TYPES
        if kind not in supported:
            advice = "norms must be plain floats" if len(expected) == 1 else ADVICE
            raise ModelError(
                f"{where}: tensor `{printable(name)}` has type {printable(kind)}, which nomoat does not support; "
                f"{advice} (supported: {', '.join(supported)})",
                code="E_DTYPE",
            )


def source_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Tensor of the source file -> shape: a fused one has the rows of all weights cut out of it, one of E experts an E-th."""
    found: dict[str, tuple[int, ...]] = {}
    for engine, source in spec.tensors.items():
        shape = spec.tensor_shape(engine)
        if source.rows is not None:
            name = source.names[0]
            found[name] = (max(source.first + source.rows, found.get(name, (0,))[0]), *shape[1:])
        elif len(source.names) > 1:
            found |= dict.fromkeys(source.names, shape[1:])
        else:
            found[source.names[0]] = (1, *shape) if source.one_row else shape
    return found


def left_out(where: str, spec: ModelSpec, names: Iterable[str]) -> None:
    """Raises ModelError where tensors of the layers that certainly change the result would not be used: biases, experts."""
    used = _used(spec)
    extra = [name for name in names if name not in used]
    biases = [name for name in extra if name.endswith(".bias")]
    if biases:
        raise ModelError(
            f"{where}: {len(biases):,} biases are in the file, but architecture {spec.architecture} has none there as it is "
            f"described: {listing(biases, 3)}"
        )
    experts = [name for name in extra if _EXPERTS.search(name)]
    if experts:
        raise ModelError(
            f"{where}: {len(experts):,} tensors of experts are in the file that architecture {spec.architecture} does not have "
            f"as it is described ({max(block.experts for block in spec.blocks):,} experts a layer): {listing(experts, 3)}"
        )


def with_unused(spec: ModelSpec, available: Iterable[str], harmless: Collection[str] = ()) -> ModelSpec:
    """The model with a note about the tensors that it does not use, if there are any."""
    used = _used(spec)
    extra = [name for name in available if name not in used and not any(part in name for part in harmless)]
    note = (f"{len(extra):,} tensors are not used: {listing(extra, 4)}",) if extra else ()
    return replace(spec, notes=spec.notes + note)


def _used(spec: ModelSpec) -> dict[str, None]:
    """The tensors of the source file, in the model's order."""
    return dict.fromkeys(name for source in spec.tensors.values() for name in source.names)
