"""The benchmark of real abilities covers every data set with valid recipes, and its page says what its JSON says."""

from __future__ import annotations

from typing import Any

from bench import abilities
from bench.datasets import DATASETS

from nomoat.evals.compare import compare
from nomoat.evals.run import Record, summarise
from nomoat.train.plan import TrainOptions


def test_every_set_has_a_recipe_and_a_description() -> None:
    assert set(abilities.RECIPES) == set(DATASETS) == set(abilities.TASKS)
    for recipe in abilities.RECIPES.values():
        TrainOptions(**recipe)


def entry() -> dict[str, Any]:
    def result(scores: list[float]) -> Any:
        records = [Record(i, [{"role": "user", "content": "q"}], "x", "a", score, 1.0) for i, score in enumerate(scores)]
        return summarise("exact", records, 1.0)

    summary = compare(result([0.0] * 10), result([1.0] * 8 + [0.0] * 2)).summary()
    return summary | {
        "licence": "MIT",
        "rows": {"train": 1000, "test": 10},
        "constant": 0.25,
        "learning_rate": 0.0005,
        "epochs": 2,
        "tokens_per_second": 1234.5,
        "train_seconds": 61.2,
        "peak_rss_mb": 512.3,
        "samples": [{"asked": "list\nfiles", "expected": "ls", "before": "```sh\nls\n```", "after": "ls"}],
        "cpu": "a processor",
        "level": "avx2",
        "threads": 2,
        "commit": "abc1234",
    }


def test_the_page_holds_the_figures() -> None:
    page = abilities.page({"nl2bash": entry()})
    row = next(line for line in page.splitlines() if line.startswith("| nl2bash | English"))
    assert "| 1,000, 10 | exact | 25.0 % | 0.0 % [0.0 to 27.8] | 80.0 % [49.0 to 94.3] | +80.0 points [" in row
    assert "| nl2bash | 2 | 0.0005 | 61 s | 1,234 | 512 MB | a processor, avx2, 2 threads, commit abc1234 |" in page
    assert "asked     list files" in page
    assert page.count("```") == 2  # an answer cannot close the block it is shown in
