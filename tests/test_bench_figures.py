"""The figures of the comparisons: divergence and perplexity, the shared training plan, speed ratios."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench import quality, train_vs_peft
from bench.datasets import ask
from bench.train_plan import Plan, padded

from nomoat.evals.perplexity import Window
from nomoat.files.gguf import open_gguf
from nomoat.text.template import ChatTemplate
from nomoat.text.tokenizer import Tokenizer
from tiny import tiny_llama

LOGITS = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], np.float32)


def test_divergence_is_the_textbook_sum() -> None:
    p, q = quality.log_softmax(LOGITS), quality.log_softmax(LOGITS[:, ::-1])
    expected = [sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    assert np.exp(p).sum(-1) == pytest.approx([1, 1])
    assert quality.divergence(p, q) == pytest.approx(expected)
    assert quality.divergence(p, p) == pytest.approx([0, 0])
    assert quality.divergence(p, q).min() > 0.5


def test_logits_of_any_size_have_a_softmax() -> None:
    assert np.exp(quality.log_softmax(LOGITS + np.float32(5e4))).sum(-1) == pytest.approx([1, 1])


ERRORS = {"f32": 0.0, "bf16": 0.01, "int8": 0.1}


class FakeModel:
    """Random logits, off by the precision's error."""

    def logits(self, tokens: list[int], *, precision: str) -> Any:
        exact = np.random.default_rng(len(tokens)).normal(size=(len(tokens), 11)).astype(np.float32)
        return exact + ERRORS[precision] * np.random.default_rng(1).normal(size=exact.shape).astype(np.float32)


class FakePeer:
    """Writes the logits of its rows, as llama.cpp's side does."""

    def ask(self, op: str, *, tokens: list[int], first: int, last: int, out: str) -> dict[str, float]:
        assert op == "logits"
        np.save(out, FakeModel().logits(tokens, precision="bf16")[first:last])
        return {}


def test_engines_are_scored_on_the_same_rows() -> None:
    windows = [Window([1, 2, 3, 4, 5, 6, 7, 8], 5), Window([8, 7, 6, 5, 4, 3, 2, 1], 5)]
    said: list[str] = []
    models: Any = {"bf16": FakeModel(), "int8": FakeModel()}
    scores = quality.measure(models, FakePeer(), windows, progress=said.append)  # type: ignore[arg-type]
    found = {name: score.summary() for name, score in scores.items()}
    exact = quality.log_softmax(FakeModel().logits(windows[0].tokens, precision="f32"))
    nats = [-exact[row, window.tokens[row + 1]] for window in windows for row in (4, 5, 6)]
    assert found[quality.REFERENCE]["perplexity"] == pytest.approx(math.exp(sum(nats) / 6))
    assert found[quality.REFERENCE]["kl"] == 0
    assert found[quality.REFERENCE]["same_first_token"] == 1
    assert found["nomoat bf16"] == found[quality.PEER]  # the same logits, by two ways
    assert 0 < found["nomoat bf16"]["kl"] < found["nomoat int8"]["kl"]
    verdict = quality.compare(scores)
    assert verdict["kl_ratio"] == pytest.approx(found["nomoat int8"]["kl"] / found[quality.PEER]["kl"])
    assert verdict["perplexity_ratio"] == pytest.approx(found["nomoat int8"]["perplexity"] / found[quality.PEER]["perplexity"])
    assert verdict["kl_difference"] > 0
    assert len(said) == 2
    assert len(quality.table(found).splitlines()) == 6
    alone = quality.measure(models, None, windows, progress=said.append)
    assert {name: score.summary() for name, score in alone.items()} == {n: s for n, s in found.items() if n != quality.PEER}


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan(
        [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)],
        [np.array([0, 0, 1], np.float32), np.array([0, 0.5], np.float32)],
        [[1, 0], [1]],
        [np.array([5], np.int32), np.array([5, 6], np.int32)],
    )
    plan.save(tmp_path / "plan.npz")
    again = Plan.load(tmp_path / "plan.npz")
    assert again.batches == [[1, 0], [1]]
    for own, other in ((plan.tokens, again.tokens), (plan.weights, again.weights), (plan.prompts, again.prompts)):
        assert [part.tolist() for part in own] == [part.tolist() for part in other]
    assert [again.step_tokens(0), again.step_tokens(1)] == [5, 2]
    assert [again.loss_tokens(0), again.loss_tokens(1)] == [2, 1]


