"""One ability learned on several weight formats of one model, and every adapter served on every format.

    python bench/across_formats.py [--formats Q4_1 Q4_K_M Q8_0] [--train 3000] [--test 600]

CLINC150 in chat form, one adapter a format, same rows, order and options. A format other than the file's own is made by
`nomoat quantize`. Writes bench/results/across_formats.json and docs/across-formats.md.
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
sys.path.insert(0, str(ROOT))

from bench.machine import environment, write  # noqa: E402

PAGE = ROOT / "docs" / "across-formats.md"
RATE = 1e-3
#: One step of the work in a process of its own, so that memory and caches of one format do not reach the next.
CHILD = """
import json, sys
import nomoat
from nomoat import settings
what, options = sys.argv[1], json.loads(sys.argv[2])
if what == "train":
    done = nomoat.train(options.pop("model"), options.pop("data"), metric="none", overwrite=True, **options)
    found = {"tokens_per_second": done.tokens_per_second, "seconds": done.train_seconds, "peak_rss_mb": done.peak_rss_mb}
else:
    score = nomoat.evaluate(options["model"], options["data"], "exact")
    found = {"score": score.score, "low": score.low, "high": score.high, "n": score.n}
print(json.dumps(found))
"""


def child(what: str, **options: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, what, json.dumps(options)], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(source: Path, own: str, formats: list[str], folder: Path) -> dict[str, Path]:
    """The model in every format."""
    files = {}
    for name in formats:
        files[name] = source if name == own else folder / f"{source.stem.removesuffix(own).rstrip('.-')}.{name}.gguf"
        if not files[name].exists():
            command = [sys.executable, "-m", "nomoat", "quantize", str(source), "--to", name, "--output", str(files[name])]
            subprocess.run(command, check=True)
    return files


def page(figures: dict[str, Any]) -> str:
    formats, work, machine = list(figures["trained"]), figures["work"], figures["machine"]
    lines = [
        "# One adapter, several weight formats",
        "",
        f"CLINC150, {work['train_rows']:,} training rows, one epoch, learning rate {RATE:g}; accuracy on",
        f"{work['test_rows']:,} test rows with 95 % intervals. A row is the format that the adapter was trained",
        "on, a column the one that it was served on.",
        "`python bench/across_formats.py` made this page on",
        f"{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}.",
        "",
        "| trained on | " + " | ".join(f"served on {name}" for name in formats) + " |",
        "|---" * (len(formats) + 1) + "|",
    ]
    for trained in formats:
        cells = (figures["scores"][trained][served] for served in formats)
        lines.append(f"| {trained} | " + " | ".join(f"{c['score']:.1%} [{c['low']:.1%}, {c['high']:.1%}]" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--own", default="Q4_1", help="the format that the model comes in")
    parser.add_argument("--formats", nargs="+", default=["Q4_1", "Q4_K_M", "Q8_0"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "formats", help="where other formats are kept")
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("NOMOAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    )
    parser.add_argument("--train", type=int, default=3_000)
    parser.add_argument("--test", type=int, default=600)
    given = parser.parse_args()

    from bench.datasets import load

    from nomoat import settings
    from nomoat.hub.names import resolve

    data = load("clinc150", given.shared, train_rows=given.train, test_rows=given.test)
    given.folder.mkdir(parents=True, exist_ok=True)
    source = resolve(given.model, download=True)
    files = make(source, given.own, given.formats, given.folder)
    trained: dict[str, Any] = {}
    scores: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="nomoat-bench-") as name:
        paths = {split: Path(name) / f"{split}.jsonl" for split in ("train", "test")}
        for split, rows in (("train", data.train), ("test", data.test)):
            paths[split].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        for kind, file in files.items():
            adapter = f"across-{kind.lower()}"
            trained[kind] = child("train", model=str(file), data=str(paths["train"]), name=adapter, learning_rate=RATE)
            print(f"{kind}: trained, {trained[kind]['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
            scores[kind] = {}
            for served, other in files.items():
                scores[kind][served] = child("score", model=f"{other}+{adapter}", data=str(paths["test"]))
                print(f"  served on {served}: {scores[kind][served]['score']:.1%}", file=sys.stderr, flush=True)
    work = {"model": source.name, "train_rows": len(data.train), "test_rows": len(data.test)}
    figures = {"work": work, "trained": trained, "scores": scores, "machine": environment(settings.threads())}
    print(f"written: {write('across_formats', figures)}")
    PAGE.write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
