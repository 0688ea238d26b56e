"""Warnings of transformers and PEFT about each other are theirs; ours stay errors everywhere else. torch runs on one thread:
its waiting threads and the engine's would take turns on the same cores, and the models are tiny. At the end, one table of how far
each architecture is from its oracles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

COLUMNS = ("logits", "gradients", "llama.cpp")
ERRORS: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="session")
def report() -> Callable[[str, str, float], None]:
    """report(row, column, relative error): a cell of the table."""

    def note(row: str, column: str, error: float) -> None:
        ERRORS.setdefault(row, {})[column] = error

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ERRORS:
        terminalreporter.section("relative errors")
        terminalreporter.line("".join(f"{name:>20}" for name in ("architecture", *COLUMNS)))
    for row, found in ERRORS.items():
        cells = [f"{found[column]:.1e}" if column in found else "-" for column in COLUMNS]
        terminalreporter.line("".join(f"{cell:>20}" for cell in (row, *cells)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
