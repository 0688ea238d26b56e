"""Builds GGUF files field by field, so that any single field can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

Number = int | float
Value = Number | str | bytes | Sequence[Number] | Sequence[str] | Sequence[bytes]


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string; `length` lies about its length."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name: str | bytes, kind: int, value: Value = 0, *, element: int = U32) -> bytes:
    """One key with its value; `element` is the type of a list's elements."""
    return string(name) + struct.pack("<I", kind) + _value(kind, value, element)


def _value(kind: int, value: Value, element: int) -> bytes:
    if kind == STRING:
        assert isinstance(value, str | bytes)
        return string(value)
    if kind == ARRAY:
        assert isinstance(value, list)
        return array_head(element, len(value)) + b"".join(_value(element, item, element) for item in value)
    if kind not in _FORMATS:  # an unknown type: four bytes of something
        return b"\1\0\0\0"
    return struct.pack("<" + _FORMATS[kind], value)


def array_head(element: int, count: int) -> bytes:
    """Element type and count of an array, without its elements."""
    return struct.pack("<IQ", element, count)


@dataclass(frozen=True)
class Tensor:
    """One tensor. `dims` contiguous first, as the file has them. What is None is computed; anything else is written as it is."""

    name: str | bytes
    dims: tuple[int, ...]
    type: int = 0
    data: bytes | None = None
    offset: int | None = None
    name_length: int | None = None
    n_dims: int | None = None

    def bytes(self) -> bytes:
        if self.data is not None:
            return self.data
        block, size = {0: (1, 4), 1: (1, 2), 30: (1, 2), 8: (32, 34), 2: (32, 18), 12: (256, 144)}[self.type]
        elements = 1
        for dim in self.dims:
            elements *= dim
        return bytes(i * 37 % 64 for i in range(elements // block * size))


@dataclass(frozen=True)
class Gguf:
    """A whole file. `keys` are encoded keys by name, so that one can be replaced or left out."""

    keys: dict[str, bytes] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32
    tail: bytes = b""

    def with_key(self, name: str, kind: int, value: Value = 0, *, element: int = U32) -> Gguf:
        """The same file with one more, or another, value of a key."""
        return self.with_raw(name, key(name, kind, value, element=element))

    def with_raw(self, name: str, encoded: bytes) -> Gguf:
        """The same file with a key written as given."""
        return replace(self, keys=self.keys | {name: encoded})

    def without(self, name: str) -> Gguf:
        """The same file without a key."""
        return replace(self, keys={k: v for k, v in self.keys.items() if k != name})

    def with_tensor(self, target: str, /, **changes: object) -> Gguf:
        """The same file with fields of one tensor changed."""
        changed = tuple(replace(t, **changes) if t.name == target else t for t in self.tensors)  # type: ignore[arg-type]
        assert changed != self.tensors
        return replace(self, tensors=changed)

    def header(self) -> bytes:
        """All up to the padding before the tensor data."""
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.keys) if self.key_count is None else self.key_count
        out = [self.magic, struct.pack("<IQQ", self.version, tensors, keys), *self.keys.values()]
        offset = 0
        for tensor in self.tensors:
            n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            out.append(string(tensor.name, tensor.name_length))
            out.append(struct.pack(f"<I{len(tensor.dims)}QI", n_dims, *tensor.dims, tensor.type & 0xFFFFFFFF))
            out.append(struct.pack("<Q", offset if tensor.offset is None else tensor.offset))
            offset += self._padded(len(tensor.bytes()))
        return b"".join(out)

    def build(self) -> bytes:
        """The file's bytes."""
        out = bytearray(self.header())
        out += b"\0" * (self._padded(len(out)) - len(out))
        for tensor in self.tensors:
            data = tensor.bytes()
            out += data + b"\0" * (self._padded(len(data)) - len(data))
        return bytes(out) + self.tail

    def _padded(self, size: int) -> int:
        return size + -size % max(self.alignment, 1)


def llama_keys(**changes: int) -> dict[str, bytes]:
    """The full set of llama keys for a model of width 32, 2 heads of 16, 1 layer, 24 feed-forward, 16 tokens."""
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 24}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16, "vocab_size": 16} | changes
    keys = {
        "general.architecture": key("general.architecture", STRING, "llama"),
        "general.name": key("general.name", STRING, "tiny"),
        "general.alignment": key("general.alignment", U32, 32),
    }
    keys |= {f"llama.{name}": key(f"llama.{name}", U32, value) for name, value in sizes.items()}
    floats = {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0}
    keys |= {name: key(name, F32, value) for name, value in floats.items()}
    return keys | tokenizer_keys()


#: A SentencePiece vocabulary needs no merges and may be as small as this.
TOKENS = ["<unk>", "<s>", "</s>", "<0x0A>", "<0x41>", "\u2581", "a", "b", "c", "d", "e", "f", "ab", "\u2581a", "cd", "ef"]
TYPES = [2, 3, 3, 6, 6, *[1] * 11]


def tokenizer_keys() -> dict[str, bytes]:
    """`tokenizer.ggml.*` of 16 tokens."""
    name = "tokenizer.ggml."
    return {
        name + "model": key(name + "model", STRING, "llama"),
        name + "pre": key(name + "pre", STRING, "default"),
        name + "tokens": key(name + "tokens", ARRAY, TOKENS, element=STRING),
        name + "scores": key(name + "scores", ARRAY, [-float(i) for i in range(16)], element=F32),
        name + "token_type": key(name + "token_type", ARRAY, TYPES, element=I32),
        name + "bos_token_id": key(name + "bos_token_id", U32, 1),
        name + "eos_token_id": key(name + "eos_token_id", U32, 2),
        name + "unknown_token_id": key(name + "unknown_token_id", U32, 0),
        name + "add_bos_token": key(name + "add_bos_token", BOOL, 1),
    }


def small() -> Gguf:
    """Three tensors of three types: what the file format cases patch."""
    return Gguf(
        llama_keys(),
        (
            Tensor("token_embd.weight", (32, 16), 8),
            Tensor("output_norm.weight", (32,)),
            Tensor("blk.0.attn_q.weight", (32, 5), 1),
        ),
    )


def model() -> Gguf:
    """A whole one-layer model: what the model and tokenizer cases patch."""
    layer = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_output": (32, 32)}
    layer |= {"ffn_norm": (32,), "ffn_gate": (32, 24), "ffn_up": (32, 24), "ffn_down": (24, 32)}
    tensors = [Tensor("token_embd.weight", (32, 16)), Tensor("output_norm.weight", (32,))]
    tensors += [Tensor(f"blk.0.{name}.weight", dims) for name, dims in layer.items()]
    return Gguf(llama_keys(), tuple(tensors))
