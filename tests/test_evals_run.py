"""Evaluation from rows to a result: prompts, grading, limits, records, loss, and comparison of two results."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

import scripted
from nomoat.data.readers import Row, read_examples
from nomoat.engine.generate import Sampling
from nomoat.errors import DataError, InputError
from nomoat.evals import report
from nomoat.evals.compare import compare
from nomoat.evals.run import Record, Result, evaluate, sample_rows, summarise
from scripted import FIRST_BYTE, ScriptedModel


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted.install(monkeypatch)


@pytest.fixture
def sums(tmp_path: Path) -> list[Row]:
    """Ten sums as rows: 1+1, 2+2, ..."""
    path = tmp_path / "sums.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{n}+{n}"}, {"role": "assistant", "content": f"{2 * n}"}]}
        for n in range(1, 11)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path)


def calculator(prompt: str) -> str:
    """Right for sums up to 5+5, one too many above."""
    n = int(prompt.rsplit("user: ", 1)[1].partition("+")[0])
    return str(2 * n if n <= 5 else 2 * n + 1)


def test_answers_are_graded_row_by_row(sums: list[Row]) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(ScriptedModel(calculator), sums, "exact", progress=lambda done, total: seen.append((done, total)))
    assert (result.score, result.n) == (0.5, 10)
    assert (result.low, result.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson, 5 of 10
    assert [r.score for r in result.records] == [1.0] * 5 + [0.0] * 5
    sixth = result.records[5]
    assert (sixth.line, sixth.expected, sixth.got, sixth.finish_reason) == (6, "12", "13", "stop")
    assert sixth.prompt == [{"role": "user", "content": "6+6"}]
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    assert result.tokens_per_second > 0


def test_the_prompt_is_everything_before_the_last_answer(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    talk = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}))
    model = ScriptedModel(lambda prompt: "d")
    assert evaluate(model, path, "exact").score == 1.0
    assert model.prompts == ["system: Be brief.\nuser: a\nassistant: b\nuser: c\nassistant: "]


def test_the_token_limit_follows_from_the_references(sums: list[Row]) -> None:
    rambling = ScriptedModel(lambda prompt: "x" * 10_000)
    result = evaluate(rambling, sums, "exact")
    assert result.max_tokens == len("20") * 3 // 2 + 8
    assert all(len(r.got) == result.max_tokens and r.finish_reason == "length" for r in result.records)
    assert evaluate(rambling, sums, "contains").max_tokens == 256
    assert evaluate(rambling, sums, "exact", sampling=Sampling(max_tokens=3)).max_tokens == 3


def test_a_limit_draws_the_same_rows_from_the_whole_file(sums: list[Row]) -> None:
    first, second = sample_rows(sums, 4), sample_rows(sums, 4)
    assert first == second
    assert [r.line for r in first] == sorted(r.line for r in first)
    assert first != sums[:4]
    assert sample_rows(sums, 4, seed=1) != first
    assert sample_rows(sums, 99) == sums
    assert evaluate(ScriptedModel(calculator), sums, "exact", limit=4).n == 4


def test_json_reports_fields_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "order?", "completion": '{"id": 7, "urgent": true}'}))
    result = evaluate(ScriptedModel(lambda prompt: '{"id": 7, "urgent": false}'), path, "json")
    assert (result.score, result.partial) == (0.0, 0.5)
    assert "equal fields 50.0 %" in report.result_line(result)


def test_records_are_written_as_json_lines(sums: list[Row], tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    result = evaluate(ScriptedModel(calculator), sums, "exact", output=output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Record(**row) for row in rows] == result.records
    assert [path.name for path in tmp_path.glob("*answers*")] == ["answers.jsonl"]


def test_refusals(sums: list[Row], tmp_path: Path) -> None:
    model = ScriptedModel(calculator)
    with pytest.raises(InputError, match="unknown metric 'bleu': expected one of exact, json"):
        evaluate(model, sums, "bleu")
    with pytest.raises(InputError, match="no rows"):
        evaluate(model, [], "exact")
    with pytest.raises(DataError, match=r"line 1: a prompt of .* do not fit into the model's context of 20") as fault:
        evaluate(ScriptedModel(calculator, context=20), sums, "exact")
    assert fault.value.line == 1
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "only me"}]}))
    with pytest.raises(DataError, match="no reference answer"):
        evaluate(model, path, "exact")
    assert not model.prompts


def test_loss_is_the_mean_over_tokens_of_all_rows(sums: list[Row]) -> None:
    # The scripted model gives the token after X the log-probability -(X's digit): a value per token that a row cannot share.
    def logprob(previous: int, token: int) -> float:
        return -float((previous - FIRST_BYTE) % 7)

    model = ScriptedModel(logprob=logprob)
    result = evaluate(model, sums, "loss")
    total = sum(r.score * r.tokens for r in result.records)
    tokens = sum(r.tokens for r in result.records)
    assert result.score == pytest.approx(total / tokens)
    assert result.low < result.score < result.high
    alone = [evaluate(model, [row], "loss") for row in sums]
    assert [r.score for r in result.records] == pytest.approx([r.score for r in alone])
    assert [r.expected for r in result.records][:2] == ["2", "4"]


def made(scores: list[float], metric: str = "exact", tokens: float = 1.0) -> Result:
    records = [Record(i, [{"role": "user", "content": f"q{i}"}], "x", f"a{s}", s, tokens) for i, s in enumerate(scores, 1)]
    return summarise(metric, records, 1.0)


def test_comparison_of_right_and_wrong_answers() -> None:
    c = compare(made([0, 0, 0, 0, 1, 1] * 5), made([1, 1, 1, 0, 1, 0] * 5))
    assert (c.gained, c.lost) == (15, 5)
    assert c.difference == pytest.approx(1 / 3)
    assert c.p_value == pytest.approx(0.0414, abs=1e-4)  # two-sided binomial, 5 or fewer of 20
    assert c.low > 0
    assert c.verdict == "better"
    assert [(b.score, a.score) for b, a in c.changed].count((0, 1)) == 15
    assert report.verdict_line(c).startswith("Better: +33.3 points (95 % interval +")
    assert compare(made([1, 0] * 4), made([0, 1] * 4)).verdict == "unclear"
    assert compare(made([1] * 30), made([0] * 30)).verdict == "worse"


def test_less_loss_is_better() -> None:
    before, after = made([2.0, 2.5, 3.0, 2.2] * 5, "loss"), made([1.0, 1.4, 2.1, 1.3] * 5, "loss")
    c = compare(before, after)
    assert c.verdict == "better"
    assert c.difference == pytest.approx(-0.975)
    assert (c.gained, c.lost) == (20, 0)
    assert c.p_value < 0.001
    assert "-0.975" in report.verdict_line(c)


def test_only_the_same_rows_can_be_compared() -> None:
    with pytest.raises(InputError, match="different rows"):
        compare(made([0, 1]), made([0, 1, 1]))
    with pytest.raises(InputError, match="rouge after"):
        compare(made([0, 1]), made([0.5, 0.6], "rouge"))


def test_reports_for_people_programs_and_documents() -> None:
    from rich.console import Console

    before, after = made([0.0] * 9 + [1.0]), made([1.0] * 9 + [0.0])
    c = compare(before, after)
    results = {"base|x": before, "base+[bold]a": after}
    screen = io.StringIO()
    console = Console(file=screen, width=120, highlight=False)
    report.print_results(console, results.items())
    report.print_changes(console, c.changed[:2])
    report.print_misses(console, after, 3)
    text = screen.getvalue()
    assert "90.0 %" in text
    assert "base+[bold]a" in text
    assert text.count("before") == 2
    body = json.loads(report.to_json(results, c))
    assert body["results"]["base|x"]["score"] == 0.1
    assert body["comparison"]["gained"] == 9
    markdown = report.to_markdown(results.items(), c).splitlines()
    assert markdown[2].startswith(r"| base\|x | exact | 10.0 % | 1.8 to 40.4 | 10 |")
    assert report.p_text(0.04) == "p = 0.04"
    assert report.p_text(1e-9) == "p < 0.0001"


def test_answers_cannot_write_on_the_terminal() -> None:
    assert "\x1b" not in report.shorten("a\x1b[2Jb")
    assert len(report.shorten("x" * 1000)) == report.SAMPLE_WIDTH


def test_loss_of_a_model_that_knows_nothing_is_log_of_the_vocabulary(sums: list[Row]) -> None:
    uniform = -math.log(259)
    assert evaluate(ScriptedModel(logprob=lambda previous, token: uniform), sums, "loss").score == pytest.approx(-uniform)
