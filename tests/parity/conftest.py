"""Warnings of transformers and PEFT about each other are theirs; ours stay errors everywhere else. torch runs on one thread:
its waiting threads and the engine's would take turns on the same cores, and the models are tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
