"""Score a model on problems with tests: answers are generated in batches, then run in the sandbox, and counted as pass@k."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomoat import settings
from nomoat.errors import InputError, NotFoundError, printable
from nomoat.evals.run import Record, Result, summarise
from nomoat.evals.tasks.problem import Problem, Style, Task, program

if TYPE_CHECKING:
    from nomoat.engine.generate import Completion, Sampling
    from nomoat.engine.model import Model
    from nomoat.engine.stack import Stack
    from nomoat.evals.tasks.sandbox import Sandbox

Progress = Callable[[int, int], None]

OUTCOMES = ("passed", "failed", "error", "crashed", "timeout")
SAMPLED_TEMPERATURE = 0.8  # of several answers to one problem, with TOP_P, as in the HumanEval paper
TOP_P = 0.95


@dataclass(frozen=True)
class Attempt:
    """One answer and what became of it. `seconds` were spent in the sandbox."""

    answer: str
    outcome: str
    detail: str
    tokens: int
    finish_reason: str
    seconds: float


@dataclass(frozen=True)
class Solved:
    """A problem and the attempts at it."""

    problem: Problem
    prompt: str
    attempts: list[Attempt]

    @property
    def passed(self) -> int:
        """How many attempts passed all tests."""
        return sum(attempt.outcome == "passed" for attempt in self.attempts)


@dataclass(frozen=True)
class TaskResult:
    """All problems with their attempts, in file order. `answer_seconds` went into generation, `test_seconds` into the tests."""

    task: str
    style: Style
    sampling: Sampling
    solved: list[Solved] = field(repr=False)
    answer_seconds: float
    test_seconds: float

    @property
    def samples(self) -> int:
        """Answers for each problem."""
        return len(self.solved[0].attempts)

    def score(self, k: int) -> Result:
        """pass@k with its 95 % interval: Wilson's for one answer each, else a bootstrap over problems."""
        records = [
            Record(
                line=one.problem.line,
                prompt=[{"role": "user", "content": one.problem.question}],
                expected=one.problem.reference,
                got=one.attempts[0].answer,
                score=pass_at_k(len(one.attempts), one.passed, k),
                tokens=sum(attempt.tokens for attempt in one.attempts),
                finish_reason=one.attempts[0].finish_reason,
            )
            for one in self.solved
        ]
        name = "pass@1" if self.samples == 1 else f"pass@{k} of {self.samples}"
        return summarise(name, records, self.answer_seconds, self.sampling.max_tokens)

    def outcomes(self) -> dict[str, int]:
        """How many attempts ended in which way."""
        counts = Counter(attempt.outcome for one in self.solved for attempt in one.attempts)
        return {outcome: counts[outcome] for outcome in OUTCOMES}

    def summary(self, ks: Sequence[int]) -> dict[str, Any]:
        """Everything but the problems, ready for JSON."""
        return {
            "task": self.task,
            "prompt": self.style,
            "samples": self.samples,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
            "outcomes": self.outcomes(),
            "test_seconds": round(self.test_seconds, 2),
            "scores": {f"pass@{k}": self.score(k).summary() for k in ks},
        }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n answers, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, section 2.1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def find_data(task: Task, data: Path | None) -> Path:
    """The file of a task: `data`, else one of the task's names in `settings.benchmarks_dir()`. Raises NotFoundError."""
    if data is not None:
        return data
    folder = settings.benchmarks_dir()
    for name in task.files:
        if (folder / name).exists():
            return folder / name
    places = " or ".join(printable(str(folder / name)) for name in task.files)
    raise NotFoundError(
        f"the problems of {task.name} are not here; get {task.origin}, and put it at {places}, or name it: --data FILE"
    )


def sampling_for(task: Task, *, samples: int, temperature: float | None, seed: int, max_tokens: int | None) -> Sampling:
    """Greedy for one answer each, else at SAMPLED_TEMPERATURE. Raises InputError for several greedy answers, which are equal."""
    from nomoat.engine.generate import Sampling

    if temperature is None:
        temperature = 0.0 if samples == 1 else SAMPLED_TEMPERATURE
    if samples > 1 and temperature == 0:
        raise InputError(f"{samples} answers at temperature 0 are {samples} times the same one: use a temperature above 0")
    top_p = TOP_P if temperature else 1.0
    return Sampling(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens or task.max_tokens)


