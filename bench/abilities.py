"""Real abilities, each learned on this machine and scored before and after on held-out rows.

    python bench/abilities.py [NAME ...] [--shared ../shared/data]

Trains an adapter for each set of bench/datasets.py, one process a set so that peak memory is its own. Writes
bench/results/abilities.json and, from it, docs/abilities.md; sets that are not run keep their last figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.datasets, however this file is started
RESULTS = ROOT / "bench" / "results" / "abilities.json"
PAGE = ROOT / "docs" / "abilities.md"
MODEL = "smollm2:135m"
SAMPLES = 2

#: What differs from the defaults of `nomoat train`.
RECIPES: dict[str, dict[str, Any]] = {
    "clinc150": {"learning_rate": 1e-3},
    "wnut17": {"learning_rate": 1e-3, "epochs": 3},
    "wikisql": {"learning_rate": 1e-3, "epochs": 2},
    "nl2bash": {"learning_rate": 1e-3, "epochs": 1},
    "bfcl": {"learning_rate": 1e-3, "batch_sequences": 4},
    "sms_spam": {"learning_rate": 1e-3},
    "gsm8k": {"learning_rate": 1e-3},
}
TASKS = {
    "clinc150": "which of 150 intents a message has",
    "wnut17": "entities of a sentence, as JSON",
    "wikisql": "question about a table to SQL",
    "nl2bash": "English to a bash command",
    "bfcl": "question and tools to a tool call, as JSON",
    "sms_spam": "spam or ham",
    "gsm8k": "school maths, by the last number",
}


def learn(name: str, shared: Path, train_rows: int | None, test_rows: int | None) -> dict[str, Any]:
    """Train and score one set in this process."""
    from bench.datasets import load
    from bench.machine import commit, cpu

    import nomoat
    from nomoat import _native, settings
    from nomoat.evals.compare import compare

    data = load(name, shared, train_rows=train_rows, test_rows=test_rows)
    with tempfile.TemporaryDirectory(prefix="nomoat-bench-") as folder:
        files = {}
        for split, rows in (("train", data.train), ("test", data.test)):
            files[split] = Path(folder) / f"{split}.jsonl"
            files[split].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        result = nomoat.train(
            MODEL,
            files["train"],
            name=f"bench-{name}",
            test=files["test"],
            metric=data.metric,
            score_rows=len(data.test),
            overwrite=True,
            report=show,
            **RECIPES[name],
        )
    assert result.before is not None
    assert result.after is not None
    c = compare(result.before, result.after)
    return c.summary() | {
        "name": name,
        "licence": data.licence,
        "rows": {"train": len(data.train), "test": len(data.test)},
        "constant": data.constant_score(),
        "learning_rate": result.learning_rate,
        "epochs": RECIPES[name].get("epochs", 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "train_seconds": round(result.train_seconds, 1),
        "peak_rss_mb": round(result.peak_rss_mb, 1),
        "samples": [
            {"asked": b.prompt[-1]["content"], "expected": b.expected, "before": b.got, "after": a.got}
            for b, a in c.changed[:SAMPLES]
        ],
        "cpu": cpu(),
        "level": _native.level(),
        "threads": settings.threads(),
        "commit": commit(),
    }


def show(event: dict[str, Any]) -> None:
    """Progress on stderr: scores, and every twentieth step."""
    kind = event["event"]
    if kind == "step" and event["step"] % 20 == 0:
        print(
            f"  step {event['step']}/{event['steps']}  loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s  "
            f"{event['eta_seconds']:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )
    elif kind in ("before", "after", "validation"):
        print(f"  {kind}: {event.get('text') or event.get('loss')}", file=sys.stderr, flush=True)


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/abilities.md: the table, and an example of each."""
    from nomoat.evals.report import figure, interval, p_text

    lines = [
        "# What it can learn",
        "",
        "Real data sets, one adapter each, trained and scored on the machine named below by `python bench/abilities.py`,",
        "which also writes this page. *Constant* is the score of the best single answer for all rows: what any model must",
        "beat. Brackets hold 95 % intervals; the last column is the difference on the same rows with its own. `--train` and",
        "`--test` limit the rows to those of the table.",
        "",
        "| set | task | rows: train, test | metric | constant | before | after | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        m = r["metric"]
        before, after = (f"{figure(m, s['score'])} [{interval(m, s['low'], s['high'])}]" for s in (r["before"], r["after"]))
        change = (
            f"{figure(m, r['difference'], signed=True)} [{interval(m, r['low'], r['high'], signed=True)}], {p_text(r['p_value'])}"
        )
        lines.append(
            f"| {name} | {TASKS[name]} | {r['rows']['train']:,}, {r['rows']['test']:,} | {m} | {figure(m, r['constant'])} | "
            f"{before} | {after} | {change} |"
        )
    lines += [
        "",
        "| set | epochs | learning rate | training | tokens/s | peak memory | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['epochs']} | {r['learning_rate']:g} | {r['train_seconds']:,.0f} s | {r['tokens_per_second']:,.0f} | "
            f"{r['peak_rss_mb']:,.0f} MB | {r['cpu']}, {r['level']}, {r['threads']} threads, commit {r['commit']} |"
        )
    for name, r in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"Rows whose score changed, the first {len(r['samples'])}. Licence of the data: {r['licence']}.",
        ]
        for sample in r["samples"]:
            lines += ["", "```text", *(f"{key:<9} {clip(text)}" for key, text in sample.items()), "```"]
    return "\n".join(lines) + "\n"


def clip(text: str, width: int = 200) -> str:
    """One line that cannot end a code block."""
    line = " ".join(text.split()).replace("```", "'''")
    return line if len(line) <= width else line[: width - 1] + "…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(RECIPES)} (default: all)")
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("NOMOAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    )
    parser.add_argument("--train", type=int, help="training rows (default: the set's own number)")
    parser.add_argument("--test", type=int, help="test rows (default: the set's own number)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one set, in this process, JSON on stdout
    given = parser.parse_args()
    names = given.names or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(RECIPES)}")
    if given.here:
        print(json.dumps(learn(names[0], given.shared, given.train, given.test)))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in names:
        print(f"{name}: {TASKS[name]}", file=sys.stderr, flush=True)
        limits = [f"--{key}={value}" for key in ("train", "test") if (value := getattr(given, key)) is not None]
        command = [sys.executable, __file__, name, "--here", f"--shared={given.shared}", *limits]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout)
        ordered = {key: results[key] for key in RECIPES if key in results}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(ordered), encoding="utf-8")
    print(page(results).split("\n## ")[0])


if __name__ == "__main__":
    main()
