"""Same bits, whatever runs beside it: logits, log-probabilities, gradients and generated tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_side import Trained, adapter_of, joined, random_pack
from nomoat.data.pack import Pack
from reference import random_lora
from tiny import tiny_llama

pytest.importorskip("nomoat._native")

from nomoat import _native
from nomoat.engine.generate import Sampling, generate, stream
from nomoat.engine.kv import KvType, Sequence
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.engine.stack import Stack

PRECISIONS = ["f32", "bf16", "int8"]
TYPES = ["Q4_1", "Q2_K", "Q6_K", "F32"]
TOKENS = np.random.default_rng(2).integers(3, 271, 40).tolist()


@pytest.fixture(scope="module", params=TYPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide: dict[str, Any] = {"width": 256, "ffn": 512} if request.param.endswith("_K") else {}
    return tiny_llama(tmp_path_factory.mktemp("identity") / "model.gguf", type=request.param, **wide)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return Model.load(path, threads=1)


def stacks_of(model: Model) -> list[Stack | None]:
    """None, one adapter, and two of other ranks and linears."""
    one, two = random_lora(model.spec, rank=4, seed=1), random_lora(model.spec, rank=3, seed=2, targets=("q", "v", "up"))
    return [
        None,
        Stack(model.spec, [(adapter_of(one), 1.0)]),
        Stack(model.spec, [(adapter_of(one), 0.5), (adapter_of(two), 2.0)]),
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_do_not_depend_on_what_follows(model: Model, precision: str) -> None:
    """Prefixes of every length: M = 1 (the decode kernels) to M = 40 (the blocked ones) give the same rows."""
    whole = model.logits(TOKENS, precision=precision)
    for length in [*range(1, 18), 31, 32, 33, 39]:
        np.testing.assert_array_equal(model.logits(TOKENS[:length], precision=precision), whole[:length], str(length))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("which", [0, 2])
def test_a_pack_does_not_depend_on_its_neighbours(model: Model, precision: str, which: int) -> None:
    stack = stacks_of(model)[which]
    packs = [random_pack(model.spec.vocab, lengths, seed) for seed, lengths in enumerate([(3, 5), (1,), (16, 17, 2), (40,)])]
    alone = [model.logprobs(pack, stack=stack, precision=precision) for pack in packs]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        found = model.logprobs(joined([packs[i] for i in order]), stack=stack, precision=precision)
        np.testing.assert_array_equal(found, np.concatenate([alone[i] for i in order]))


def forward_bits(model: Model, precision: str) -> list[bytes]:
    pack = random_pack(model.spec.vocab, (33, 7, 12), seed=3)
    found = []
    for stack in stacks_of(model):
        found += [model.logits(TOKENS, stack=stack, precision=precision), model.logprobs(pack, stack=stack, precision=precision)]
    return [array.tobytes() for array in found]


def train_bits(model: Model, pack: Pack, precision: str) -> list[bytes]:
    trained = Trained(TrainableLora(model.spec, rank=4, alpha=8.0), seed=1)
    _, logp = trained.gradients(model, pack, precision)
    return [np.ascontiguousarray(array).tobytes() for array in (logp, *trained.lora.gradients)]


@pytest.fixture
def one_thread_after() -> Iterator[None]:
    """The thread count belongs to the process: `Model.load(threads=...)` sets it for every model."""
    yield
    _native.set_threads(1)


@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_do_not_change_forward(path: Path, precision: str) -> None:
    alone = forward_bits(Model.load(path, threads=1), precision)
    for threads in (2, 3, 8):
        assert forward_bits(Model.load(path, threads=threads), precision) == alone


@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_threads_and_repetition_do_not_change_gradients(path: Path, precision: str) -> None:
    model = Model.load(path, threads=1)
    pack = random_pack(model.spec.vocab, (33, 7, 12, 1), seed=4)
    alone = train_bits(model, pack, precision)
    assert train_bits(model, pack, precision) == alone
    for threads in (2, 3, 8):
        assert train_bits(Model.load(path, threads=threads), pack, precision) == alone


@pytest.mark.usefixtures("one_thread_after")
def test_threads_do_not_change_the_real_model(smollm2: Path) -> None:
    """Matrices large enough that every kernel splits its work."""
    found = []
    for threads in (1, 2):
        model = Model.load(smollm2, threads=threads)
        tokens = model.tokenizer.encode("Same bits on one thread and on two: " * 4)
        pack = random_pack(model.spec.vocab, (20, 13), seed=6)
        bits = train_bits(model, pack, "bf16")
        found.append([model.logits(tokens[:1]).tobytes(), model.logits(tokens).tobytes(), *bits])
    assert found[0] == found[1]


@pytest.mark.usefixtures("one_thread_after")
@pytest.mark.parametrize("kv_type", ["bf16", "int8"])
def test_threads_that_share_a_long_row_do_not_change_it(tmp_path: Path, kv_type: KvType) -> None:
    """Beyond 1,024 keys, steps of a few rows cut keys and dimensions among the threads."""
    path = tiny_llama(tmp_path / "long.gguf", type="Q4_1", context=2048, heads=6, kv_heads=3, width=96)
    tokens = np.random.default_rng(5).integers(3, 271, 1100).tolist()
    alone = Model.load(path, threads=1, kv_type=kv_type).logits(tokens)
    model = Model.load(path, threads=2, kv_type=kv_type)
    sequence = Sequence()
    model.step([(sequence, tokens[:1050], None)], [])
    for first, last in ((1050, 1051), (1051, 1053), (1053, 1070), (1070, 1100)):
        logits = model.step([(sequence, tokens[first:last], None)], range(last - first))
        np.testing.assert_array_equal(logits, alone[first:last])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_prefill_chunks_and_neighbours_do_not_change_a_row(model: Model, precision: str) -> None:
    """One step holds chunks of two prompts with different adapters and a decode row; each row is what it is alone."""
    stacks = stacks_of(model)
    first, second, third = TOKENS[:23], TOKENS[5:40], TOKENS[2:9]
    expected = [model.logits(t, stack=s, precision=precision) for t, s in zip((first, second, third), stacks, strict=True)]
    a, b, c = Sequence(), Sequence(), Sequence()
    steps = [[(a, 10, 0), (b, 1, 1)], [(b, 16, 1), (c, 7, 2), (a, 3, 0)], [(a, 1, 0), (b, 17, 1)], [(b, 1, 1), (a, 9, 0)]]
    texts = {0: first, 1: second, 2: third}
    found: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for step in steps:
        segments = []
        for sequence, count, which in step:
            begin = len(sequence.tokens)
            segments.append((sequence, texts[which][begin : begin + count], stacks[which]))
        logits = model.step(segments, range(sum(count for _, count, _ in step)), precision=precision)
        row = 0
        for _, count, which in step:
            found[which].append(logits[row : row + count])
            row += count
    for sequence in (a, b, c):
        model.pool(precision).cut(sequence, 0)
    for which, rows in found.items():
        np.testing.assert_array_equal(np.concatenate(rows), expected[which])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_which_others_are_read(model: Model, precision: str) -> None:
    stacks = stacks_of(model)
    segments = [(TOKENS[:9], stacks[0]), (TOKENS[2:3], stacks[1]), (TOKENS[4:20], stacks[2])]
    found = []
    for read in (range(26), [0, 8, 9, 25]):
        sequences = [Sequence() for _ in segments]
        given = [(sequence, *segment) for sequence, segment in zip(sequences, segments, strict=True)]
        found.append(model.step(given, read, precision=precision))
        for sequence in sequences:
            model.pool(precision).cut(sequence, 0)
    np.testing.assert_array_equal(found[0][[0, 8, 9, 25]], found[1])


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_training_and_scoring_see_the_same_model(model: Model, precision: str) -> None:
    """The forward pass of training is the one that scores: log-probabilities agree to the last bit."""
    pack = random_pack(model.spec.vocab, (9, 20), seed=5)
    trained = Trained(TrainableLora(model.spec, rank=4, alpha=8.0), seed=2)
    _, logp = trained.gradients(model, pack, precision)
    stack = Stack(model.spec, [(trained.lora.to_adapter(), 1.0)])
    np.testing.assert_array_equal(model.logprobs(pack, stack=stack, precision=precision), logp)


def test_packed_cache_gives_the_same_bits(path: Path) -> None:
    """The first load packs and stores, the second maps what was stored."""
    first = Model.load(path).logits(TOKENS)
    np.testing.assert_array_equal(Model.load(path).logits(TOKENS), first)


GREEDY = Sampling(temperature=0.0, max_tokens=12)
PROMPTS = [TOKENS[:5], TOKENS[7:8], TOKENS[10:33], TOKENS[3:20]]


def test_generation_does_not_depend_on_the_batch(model: Model) -> None:
    """Prompts with different adapter stacks, alone, together, and through fewer slots than prompts."""
    stacks = [stacks_of(model)[i] for i in (0, 1, 2, 1)]
    alone = [generate(model, [prompt], GREEDY, stacks=[stack])[0].tokens for prompt, stack in zip(PROMPTS, stacks, strict=True)]
    assert len({tuple(tokens) for tokens in alone}) > 1
    for max_batch in (1, 2, 16):
        together = generate(model, PROMPTS, GREEDY, stacks=stacks, max_batch=max_batch)
        assert [list(completion.tokens) for completion in together] == [list(tokens) for tokens in alone]


def test_sampling_depends_on_its_seed_only(model: Model) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=11, max_tokens=12)
    alone = [list(generate(model, [prompt], sampling)[0].tokens) for prompt in PROMPTS]
    assert [list(completion.tokens) for completion in generate(model, PROMPTS, sampling)] == alone
    other = Sampling(temperature=1.5, top_p=0.95, seed=12, max_tokens=12)
    assert [list(generate(model, [prompt], other)[0].tokens) for prompt in PROMPTS] != alone
    mixed = [sampling, other] * len(PROMPTS)
    apart = [list(generate(model, [prompt], each)[0].tokens) for prompt, each in zip(PROMPTS, mixed, strict=False)]
    assert [list(completion.tokens) for completion in generate(model, PROMPTS, mixed[: len(PROMPTS)])] == apart


def test_decoding_equals_scoring(model: Model) -> None:
    """Greedy decoding through the KV cache picks the most likely token of the whole-text pass at every step."""
    for prompt, stack in zip(PROMPTS, stacks_of(model), strict=False):
        completion = generate(model, [prompt], GREEDY, stacks=[stack])[0]
        found = list(completion.tokens)
        logits = model.logits([*prompt, *found], stack=stack)
        assert logits[len(prompt) - 1 : len(prompt) - 1 + len(found)].argmax(-1).tolist() == found


def test_streaming_gives_the_same_text(model: Model) -> None:
    for prompt in PROMPTS:
        assert "".join(stream(model, prompt, GREEDY)) == generate(model, [prompt], GREEDY)[0].text


def test_an_answer_ends_at_a_stop_token_and_keeps_it_out_of_the_text(model: Model) -> None:
    for prompt in PROMPTS:
        tokens = generate(model, [prompt], GREEDY)[0].tokens
        stop = tokens[len(tokens) // 2]
        first = tokens.index(stop)
        ended = generate(model, [prompt], replace(GREEDY, stop_tokens=frozenset({stop})))[0]
        assert (ended.tokens, ended.finish_reason) == (tokens[: first + 1], "stop")
        assert ended.text == model.tokenizer.decode(tokens[:first])


def test_a_prompt_of_several_steps_gives_the_same_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of the first steps is read: what they choose from has no rows."""
    want = generate(model, [TOKENS], Sampling(max_tokens=6))[0].tokens
    monkeypatch.setattr("nomoat.engine.generate.FORWARD_ROWS", 16)
    assert generate(model, [TOKENS], Sampling(max_tokens=6))[0].tokens == want
