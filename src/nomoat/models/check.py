"""Checks that any architecture needs before the engine may trust a model: dimensions that fit together, tensors that exist."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from nomoat.errors import ModelError, printable
from nomoat.files.ggml import ADVICE, BLOCK_SHAPE
from nomoat.models.spec import ModelSpec

#: Weight formats the engine multiplies with; norms are vectors and must be plain floats.
MATRIX_TYPES = tuple(kind.name for kind in BLOCK_SHAPE)
VECTOR_TYPES = ("F32", "F16", "BF16")

#: What is known about a tensor of the source file: (shape with rows first, type name).
Known = tuple[tuple[int, ...], str]


def listing(names: Iterable[str], most: int = 12) -> str:
    """`a`, `b` and 5 more."""
    all_names = list(names)
    shown = ", ".join(f"`{printable(name)[:100]}`" for name in all_names[:most])
    return shown + (f" and {len(all_names) - most:,} more" if len(all_names) > most else "")


def dimensions(
    where: str, *, width: int, heads: int, kv_heads: int, head_dim: int | None, rope_dim: int | None
) -> tuple[int, int]:
    """(head_dim, rope_dim) with their defaults, width / heads and head_dim. Raises ModelError where they do not fit together."""
    if head_dim is None:
        if width % heads:
            raise ModelError(f"{where}: the embedding length {width:,} is not a multiple of the {heads:,} attention heads")
        head_dim = width // heads
    if heads % kv_heads:
        raise ModelError(f"{where}: {heads:,} attention heads cannot share {kv_heads:,} key/value heads evenly")
    rope_dim = head_dim if rope_dim is None else rope_dim
    if head_dim % 2 or rope_dim % 2 or not 0 < rope_dim <= head_dim:
        raise ModelError(
            f"{where}: rotary embedding over {rope_dim:,} of {head_dim:,} dimensions per head; "
            "both must be even, and the first no larger than the second"
        )
    return head_dim, rope_dim


def names(layers: int, tied_head: bool, top: Mapping[str, str], layer: Mapping[str, str]) -> dict[str, str]:
    """Engine name -> source name of every weight. `layer` values hold `{i}`."""
    found = {engine: source for engine, source in top.items() if not (tied_head and engine == "head")}
    for i in range(layers):
        found |= {f"blk.{i}.{engine}": source.format(i=i) for engine, source in layer.items()}
    return found


def present(where: str, wanted: Mapping[str, str], available: Collection[str]) -> None:
    """Every tensor exists. Raises one ModelError that names all that do not."""
    missing = [source for source in wanted.values() if source not in available]
    if missing:
        raise ModelError(
            f"{where}: {len(missing):,} of {len(wanted):,} tensors are missing: {listing(missing)}; "
            "the file is incomplete, or its layer count is wrong"
        )


def shapes_and_types(where: str, spec: ModelSpec, known: Mapping[str, Known]) -> None:
    """Every tensor has the shape its dimensions ask for, in a format the engine has. Raises ModelError E_SHAPE or E_DTYPE."""
    for engine, source in spec.tensors.items():
        shape, kind = known[source]
        expected = spec.tensor_shape(engine)
        if tuple(shape) != expected:
            raise ModelError(
                f"{where}: tensor `{printable(source)}` has shape {tuple(shape)}, but the model's dimensions ask for {expected}",
                code="E_SHAPE",
            )
        supported = VECTOR_TYPES if len(expected) == 1 else MATRIX_TYPES
        if kind not in supported:
            advice = "norms must be plain floats" if len(expected) == 1 else ADVICE
            raise ModelError(
                f"{where}: tensor `{printable(source)}` has type {printable(kind)}, which nomoat does not support; "
                f"{advice} (supported: {', '.join(supported)})",
                code="E_DTYPE",
            )


def unused(wanted: Mapping[str, str], available: Iterable[str], harmless: Collection[str] = ()) -> tuple[str, ...]:
    """A note about the tensors that the model does not use, or nothing."""
    used = set(wanted.values())
    extra = [name for name in available if name not in used and not any(part in name for part in harmless)]
    return (f"{len(extra):,} tensors are not used: {listing(extra, 4)}",) if extra else ()
