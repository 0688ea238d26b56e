"""Evaluation on the real engine: a tiny random model whose logits say what every figure must be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nomoat.data.mask import Example, tokenize
from nomoat.data.readers import Row, read_examples
from nomoat.engine.generate import Sampling
from nomoat.engine.lora import TrainableLora
from nomoat.engine.model import Model
from nomoat.engine.stack import Stack
from nomoat.evals.compare import compare
from nomoat.evals.perplexity import perplexity, windows
from nomoat.evals.run import evaluate
from tiny import tiny_llama

WORDS = "the rain in the north and the thing that is on the other train "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf"), threads=2)


@pytest.fixture(scope="module")
def stack(model: Model) -> Stack:
    lora = TrainableLora(model.spec, rank=4, alpha=8.0, seed=1)
    rng = np.random.default_rng(0)
    for parameter in lora.parameters:
        parameter[...] = rng.normal(0, 0.2, parameter.shape)
    return Stack(model.spec, [(lora.to_adapter(), 1.0)])


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": WORDS[: 10 + 4 * n], "completion": WORDS[n : n + 6]} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_examples(path)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    out: np.ndarray = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return out


def test_loss_is_what_the_logits_say(model: Model, rows: list[Row], stack: Stack) -> None:
    for adapters in (None, stack):
        result = evaluate(model, rows, "loss", stack=adapters)
        for row, record in zip(rows, result.records, strict=True):
            example = tokenize(row, model.tokenizer, model.template, max_tokens=256)
            assert isinstance(example, Example)
            logp = log_softmax(model.logits(example.tokens.tolist(), stack=adapters))
            at = np.flatnonzero(example.weights)
            nats = -logp[at - 1, example.tokens[at]].mean()
            assert record.score == pytest.approx(nats, rel=1e-4)
            assert record.tokens == len(at)


def test_an_adapter_changes_the_score_and_the_comparison_sees_it(model: Model, rows: list[Row], stack: Stack) -> None:
    comparison = compare(evaluate(model, rows, "loss"), evaluate(model, rows, "loss", stack=stack))
    assert comparison.difference != 0
    assert comparison.gained + comparison.lost == len(rows)


def test_answers_do_not_depend_on_the_batch(model: Model, rows: list[Row], stack: Stack) -> None:
    alone, together = (
        evaluate(model, rows, "rouge", stack=stack, sampling=Sampling(max_tokens=12), max_batch=size).records for size in (1, 16)
    )
    assert alone == together
    assert all(0 < record.tokens <= 12 for record in alone)


def test_a_model_and_rows_by_name(model: Model, rows: list[Row], tmp_path: Path) -> None:
    import nomoat

    by_name = nomoat.evaluate(str(model.path), tmp_path / "rows.jsonl", "loss")
    assert by_name.score == pytest.approx(evaluate(model, rows, "loss").score, rel=1e-6)


def test_perplexity_is_what_the_logits_say(model: Model) -> None:
    text = WORDS * 12
    tokens = model.tokenizer.encode(text)
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    for convention in ("llama.cpp", "strided"):
        nats: list[float] = []
        for window in windows(tokens, 64, convention, bos=bos):
            logp = log_softmax(model.logits(window.tokens))
            nats += [-logp[t - 1, window.tokens[t]] for t in range(window.first, len(window.tokens))]
        result = perplexity(model, text, context=64, convention=convention)
        assert result.tokens == len(nats)
        assert result.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)


def test_a_chat_reuses_what_it_has_computed(model: Model) -> None:
    from nomoat.cli.conversation import Conversation

    def talk(fresh: bool) -> list[str]:
        conversation = Conversation(model, Sampling(max_tokens=8))
        said = []
        for question in ("the rain", "in the north", "and"):
            said.append("".join(conversation.ask(question)))
            assert conversation.timing.tokens > 0
            if fresh:
                conversation._session.release()
        return said

    assert talk(fresh=False) == talk(fresh=True)


def test_a_stopped_answer_leaves_a_chat_that_goes_on(model: Model) -> None:
    from nomoat.cli.conversation import Conversation

    conversation = Conversation(model, Sampling(max_tokens=20))
    pieces = conversation.ask("the rain in the north")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": first}
    assert conversation.timing.finish_reason == "stopped"
    assert 1 <= conversation.timing.tokens < 20
    again = "".join(conversation.ask("and then"))
    other = Conversation(model, Sampling(max_tokens=20))
    other.messages = conversation.messages[:-2]
    assert "".join(other.ask("and then")) == again


def test_the_command_line_end_to_end(model: Model, tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    from nomoat.cli import main

    name, file, output = str(model.path), str(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    assert main(["eval", name, file, "--metric", "rouge", "--max-tokens", "5", "--output", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][name]["n"] == len(rows)
    assert len(output.read_text().splitlines()) == len(rows)
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 12)
    assert main(["eval", name, "--perplexity", str(text), "--context", "64"]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
    assert main(["run", name, "--temperature", "0", "--max-tokens", "5", "--json", "the rain"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert 1 <= body["tokens"] <= 5
    assert main(["eval", name, file, "--max-tokens", "4000"]) == 2
    assert "E_CONTEXT" in capsys.readouterr().err
