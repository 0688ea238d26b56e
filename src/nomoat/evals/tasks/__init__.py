"""Benchmarks that come with tests: one file each, and its line in this table."""

from __future__ import annotations

from nomoat.evals.tasks import humaneval, mbpp
from nomoat.evals.tasks.problem import Task

TASKS: dict[str, Task] = {task.name: task for task in (humaneval.TASK, mbpp.TASK)}