def test_padding_is_masked_and_not_learned() -> None:
    tokens = [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)]
    ids, mask, labels = padded(tokens, [np.array([0, 1, 1], np.float32), np.array([0, 1], np.float32)], filler=0)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_both_trainers_get_the_rows_up_to_the_last_learned_token(tmp_path: Path) -> None:
    with open_gguf(tiny_llama(tmp_path / "tiny.gguf")) as file:
        tokenizer = Tokenizer.from_gguf(file)
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}|\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = ChatTemplate(source, bos_token="", eos_token="")
    rows = [ask(f"question {number}", f"answer {number}") for number in range(5)]
    longer = [{"messages": [*row["messages"], {"role": "user", "content": "thanks"}]} for row in rows]
    plan, expected = train_vs_peft.make_plan(longer, rows[:2], tokenizer, template, batch=2)
    assert sorted(row for batch in plan.batches for row in batch) == [0, 1, 2, 3, 4]
    assert [len(batch) for batch in plan.batches] == [2, 2, 1]
    for row, (tokens, weights) in enumerate(zip(plan.tokens, plan.weights, strict=True)):
        assert weights[-1] != 0
        assert tokenizer.decode(tokens.tolist()) == f"user: question {row}|\nassistant: answer {row}|\n"
    assert [tokenizer.decode(prompt.tolist()) for prompt in plan.prompts] == [
        f"user: question {row}|\nassistant: " for row in range(2)
    ]
    assert expected == ["answer 0", "answer 1"]


def test_dense_rows_are_pieces_of_one_text_with_all_but_the_first_token_learned() -> None:
    plan = train_vs_peft.dense_plan(list(range(100)), rows=3, length=8, steps=4)
    assert [len(batch) for batch in plan.batches] == [3, 3, 3, 3] and plan.step_tokens(0) == 24
    assert np.concatenate(plan.tokens).tolist() == list(range(96)) and plan.loss_tokens(3) == 21
    with pytest.raises(SystemExit, match="96 tokens of text are needed, and there are 95"):
        train_vs_peft.dense_plan(list(range(95)), rows=3, length=8, steps=4)


def test_a_shape_is_rows_by_length() -> None:
    assert train_vs_peft.shape("4x512") == (4, 512)
    for wrong in ("4", "x512", "4x1", "0x8", "4x512x2"):
        with pytest.raises(argparse.ArgumentTypeError, match="ROWSxLENGTH"):
            train_vs_peft.shape(wrong)


def test_the_peers_schedule_is_ours() -> None:
    rates = train_vs_peft.schedule(100, 1e-3)
    assert len(rates) == 100
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert max(rates) == pytest.approx(1e-3)
    assert 0 < rates[-1] < 2e-5


def test_speed_is_a_ratio_of_medians() -> None:
    found = train_vs_peft.speed_summary({"nomoat": [30.0, 60.0, 90.0, 60.0], "peft": [10.0, 20.0, 10.0, 20.0]})
    assert found["tokens_per_second"] == {"nomoat": 60, "peft": 15}
    assert found["ratio"] == 4
    assert found["ratio_quartiles"] == [3, 7.5]
    assert found["steps"] == 4


class FakeSide:
    """Trains by counting and knows one answer."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.asked: list[int] = []

    def ask(self, op: str, **values: Any) -> dict[str, Any]:
        if op == "answers":
            return {"seconds": 1.0, "tokens": [self.answer, self.answer]}
        self.asked.append(values["count"])
        return {"seconds": 0.5, "losses": [2.0] * values["count"], "peak_rss_mb": 7.0}

    def __enter__(self) -> FakeSide:
        return self

    def __exit__(self, *error: object) -> None:
        self.asked.append(-1)


def test_an_epoch_counts_every_step_and_grades_the_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(
        decode=lambda ids: " ".join(map(str, ids)), encode=lambda text, add_bos: text.split(), eos_ids={2}
    )
    plan = Plan([np.arange(4, dtype=np.int32)], [np.ones(4, np.float32)], [[0]] * 23, [np.arange(2, dtype=np.int32)] * 2)
    bench = train_vs_peft.Bench(Path("model"), plan, ["7 8", "9"], tokenizer, 2, Path("python"))
    side = FakeSide([7, 8])
    monkeypatch.setattr(bench, "start", lambda name, rate, folder: (side, {"version": "1"}))
    found = bench.epoch("peft", 1e-3, tmp_path)
    assert side.asked == [10, 10, 3, -1]
    assert found["accuracy"] == 0.5
    assert found["tokens_per_second"] == pytest.approx(23 * 4 / 1.5)
    assert found["train_seconds"] == 1.5
    assert bench.answering("nomoat") == {"limit": 20}
    assert bench.answering("peft") == {"limit": 20, "ends": [2]}
    assert "50.0%" in train_vs_peft.table([found])