def answer(
    model: Model,
    task: Task,
    problems: Sequence[Problem],
    style: Style,
    sampling: Sampling,
    *,
    samples: int = 1,
    stack: Stack | None = None,
    max_batch: int = 16,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """`samples` answers to every problem; each has a seed of its own, counted from `sampling.seed`.

    Raises InputError E_CONTEXT for a problem that does not fit into the model's context, E_TEMPLATE for a chat without template.
    """
    from nomoat.engine.generate import generate

    if style == "chat" and model.template is None:
        raise InputError("this model has no chat template: use --prompt complete", code="E_TEMPLATE")
    prompts = [_encode(model, problem, style, sampling.max_tokens) for problem in problems]
    count = len(problems) * samples
    stop = task.stop if style == "complete" else ()
    each = [dataclasses.replace(sampling, stop=stop, seed=(sampling.seed + at) % (1 << 64)) for at in range(count)]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    done = generate(model, repeated, each, stacks=[stack] * count, max_batch=max_batch, progress=progress)
    return [done[at : at + samples] for at in range(0, count, samples)]


def _encode(model: Model, problem: Problem, style: Style, max_tokens: int) -> list[int]:
    from nomoat.data.mask import prompt_tokens

    if style == "chat":
        tokens = prompt_tokens([{"role": "user", "content": problem.question}], model.tokenizer, model.template)
    else:
        tokens = model.tokenizer.encode(problem.beginning)
    if len(tokens) + max_tokens > model.spec.context:
        raise InputError(
            f"{printable(problem.id)}: a prompt of {len(tokens):,} tokens and an answer of up to {max_tokens:,} do not fit into "
            f"the model's context of {model.spec.context:,}. Lower --max-tokens",
            code="E_CONTEXT",
        )
    return tokens


def grade(
    sandbox: Sandbox,
    task: Task,
    problems: Sequence[Problem],
    answers: Sequence[Sequence[Completion]],
    style: Style,
    sampling: Sampling,
    *,
    answer_seconds: float = 0.0,
    progress: Progress | None = None,
) -> TaskResult:
    """Run every answer against its problem's tests, as many at once as nomoat uses threads. Raises SandboxError."""
    began = time.perf_counter()
    pairs = [(problem, done) for problem, some in zip(problems, answers, strict=True) for done in some]
    attempts: list[Attempt] = []
    workers = ThreadPoolExecutor(settings.threads(), thread_name_prefix="sandbox")
    try:
        for made in workers.map(lambda pair: _attempt(sandbox, pair[0], pair[1], style), pairs):
            attempts.append(made)
            if progress:
                progress(len(attempts), len(pairs))
    finally:
        workers.shutdown(cancel_futures=True)
    each = iter(attempts)
    solved = [
        Solved(problem, problem.question if style == "chat" else problem.beginning, [next(each) for _ in some])
        for problem, some in zip(problems, answers, strict=True)
    ]
    return TaskResult(task.name, style, sampling, solved, answer_seconds, time.perf_counter() - began)


def _attempt(sandbox: Sandbox, problem: Problem, done: Completion, style: Style) -> Attempt:
    verdict = sandbox.judge(program(problem, done.text, style), problem.tests)
    return Attempt(
        answer=done.text,
        outcome=verdict.outcome,
        detail=verdict.detail,
        tokens=len(done.tokens),
        finish_reason=done.finish_reason,
        seconds=round(verdict.seconds, 3),
    )


def write_attempts(path: Path, result: TaskResult) -> None:
    """One JSON object per problem, with all its attempts; complete or not there at all."""
    from nomoat.files.atomic import atomic_write

    with atomic_write(path) as file:
        for one in result.solved:
            attempts = [dataclasses.asdict(attempt) for attempt in one.attempts]
            row = {
                "id": one.problem.id,
                "line": one.problem.line,
                "prompt": one.prompt,
                "passed": one.passed,
                "attempts": attempts,
            }
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
