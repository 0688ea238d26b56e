"""Benchmarks with tests: reading their files, asking, cutting code out of answers, pass@k; reference solutions pass all."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import struct
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomoat import settings
from nomoat.engine.generate import Completion, Sampling
from nomoat.errors import DataError, InputError, NotFoundError
from nomoat.evals.tasks import TASKS, guest, humaneval, mbpp, run
from nomoat.evals.tasks.problem import Problem, extract, program
from nomoat.evals.tasks.sandbox import Sandbox
from nomoat.evals.tasks.seccomp import MACHINES, filter_program
from scripted import ScriptedModel

DOUBLE: dict[str, Any] = {
    "task_id": "Toy/0",
    "prompt": 'import math\n\ndef half(x):\n    return x / 2\n\ndef double(x):\n    """ Twice x. """\n',
    "entry_point": "double",
    "canonical_solution": "    return math.prod([2, x])\n",
    "test": "def check(candidate):\n    for n in range(5):\n        assert half(candidate(n)) == n\n",
}
SHOWN: list[dict[str, Any]] = [
    {"task_id": n, "text": f"Give {n}.", "code": f"def give{n}():\r\n  return {n}", "test_list": [f"assert give{n}() == {n}"]}
    for n in mbpp.SHOWN
]
SQUARE: dict[str, Any] = {
    "task_id": 11,
    "prompt": "Square.",
    "code": "def square(x): return x * x",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(square(3), 9)", "assert set([square(2)]) == {4}"],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def double(tmp_path: Path) -> Problem:
    return humaneval.read(write(tmp_path / "double.jsonl", [DOUBLE]))[0]


@pytest.fixture
def square(tmp_path: Path) -> Problem:
    return mbpp.read(write(tmp_path / "square.jsonl", [*SHOWN, SQUARE]))[0]


@pytest.fixture(scope="module")
def sandbox(bubblewrap: None) -> Sandbox:
    return Sandbox()


# -- problems ----------------------------------------------------------------------------------------------------------------


def test_a_problem_of_humaneval(double: Problem) -> None:
    assert (double.id, double.line, double.entry) == ("Toy/0", 1, "double")
    assert double.beginning == DOUBLE["prompt"]
    assert DOUBLE["prompt"] in double.question
    assert double.helpers == "import math\n\ndef half(x):\n    return x / 2\n\n"
    assert double.tests["program"].endswith("\ncheck(double)\n")


def test_problems_of_mbpp(square: Problem, tmp_path: Path) -> None:
    assert (square.id, square.line, square.entry) == ("MBPP/11", 4, "square")
    assert "Square." in square.question
    assert "assert set([square(2)]) == {4}" in square.question
    assert square.beginning.index("Give 2.") < square.beginning.index("Give 4.") < square.beginning.index("Square.")
    assert "def give2():\n  return 2\n[DONE]\n" in square.beginning
    assert square.beginning.endswith("[BEGIN]\n")
    array = tmp_path / "sanitized.json"
    array.write_text(json.dumps([*SHOWN, SQUARE, SQUARE | {"task_id": 601}]))
    assert [problem.id for problem in mbpp.read(array)] == ["MBPP/11"]  # 601 is for training


@pytest.mark.parametrize(
    ("read", "rows", "message"),
    [
        (humaneval.read, [DOUBLE | {"test": None}], "field `test`: expected text, found a NoneType"),
        (humaneval.read, [{k: v for k, v in DOUBLE.items() if k != "prompt"}], "field `prompt`: expected text, found nothing"),
        (humaneval.read, [DOUBLE | {"entry_point": "triple"}], "def triple("),
        (humaneval.read, [], "has no rows"),
        (mbpp.read, [SQUARE], "expected problems 2, 3, 4"),
        (mbpp.read, SHOWN, "expected problems 2, 3, 4"),
        (mbpp.read, [SQUARE | {"test_list": []}], "expected assertions"),
        (mbpp.read, [SQUARE | {"task_id": "11"}], "expected a whole number"),
        (mbpp.read, [SQUARE | {"code": "square = 3"}], "no function of `code` is called"),
    ],
)
def test_what_is_no_problem_is_refused(
    read: Callable[[Path], list[Problem]], rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        read(write(tmp_path / "rows.jsonl", rows))
    assert message in str(refused.value)


def test_files_are_looked_for_in_the_documented_folder(tmp_path: Path) -> None:
    task = TASKS["humaneval"]
    with pytest.raises(NotFoundError, match="openai/human-eval") as missing:
        run.find_data(task, None)
    wanted = settings.benchmarks_dir() / "HumanEval.jsonl"
    assert str(wanted) in str(missing.value)
    wanted.parent.mkdir(parents=True)
    wanted.write_text("{}")
    assert run.find_data(task, None) == wanted
    assert run.find_data(task, tmp_path / "other") == tmp_path / "other"
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match="gunzip"):
        task.read(packed)


# -- answers -----------------------------------------------------------------------------------------------------------------

FUNCTION = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    "answer",
    [
        FUNCTION,
        f"```python\n{FUNCTION}```",
        f"Here you are:\n\n```py\n{FUNCTION}```\nIt doubles.\n\n```\ndouble(2)  # 4\n```",
        f"```\npip install nothing\n```\nThen:\n  ```Python\n{FUNCTION}  ```",
        f"```python\n{FUNCTION}",  # cut off
    ],
)
def test_code_is_cut_out_of_a_chat_answer(answer: str) -> None:
    assert extract(answer, "double") == FUNCTION


def test_an_answer_becomes_a_program(double: Problem, square: Problem) -> None:
    whole = program(double, f"Sure!\n```python\n{FUNCTION}```", "chat")
    assert whole == double.helpers + FUNCTION
    assert program(double, "```python\n    return 2 * x\n```", "chat") == DOUBLE["prompt"] + "    return 2 * x\n"
    assert program(double, "    return 2 * x\n", "complete") == DOUBLE["prompt"] + "    return 2 * x\n"
    assert program(square, "```\nsquare = lambda x: x * x\n```", "chat") == "square = lambda x: x * x\n"


@given(st.text(alphabet="`\n python def(x):", max_size=60))
def test_any_answer_gives_some_code(answer: str) -> None:
    assert extract(answer, "f") in answer


def test_each_answer_has_its_own_seed_and_prompt(double: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    stops: set[tuple[str, ...]] = set()

    def generate(model: ScriptedModel, prompts: list[list[int]], sampling: list[Sampling], **_: Any) -> list[Completion]:
        seeds.extend(each.seed for each in sampling)
        stops.update(each.stop for each in sampling)
        return [Completion([], model.tokenizer.decode(prompt), "stop", len(prompt)) for prompt in prompts]

    monkeypatch.setattr("nomoat.engine.generate.generate", generate)
    sampling = run.sampling_for(TASKS["humaneval"], samples=3, temperature=None, seed=7, max_tokens=None)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.8, 0.95, 512)
    answers = run.answer(ScriptedModel(), TASKS["humaneval"], [double, double], "chat", sampling, samples=3)
    assert [len(each) for each in answers] == [3, 3]
    assert seeds == [7, 8, 9, 10, 11, 12]
    assert answers[0][0].text == f"user: {double.question}\nassistant: "
    greedy = run.sampling_for(TASKS["humaneval"], samples=1, temperature=None, seed=0, max_tokens=9)
    assert (greedy.temperature, greedy.max_tokens) == (0.0, 9)
    assert run.answer(ScriptedModel(), TASKS["humaneval"], [double], "complete", greedy)[0][0].text == DOUBLE["prompt"]
    assert stops == {(), TASKS["humaneval"].stop}


def test_what_cannot_be_asked(double: Problem) -> None:
    with pytest.raises(InputError, match="5 times the same one"):
        run.sampling_for(TASKS["mbpp"], samples=5, temperature=0.0, seed=0, max_tokens=None)
    with pytest.raises(InputError, match="--prompt complete"):
        run.answer(ScriptedModel(template=None), TASKS["humaneval"], [double], "chat", Sampling())
    with pytest.raises(InputError, match=r"Toy/0: a prompt of .* do not fit") as refused:
        run.answer(ScriptedModel(context=300), TASKS["humaneval"], [double], "chat", Sampling(max_tokens=256))
    assert refused.value.code == "E_CONTEXT"


# -- scores ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert run.pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def result_of(outcomes: list[list[str]], problem: Problem) -> run.TaskResult:
    solved = [
        run.Solved(problem, problem.question, [run.Attempt("", outcome, "", 10, "stop", 0.1) for outcome in some])
        for some in outcomes
    ]
    return run.TaskResult("humaneval", "chat", Sampling(temperature=0.8), solved, 2.0, 1.0)


def test_scores_of_one_answer_each_are_a_proportion(double: Problem) -> None:
    score = result_of([["passed"]] * 5 + [["failed"]] * 5, double).score(1)
    assert (score.metric, score.score, score.n) == ("pass@1", 0.5, 10)
    assert (score.low, score.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson, 5 of 10
    assert score.tokens_per_second == pytest.approx(50.0)


def test_scores_of_several_answers_are_estimates(double: Problem) -> None:
    result = result_of([["passed", "failed"], ["timeout", "failed"], ["passed", "passed"], ["crashed", "error"]], double)
    assert result.score(1).score == pytest.approx((0.5 + 0 + 1 + 0) / 4)
    assert result.score(2).score == pytest.approx(2 / 4)
    assert result.score(2).metric == "pass@2 of 2"
    assert 0 <= result.score(2).low < 0.5 < result.score(2).high <= 1
    certain = result_of([["failed", "failed"]] * 10, double).score(2)
    assert (certain.low, certain.high) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Wilson, 0 of 10: not certain at all
    assert result.outcomes() == {"passed": 3, "failed": 2, "error": 1, "crashed": 1, "timeout": 1}
    summary = result.summary([1, 2])
    assert summary["scores"]["pass@2"]["score"] == pytest.approx(0.5)
    json.dumps(summary)


# -- whole benchmarks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def humaneval_file(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("humaneval") / "HumanEval.jsonl"
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return path


def outcomes(sandbox: Sandbox, task: str, problems: list[Problem], answers: list[str], style: Any = "chat") -> dict[str, str]:
    done = [[Completion([], text, "stop", 0)] for text in answers]
    result = run.grade(sandbox, TASKS[task], problems, done, style, Sampling())
    return {f"{one.problem.id}: {one.attempts[0].detail}": one.attempts[0].outcome for one in result.solved}


def wrapped(problem: Problem) -> str:
    """The reference, spoiled: each result inside a tuple."""
    name = problem.entry
    return f"```python\n{problem.reference}\n\n_right = {name}\ndef {name}(*args): return (_right(*args),)\n```"


@pytest.mark.slow
def test_the_solutions_of_humaneval_pass_and_broken_ones_do_not(sandbox: Sandbox, humaneval_file: Path) -> None:
    problems = humaneval.read(humaneval_file)
    assert len(problems) == 164
    bodies = [problem.reference.removeprefix(problem.beginning) for problem in problems]
    right = outcomes(sandbox, "humaneval", problems, bodies, "complete")
    assert {what: outcome for what, outcome in right.items() if outcome != "passed"} == {}
    some = problems[::3]
    nothing = outcomes(sandbox, "humaneval", some, ["    pass\n"] * len(some), "complete")
    assert [what for what, outcome in nothing.items() if outcome == "passed"] == []
    wrong = outcomes(sandbox, "humaneval", some, [wrapped(problem) for problem in some])
    assert [what for what, outcome in wrong.items() if outcome == "passed"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("sanitized-mbpp.json", 1), ("mbpp.jsonl", 10)])
def test_the_solutions_of_mbpp_pass_and_broken_ones_do_not(sandbox: Sandbox, shared_data: Path, name: str, step: int) -> None:
    problems = mbpp.read(shared_data / "mbpp" / name)
    assert len(problems) == {"sanitized-mbpp.json": 257, "mbpp.jsonl": 500}[name]
    problems = problems[::step]
    right = outcomes(sandbox, "mbpp", problems, [f"Here:\n```python\n{problem.reference}\n```" for problem in problems])
    assert {what: outcome for what, outcome in right.items() if outcome != "passed"} == {}
    some = problems[::4]
    wrong = outcomes(sandbox, "mbpp", some, [wrapped(problem) for problem in some])
    assert [what for what, outcome in wrong.items() if outcome == "passed"] == []


def test_the_toys_pass_too(sandbox: Sandbox, double: Problem, square: Problem) -> None:
    seen: list[tuple[int, int]] = []
    done = [[Completion([1], "    return x + x", "stop", 3), Completion([1], "    return x", "stop", 3)]]
    result = run.grade(sandbox, TASKS["humaneval"], [double], done, "complete", Sampling(), progress=lambda *at: seen.append(at))
    assert [attempt.outcome for attempt in result.solved[0].attempts] == ["passed", "failed"]
    assert seen == [(1, 2), (2, 2)]
    cheat = "```\nclass math:\n    isclose = lambda *a: True\ndef half(x): return 0\ndef square(x): return 5\n```"
    assert set(outcomes(sandbox, "mbpp", [square], [cheat]).values()) == {"failed"}


def test_attempts_are_written_one_problem_a_line(double: Problem, tmp_path: Path) -> None:
    run.write_attempts(tmp_path / "out.jsonl", result_of([["passed", "failed"], ["timeout", "failed"]], double))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in rows] == [1, 0]
    assert rows[0]["id"] == "Toy/0"
    assert [attempt["outcome"] for attempt in rows[1]["attempts"]] == ["timeout", "failed"]


# -- between the two sandboxes -----------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
KEYS = st.integers() | st.text() | st.frozensets(st.integers(), max_size=3) | st.tuples(st.text(), st.booleans())
VALUES = st.recursive(
    SCALARS | st.sets(KEYS, max_size=3) | st.fractions() | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


def refuse(value: Any) -> Any:
    raise AssertionError(f"{value!r} is plain data")


def typed(value: Any) -> tuple[type, Any]:
    """Equal only for equal values of equal types, at every depth; signs of zero count, the order of a set does not."""
    if isinstance(value, dict):
        return dict, tuple((typed(key), typed(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(typed, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(typed, value))
    return type(value), repr(value)


@given(VALUES)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    back = guest.decode(json.loads(json.dumps(guest.encode(value, refuse))), refuse)
    assert typed(back) == typed(value)


JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text() | st.sampled_from(sorted(guest._BUILD)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=15,
)


@given(JSON)
def test_a_reply_builds_nothing_but_plain_data(wire: Any) -> None:
    kinds = (bool, int, float, str, bytes, complex, list, tuple, set, frozenset, dict, range, type, deque)
    try:
        value = guest.decode(wire, lambda _: None)
    except (ValueError, TypeError, LookupError, ArithmeticError):
        return
    assert value is None or isinstance(value, (*kinds, Fraction, Decimal))


def test_names_that_belong_to_the_answer() -> None:
    source = """
