"""Rows G21 to G25, G39, G40 and G42 to G45: well-formed GGUF files that describe a model or a vocabulary that cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from hostile.case import Case, case
from hostile.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    TOKENS,
    TYPES,
    U16,
    U32,
    U64,
    Gguf,
    Tensor,
    Value,
    key,
    llama_keys,
    model,
)

SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
#: Keys that may be absent: they have a default in the specification, or only add to what other keys say.
OPTIONAL = frozenset(
    ("general.name", "general.alignment", "llama.rope.dimension_count", "llama.vocab_size",
     "llama.rope.freq_base", "tokenizer.ggml.pre", "tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id",
     "tokenizer.ggml.eos_token_id", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_bos_token")
)  # fmt: skip
#: Keys that describe the file to people, or that only another kind of vocabulary has.
NOT_READ = frozenset(("general.name", "tokenizer.ggml.pre"))
WRONG = ("E_ARCH", "E_LIMIT", "E_TYPE")
TOKENIZER = "tokenizer.ggml."


def cases() -> Iterator[Case]:
    """Every case of these rows."""
    yield case("G21", "valid", model().build())
    yield from _missing_and_mistyped()
    yield from _numbers()
    yield from _tensors()
    yield from _special_ids()
    yield from _vocabulary()
    yield from _merges()


def _missing_and_mistyped() -> Iterator[Case]:
    good = model()
    for name in good.keys:
        # Without its number of key/value heads the model has as many as heads, which its tensors contradict.
        codes = () if name in OPTIONAL else ("E_SHAPE",) if name.endswith("_kv") else ("E_ARCH", "E_MISSING")
        yield case("G21", f"no-{name}", good.without(name).build(), *codes)
        if name in NOT_READ or name == "general.alignment":
            continue
        values: dict[int, Value] = {U32: 3, STRING: "3", F32: 3.0, BOOL: 1, ARRAY: [3, 4]}
        for kind, value in values.items():
            if not _same_kind(name, kind):
                # some sizes may be arrays, with one item for each layer
                codes = ("E_SHAPE",) if kind == ARRAY and name.endswith(PER_LAYER) else ("E_TYPE",)
                yield case("G24", f"{name}-as-{kind}", good.with_key(name, kind, value).build(), *codes)
    for name in ("tokens", "scores", "token_type"):
        wrong = key(TOKENIZER + name, ARRAY, ["x"] * 16, element=STRING)
        array = key(TOKENIZER + name, ARRAY, [1] * 16, element=U32) if name == "tokens" else wrong
        yield case("G24", f"{name}-of-the-wrong-elements", good.with_raw(TOKENIZER + name, array).build(), "E_TYPE")
    yield case("G21", "unknown-architecture", good.with_key("general.architecture", STRING, "lama\x1b[31m").build(), "E_ARCH")
    yield case("G21", "adapter", good.with_key("general.type", STRING, "adapter").build(), "E_ARCH")


def _same_kind(name: str, kind: int) -> bool:
    """Whether the model's own key has a value of this kind."""
    if name.endswith(("architecture", ".model", ".pre")):
        return kind == STRING
    if name.endswith((".tokens", ".scores", ".token_type")):
        return kind == ARRAY
    if name.endswith(("epsilon", "freq_base")):
        return kind == F32
    return kind == (BOOL if name.endswith("add_bos_token") else U32)


