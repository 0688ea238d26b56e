"""Grading functions, against hand-worked answers and, for `numeric`, GSM8K's stored verdicts."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomoat.evals import metrics

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("got", "expected", "score"),
    [("a b", "a  b\n", 1), (" yes ", "yes", 1), ("Yes", "yes", 0), ("", "", 1), ("yes.", "yes", 0)],
)
def test_exact_normalises_only_whitespace(got: str, expected: str, score: float) -> None:
    assert metrics.exact(got, expected) == score


@pytest.mark.parametrize(
    ("got", "expected", "score"),
    [
        ("The answer is No.", "no", 1),
        ("I know", "no", 0),
        ("northern no", "no", 1),
        ("cost: $5", "$5", 1),
        ("a\nb  c", "b c", 1),
        ("anything", "", 0),
        ("  ", "", 1),
    ],
)
def test_contains_finds_whole_words_only(got: str, expected: str, score: float) -> None:
    assert metrics.contains(got, expected) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("costs $1,234.50 now", "1234.5"),
        ("1,2", "2"),
        ("from 3 to -4", "-4"),
        ("it is -$7", "-7"),
        ("16-3", "3"),
        ("x = (2)-1", "1"),
        (".5 left", "0.5"),
        ("18.", "18"),
        ("1,234,56", "56"),
        ("none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert metrics.last_number(text) == (None if number is None else Decimal(number))


def test_numeric_agrees_with_every_stored_verdict_of_gsm8k(shared_data: Path) -> None:
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    verdicts = disagreements = 0
    with (shared_data / "gsm8k" / "example_model_solutions.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for model in models:
                verdicts += 1
                ours = metrics.numeric(row[model]["solution"], row["ground_truth"])
                disagreements += bool(ours) != row[model]["is_correct"]
    assert (verdicts, disagreements) == (5276, 0)


@pytest.mark.parametrize(
    ("got", "expected", "score"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1),
        ('{"a": 1.0}', '{"a": 1}', 1),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0),
        ('{"a": {}}', '{"a": []}', 0),
        ('{"a": null}', "{}", 0),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 1),
        ('Here it is: {"a": 1}', '{"a": 1}', 0),
        ('{"a": 1', '{"a": 1}', 0),
        ("NaN", "NaN", 0),
        ("[" * 100_000, "[]", 0),
        ("1" * 10_000, "1", 0),
    ],
)
def test_json_equality(got: str, expected: str, score: float) -> None:
    assert metrics.json_equal(got, expected) == score


@given(JSON, JSON)
def test_json_equality_and_fields_agree_with_each_other(a: object, b: object) -> None:
    left, right = json.dumps(a), json.dumps(b)
    assert metrics.json_equal(left, left) == metrics.json_fields(left, left) == 1.0
    assert (metrics.json_fields(left, right) == 1.0) == (metrics.json_equal(left, right) == 1.0)
    assert metrics.json_fields(left, right) == metrics.json_fields(right, left)


def test_json_fields_counts_missing_extra_and_wrong_fields() -> None:
    expected = '{"intent": "refund", "order": 17, "items": ["a", "b"]}'
    assert metrics.json_fields('{"intent": "refund", "order": 18, "items": ["a", "b"]}', expected) == 3 / 4
    assert metrics.json_fields('{"intent": "refund"}', expected) == 1 / 4
    assert metrics.json_fields(expected[:-1] + ', "more": 1}', expected) == 4 / 5
    assert metrics.json_fields("no json", expected) == 0


def test_rouge_l_on_the_examples_of_the_paper() -> None:
    # Lin 2004, section 3: S2 shares "police the gunman" with the reference, S3 "the gunman", S4 has "police killed".
    reference = "police killed the gunman"
    assert metrics.rouge_l("police kill the gunman", reference) == 3 / 4
    assert metrics.rouge_l("the gunman kill police", reference) == 1 / 2
    assert metrics.rouge_l("the gunman police killed", reference) == 1 / 2


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_rouge_l_equals_the_textbook_recurrence(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    wanted = 2 * table[-1][-1] / (len(a) + len(b)) if a and b else float(a == b)
    assert metrics.rouge_l(" ".join(a), " ".join(b)) == wanted


@given(st.text(max_size=40), st.text(max_size=40))
def test_every_metric_takes_any_text_and_gives_a_score_from_0_to_1(got: str, expected: str) -> None:
    for metric in metrics.METRICS.values():
        if metric.grade is None:
            continue
        score = metric.grade(got, expected)
        assert 0.0 <= score <= 1.0
        assert not metric.binary or score in (0.0, 1.0)


@given(st.text(min_size=1, max_size=40))
def test_a_reference_answers_itself(text: str) -> None:
    assert metrics.exact(text, text) == metrics.contains(text, text) == metrics.rouge_l(text, text) == 1.0