import os as system
from copy import copy
def check(f, *, g=1):
    for i in range(3):
        assert f(i) == Node(i).left
check(entry)
assert math.pi > numbers() and [x for x in y]
"""
    assert guest.used_names(source) == ({"Node", "entry", "math", "numbers", "y"}, {"math"})


def run_filter(code: bytes, architecture: int, number: int) -> int:
    """What the kernel's machine for these programs returns."""
    program = [struct.unpack_from("<HBBI", code, at) for at in range(0, len(code), 8)]
    data, accumulator, at = {0: number, 4: architecture}, 0, 0
    while True:
        opcode, if_true, if_false, k = program[at]
        at += 1
        if opcode == 0x20:
            accumulator = data[k]
        elif opcode == 0x06:
            return int(k)
        else:
            at += if_true if (accumulator == k if opcode == 0x15 else accumulator >= k) else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_refuses_what_it_lists_and_nothing_else(machine: str) -> None:
    architecture, refused = MACHINES[machine]
    code = filter_program(machine)
    assert len(code) == 8 * (len(refused) + 7)
    for number in range(600):
        wanted = 0x00050001 if number in refused.values() else 0x7FFF0000
        assert run_filter(code, architecture, number) == wanted, number
    assert run_filter(code, architecture, 0x40000000 | 57) == 0x00050001  # x32
    assert run_filter(code, 0x40000003, 2) == 0x80000000  # fork of 32-bit x86