def _numbers() -> Iterator[Case]:
    good = model()
    for name in (*SIZES, "attention.head_count_kv", "rope.dimension_count"):
        yield case("G22", f"{name}-0", good.with_key(f"llama.{name}", U32, 0).build(), "E_ARCH")
        yield case("G23", f"{name}-2^31", good.with_key(f"llama.{name}", U32, 2**31).build(), "E_LIMIT")
        yield case("G23", f"{name}-2^32-1", good.with_key(f"llama.{name}", U32, 2**32 - 1).build(), "E_LIMIT")
        yield case("G23", f"{name}-2^63", good.with_key(f"llama.{name}", U64, 2**63).build(), "E_LIMIT")
        yield case("G23", f"{name}-negative", good.with_key(f"llama.{name}", I32, -2).build(), "E_ARCH")
    for name, value in {"embedding_length": 33, "attention.head_count": 3, "attention.head_count_kv": 3}.items():
        yield case("G22", f"{name}-{value}", good.with_key(f"llama.{name}", U32, value).build(), "E_ARCH")
    for value in (15, 18, 64):
        yield case("G22", f"rope-{value}", good.with_key("llama.rope.dimension_count", U32, value).build(), "E_ARCH")
    for value in (1, 10**6):
        yield case("G23", f"experts-{value}", good.with_key("llama.expert_count", U32, value).build(), "E_ARCH", "E_LIMIT")
    crowd = good.with_key("llama.expert_count", U32, 1024).with_key("llama.expert_used_count", U32, 2)
    yield case("G23", "experts-of-1024-layers", crowd.with_key("llama.block_count", U32, 1024).build(), "E_LIMIT")
    yield case("G23", "more-experts-used-than-there-are", crowd.with_key("llama.expert_used_count", U32, 1025).build(), "E_LIMIT")
    yield case("G24", "experts-as-array", crowd.with_key("llama.expert_count", ARRAY, [8]).build(), "E_TYPE")
    for count in (0, 2, 10**6):
        heads = good.with_key("llama.attention.head_count", ARRAY, [2] * count)
        yield case("G24", f"heads-of-{count}-layers", heads.build(), "E_SHAPE")
    yield case("G23", "vocab-2^32-1", good.with_key("llama.vocab_size", U32, 2**32 - 1).build(), "E_LIMIT")
    for name in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        for text, number in {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.items():
            yield case("G25", f"{name}-{text}", good.with_key(f"llama.{name}", F32, number).build(), "E_NONFINITE")
        for number in (0.0, -1.0, 1e30, 1e-30):
            yield case("G25", f"{name}-{number}", good.with_key(f"llama.{name}", F32, number).build(), "E_LIMIT")
    for number in (math.nan, -2.0, 1e30):
        scaled = good.with_key("llama.rope.scaling.factor", F32, number)
        yield case("G25", f"rope-factor-{number}", scaled.build(), "E_NONFINITE", "E_LIMIT")


def _tensors() -> Iterator[Case]:
    good = model()
    for tensor in good.tensors:
        name = str(tensor.name)
        fewer = replace(good, tensors=tuple(t for t in good.tensors if t.name != name))
        yield case("G40", f"no-{name}", fewer.build(), "E_ARCH")
        yield case("G39", f"{name}-too-long", good.with_tensor(name, dims=(*tensor.dims[:-1], tensor.dims[-1] * 2)).build(),
                   "E_SHAPE", "E_ARCH")  # fmt: skip
        yield case("G39", f"{name}-3d", good.with_tensor(name, dims=(*tensor.dims, 1, 2)).build(), "E_SHAPE", "E_ARCH")
        if len(tensor.dims) == 2:
            turned = good.with_tensor(name, dims=(tensor.dims[0] * 2, tensor.dims[1] // 2))
            yield case("G39", f"{name}-turned", turned.build(), "E_SHAPE", "E_ARCH")
    yield case("G39", "embedding-rows-under-vocabulary", good.with_tensor("token_embd.weight", dims=(32, 15)).build(),
               "E_SHAPE", "E_ARCH")  # fmt: skip
    yield case("G39", "quantized-norm", good.with_tensor("output_norm.weight", type=8).build(), "E_DTYPE")
    extra = replace(good, tensors=(*good.tensors, Tensor("blk.0.unknown.weight", (8,))))
    yield case("G40", "extra-tensor-is-a-note", extra.build())
    for name, codes in {"attn_q": (), "ffn_down": (), "attn_norm": ("E_ARCH",), "unknown": ("E_ARCH",)}.items():
        bias = replace(good, tensors=(*good.tensors, Tensor(f"blk.0.{name}.bias", (32,))))
        yield case("G40", f"bias-of-{name}", bias.build(), *codes)
    first = tuple(Tensor(f"blk.{i}.ffn_{part}.0.weight", (8,)) for i in range(32) for part in ("gate", "up", "down"))
    keys = {"block_count": 32, "expert_count": 1024, "expert_used_count": 2}
    crowd = replace(good, tensors=(*good.tensors, *first), keys=good.keys | llama_keys(**keys))
    yield case("G40", "first-experts-of-32-layers", crowd.build(), "E_ARCH")
    for name, count in {"one-more": 2, "1024": 1024}.items():
        yield case("G40", f"layers-{name}", good.with_key("llama.block_count", U32, count).build(), "E_ARCH")


def _special_ids() -> Iterator[Case]:
    good = model()
    for name in ("bos", "eos", "unknown", "padding", "eot"):
        for kind, value in ((U32, 16), (U32, 2**32 - 1), (I32, -1)):
            key_name = f"{TOKENIZER}{name}_token_id"
            yield case("G42", f"{name}={value}", good.with_key(key_name, kind, value).build(), "E_ARCH", "E_RANGE")
    # Tokens and embedding rows agree; the key, which many files lack, then counts for nothing.
    yield case("G42", "vocab-size-under-tokens-is-fine", good.with_key("llama.vocab_size", U32, 15).build())
    yield case("G42", "vocab-size-over-tokens", good.with_key("llama.vocab_size", U32, 17).build(), "E_ARCH", "E_SHAPE")


def _vocabulary() -> Iterator[Case]:
    good = model()

    def tokens(name: str, index: int, text: str | bytes, *codes: str) -> Case:
        changed = [t.encode() for t in TOKENS]
        changed[index] = text.encode() if isinstance(text, str) else text
        return case("G43", name, good.with_key(TOKENIZER + "tokens", ARRAY, changed, element=STRING).build(), *codes)

    yield tokens("empty", 8, "", "E_TYPE")
    yield tokens("1-MB", 8, "x" * 1_000_000, "E_LIMIT")
    yield tokens("1-MB-control", 1, "x" * 1_000_000, "E_LIMIT")
    yield tokens("not-utf8", 8, b"\xff\xfe", "E_UTF8", "E_TYPE")
    for text in ("<0x-1>", "<0xZZ>", "<0x>", "<0x100>", "0x0A", "<0x0A", "<0x\u0661\u0661>"):
        yield tokens(f"byte-{text!a}", 3, text, "E_TYPE")
    yield tokens("byte-twice", 3, "<0x41>", "E_DUP")
    yield tokens("escape-is-fine", 8, "\x1b[31m")
    for count in (15, 17):
        scores = [0.0] * count
        yield case("G44", f"scores-{count}", good.with_key(TOKENIZER + "scores", ARRAY, scores, element=F32).build(), "E_SHAPE")
        types = [1] * count
        yield case("G44", f"types-{count}", good.with_key(TOKENIZER + "token_type", ARRAY, types, element=I32).build(), "E_SHAPE")
    for value in (99, -1, 7):
        types = [*TYPES[:-1], value]
        yield case("G44", f"type={value}", good.with_key(TOKENIZER + "token_type", ARRAY, types, element=I32).build(), "E_TYPE")
    nan = [0.0] * 15 + [math.nan]
    yield case("G44", "score-nan", good.with_key(TOKENIZER + "scores", ARRAY, nan, element=F32).build(), "E_NONFINITE")
    yield case("G44", "no-tokens", good.with_key(TOKENIZER + "tokens", ARRAY, [], element=STRING).build(), *WRONG)
    yield case("G44", "unknown-kind", good.with_key(TOKENIZER + "model", STRING, "\x1b[31m").build(), "E_TOKENIZER")


def _byte_level(merges: list[str] | list[bytes], pre: str = "gpt-2") -> Gguf:
    """The model with a byte-level vocabulary and these merges."""
    good = model().with_key(TOKENIZER + "model", STRING, "gpt2").with_key(TOKENIZER + "pre", STRING, pre)
    plain = ["<unk>", "<s>", "</s>", "A", "B", "\u0120", *TOKENS[6:13], "\u0120a", "cd", "ef"]
    good = good.with_key(TOKENIZER + "tokens", ARRAY, plain, element=STRING).without(TOKENIZER + "scores")
    good = good.with_key(TOKENIZER + "token_type", ARRAY, [2, 3, 3, *[1] * 13], element=I32)
    return good.with_key(TOKENIZER + "merges", ARRAY, merges, element=STRING)


def _merges() -> Iterator[Case]:
    good = _byte_level(["a b", "c d", "e f", "\u0120 a"])
    yield case("G45", "valid", good.build())
    yield case("G45", "no-merges", good.without(TOKENIZER + "merges").build(), "E_ARCH", "E_MISSING")
    yield case("G45", "unknown-pre", _byte_level(["a b"], "made-up\x1b[0m").build(), "E_PRE", "E_TOKENIZER")
    bad = {"unknown-left": "x b", "unknown-right": "a x", "unknown-result": "b a", "no-space": "ab", "empty": "", "space": " "}
    for name, merge in bad.items():
        yield case("G45", name, _byte_level(["a b", merge]).build(), "E_TYPE")
    yield case("G45", "not-utf8", _byte_level([b"a \xff"]).build(), "E_UTF8", "E_TYPE")
    yield case("G45", "as-numbers", good.with_key(TOKENIZER + "merges", ARRAY, [1, 2], element=U16).build(), "E_TYPE")
    yield case("G45", "as-string", good.with_key(TOKENIZER + "merges", STRING, "a b").build(), "E_TYPE")
