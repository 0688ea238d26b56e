"""LoRA training beside PEFT: CLINC150, 3,000 rows, one epoch, batches of 16 rows, rank 16 on every linear layer.

    python bench/train_vs_peft.py                  accuracy, speed and memory; PEFT with the best of three learning rates
    python bench/train_vs_peft.py --quick          PEFT with the rate that was best before
    python bench/train_vs_peft.py --speed-only     30 steps of each side, taking turns: speed only
    python bench/train_vs_peft.py --dense 4x512 16x128     the same for rows of one length whose tokens are all learned
    python bench/train_vs_peft.py --dense 1x512 --base nf4 --model FILE    the same beside PEFT on bitsandbytes' NF4 weights

Both sides get the same token ids, loss masks, batches and learning-rate schedule, in a process of their own; then both answer
the same 600 test prompts greedily. Tokens are counted without padding, up to the last one that is learned.
Writes bench/results/LEVEL/train_vs_peft.json (with --speed-only train_speed.json, with --dense train_dense.json or, for NF4,
train_nf4.json, where shapes that are not measured keep their figures). PEFT runs in .parity (`make parity`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.*, however this file is started

from bench.datasets import Row as Conversation  # noqa: E402
from bench.datasets import load as load_dataset  # noqa: E402
from bench.machine import environment, of_this_cpu, write  # noqa: E402
from bench.peers.channel import Side  # noqa: E402
from bench.peers.install import PEFT_PYTHON  # noqa: E402
from bench.train_plan import Plan  # noqa: E402

if TYPE_CHECKING:
    from nomoat.text.template import ChatTemplate
    from nomoat.text.tokenizer import Tokenizer

END = 2  # <|im_end|> of SmolLM2
RANK, ALPHA, BATCH, WARMUP = 16, 32.0, 16, 0.03
RATES = (2e-4, 5e-4, 1e-3)
BEST_RATE = 1e-3  # PEFT's best of the three, with bfloat16 and with float32 weights
WARM_STEPS = 2  # not timed: both sides allocate in them
SPEED_STEPS = 30


def make_plan(
    train: Sequence[Conversation],
    test: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    batch: int = BATCH,
) -> tuple[Plan, list[str]]:
    """The rows as token ids, in nomoat's order of the first epoch; and the expected answers.

    Without a template a row is plain text, about 32 tokens: the message, a line `Intent:`, the label, the end token.
    """
    from nomoat.data.mask import Example, prompt_tokens, tokenize
    from nomoat.data.pack import shuffled_order, useful_rows
    from nomoat.data.readers import Row

    def prompt(messages: list[dict[str, Any]]) -> list[int]:
        if template is None:
            return tokenizer.encode(f"{messages[0]['content']}\nIntent:")
        return prompt_tokens(messages, tokenizer, template)

    examples = []
    for line, item in enumerate(train, 1):
        if template is None:
            asked = prompt(item["messages"])
            said = [*tokenizer.encode(f" {item['messages'][-1]['content']}", add_bos=False), END]
            weights = np.concatenate([np.zeros(len(asked), np.float32), np.ones(len(said), np.float32)])
            examples.append(Example(np.array(asked + said, np.int32), weights))
            continue
        example = tokenize(Row(item["messages"], line, "messages"), tokenizer, template, max_tokens=2048)
        if not isinstance(example, Example):
            raise SystemExit(f"training row {line}: {example}")
        last = useful_rows(example) + 1  # what follows the last learned token changes nothing, for either side
        examples.append(Example(example.tokens[:last], example.weights[:last]))
    order = shuffled_order(len(examples), 0, 0).tolist()
    prompts = [np.array(prompt(item["messages"][:-1]), np.int32) for item in test]
    plan = Plan(
        [example.tokens for example in examples],
        [example.weights for example in examples],
        [order[begin : begin + batch] for begin in range(0, len(order), batch)],
        prompts,
    )
    return plan, [item["messages"][-1]["content"] for item in test]


def dense_plan(ids: Sequence[int], rows: int, length: int, steps: int) -> Plan:
    """`steps` batches of `rows` pieces of a text, `length` tokens each, all learned but the first, which nothing predicts."""
    count = rows * steps
    if len(ids) < count * length:
        raise SystemExit(f"{count * length:,} tokens of text are needed, and there are {len(ids):,}; use fewer --steps")
    pieces = np.asarray(ids[: count * length], np.int32).reshape(count, length)
    weights = np.ones(length, np.float32)
    weights[0] = 0
    batches = [list(range(begin, begin + rows)) for begin in range(0, count, rows)]
    return Plan(list(pieces), [weights] * count, batches, [pieces[0]])


def shape(text: str) -> tuple[int, int]:
    """4x512 -> 4 rows of 512 tokens."""
    rows, _, length = text.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length) > 1):
        raise argparse.ArgumentTypeError(f"{text!r}; expected ROWSxLENGTH, for example 4x512")
    return int(rows), int(length)


def schedule(steps: int, peak: float) -> list[float]:
    from nomoat.train.schedule import learning_rate

    return [learning_rate(step, steps, peak=peak, warmup=WARMUP, kind="linear") for step in range(steps)]


class Bench:
    """The work, and how to start each side on it."""

    def __init__(
        self,
        model: Path,
        plan: Plan,
        expected: list[str],
        tokenizer: Tokenizer,
        threads: int,
        peft_python: Path,
        base: str = "dense",
    ) -> None:
        self.model, self.plan, self.expected, self.tokenizer = model, plan, expected, tokenizer
        self.threads, self.peft_python, self.base = threads, peft_python, base

    def start(self, name: str, rate: float, folder: Path) -> tuple[Side, dict[str, Any]]:
        """A loaded side, and what it says of itself."""
        file = folder / "plan.npz"
        if not file.exists():
            self.plan.save(file)
        work: dict[str, Any] = {
            "model": str(self.model),
            "plan": str(file),
            "rank": RANK,
            "alpha": ALPHA,
            "threads": self.threads,
        }
        if name == "nomoat":
            side = Side("bench.peers.nomoat_train_side")
            return side, side.ask("load", rate=rate, **work)
        side = Side("bench.peers.peft_side", self.peft_python)
        return side, side.ask("load", rates=schedule(len(self.plan.batches), rate), base=self.base, **work)

    def epoch(self, name: str, rate: float, folder: Path) -> dict[str, Any]:
        """One side's whole epoch and its score."""
        from nomoat.evals.intervals import wilson
        from nomoat.evals.metrics import METRICS

        side, about = self.start(name, rate, folder)
        with side:
            seconds, losses, made = 0.0, [], {}
            for begin in range(0, len(self.plan.batches), 10):
                made = side.ask("steps", count=min(10, len(self.plan.batches) - begin))
                seconds += made["seconds"]
                losses += made["losses"]
                tell(f"  {name} {rate:g}: step {len(losses)} of {len(self.plan.batches)}, loss {losses[-1]:.3f}, {seconds:.0f} s")
            answered = side.ask("answers", **self.answering(name))
        tokens = sum(self.plan.step_tokens(step) for step in range(len(self.plan.batches)))
        grade = METRICS["exact"].grade
        assert grade is not None
        texts = [self.tokenizer.decode(ids) for ids in answered["tokens"]]
        right = sum(grade(got, expected) for got, expected in zip(texts, self.expected, strict=True))
        return {
            "side": name,
            "learning_rate": rate,
            "accuracy": right / len(texts),
            "accuracy_interval": wilson(right, len(texts)),
            "tokens_per_second": tokens / seconds,
            "train_seconds": seconds,
            "peak_rss_mb": made["peak_rss_mb"],
            "answer_seconds": answered["seconds"],
            "first_loss": losses[0],
            "last_losses": statistics.fmean(losses[-10:]),
            "about": about,
        }

    def answering(self, name: str) -> dict[str, Any]:
        """Room for twice the longest expected answer, as `nomoat eval` gives."""
        limit = 2 * max(len(self.tokenizer.encode(text, add_bos=False)) for text in self.expected) + 16
        return {"limit": limit} if name == "nomoat" else {"limit": limit, "ends": sorted(self.tokenizer.eos_ids)}

    def speed(self, steps: int, folder: Path) -> dict[str, Any]:
        """Both sides on the same steps, one after the other, step by step."""
        sides = {name: self.start(name, BEST_RATE, folder) for name in ("nomoat", "peft")}
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        peaks: dict[str, float] = {}
        try:
            for step in range(min(WARM_STEPS + steps, len(self.plan.batches))):
                for name, (side, _) in sides.items():
                    made = side.ask("steps", count=1)
                    peaks[name] = made["peak_rss_mb"]
                    if step >= WARM_STEPS:
                        speeds[name].append(self.plan.step_tokens(step) / made["seconds"])
                tell(f"  step {step + 1}: " + ", ".join(f"{name} {own[-1]:,.0f} tokens/s" for name, own in speeds.items() if own))
        finally:
            for side, _ in sides.values():
                side.close()
        return speed_summary(speeds) | {"peak_rss_mb": peaks, "about": {name: about for name, (_, about) in sides.items()}}


def speed_summary(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, their ratio, and the quartiles of the ratio step by step."""
    ratios = [own / peer for own, peer in zip(speeds["nomoat"], speeds["peft"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "tokens_per_second": medians,
        "ratio": medians["nomoat"] / medians["peft"],
        "ratio_quartiles": [low, high],
        "steps": len(ratios),
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':8} {'rate':>7} {'accuracy':>9} {'95 %':>15} {'tokens/s':>9} {'seconds':>8} {'peak MB':>8}"]
    for run in runs:
        low, high = run["accuracy_interval"]
        lines.append(
            f"{run['side']:8} {run['learning_rate']:7g} {run['accuracy']:9.1%} {low:7.1%}-{high:7.1%} "
            f"{run['tokens_per_second']:9,.0f} {run['train_seconds']:8,.0f} {run['peak_rss_mb']:8,.0f}"
        )
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("NOMOAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    )
    parser.add_argument("--train", type=int, default=3_000, help="rows; a multiple of 150")
    parser.add_argument("--test", type=int, default=600, help="rows")
    parser.add_argument("--first", type=int, help="train on the first so many rows only (to try this script)")
    parser.add_argument("--rate", type=float, help="nomoat's learning rate; default: what it would choose itself")
    parser.add_argument("--quick", action="store_true", help=f"PEFT with {BEST_RATE:g} only")
    parser.add_argument("--only", choices=("nomoat", "peft"), help="run one side")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--dense", type=shape, nargs="+", metavar="ROWSxLENGTH", help="speed on rows of these shapes")
    parser.add_argument("--base", choices=("dense", "nf4"), default="dense", help="PEFT's base weights; nf4 only with --dense")
    parser.add_argument("--steps", type=int, default=SPEED_STEPS, help="with --speed-only or --dense")
    parser.add_argument("--chat", action="store_true", help="rows in the model's chat template, with its system prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peft-python", type=Path, default=PEFT_PYTHON)
    given = parser.parse_args()
    if given.base != "dense" and not given.dense:
        parser.error("--base nf4 is measured with --dense only")
    return given


def measure_dense(given: argparse.Namespace, path: Path, tokenizer: Tokenizer) -> None:
    """Speed of both sides on every shape, into train_dense.json or train_nf4.json."""
    text = (given.shared / "wikitext2" / "wiki.test.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_bos=False)
    name = "train_dense" if given.base == "dense" else "train_nf4"
    file = of_this_cpu() / f"{name}.json"
    shapes = json.loads(file.read_text(encoding="utf-8"))["shapes"] if file.exists() else {}
    for rows, length in given.dense:
        plan = dense_plan(ids, rows, length, WARM_STEPS + given.steps)
        bench = Bench(path, plan, [], tokenizer, given.threads, given.peft_python, given.base)
        with tempfile.TemporaryDirectory(prefix="nomoat-bench-") as folder:
            found = bench.speed(given.steps, Path(folder))
        medians = found["tokens_per_second"]
        print(f"{rows} x {length}: nomoat {medians['nomoat']:,.0f} tokens/s, PEFT {medians['peft']:,.0f}: x {found['ratio']:.2f}")
        work = {"model": path.name, "rows": rows, "length": length, "rank": RANK, "alpha": ALPHA}
        shapes[f"{rows}x{length}"] = {"work": work, **found, "machine": environment(given.threads)}
    print(f"written: {write(name, {'shapes': shapes}, of_this_cpu())}")


def main() -> None:
    given = options()
    from nomoat.files.gguf import open_gguf
    from nomoat.hub.names import resolve
    from nomoat.models import spec_from_gguf
    from nomoat.text.template import template_for
    from nomoat.text.tokenizer import Tokenizer
    from nomoat.train.plan import default_learning_rate

    path = resolve(given.model, download=True)
    with open_gguf(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
        template, default_rate = template_for(file, tokenizer), default_learning_rate(spec_from_gguf(file))
    if given.dense:
        return measure_dense(given, path, tokenizer)
    data = load_dataset("clinc150", given.shared, train_rows=given.train, test_rows=given.test)
    plan, expected = make_plan(data.train[: given.first], data.test, tokenizer, template if given.chat else None)
    bench = Bench(path, plan, expected, tokenizer, given.threads, given.peft_python)
    counted = range(len(plan.batches))
    work = {
        "model": path.name,
        "train_rows": len(plan.tokens),
        "test_rows": len(expected),
        "tokens": sum(map(plan.step_tokens, counted)),
        "loss_tokens": sum(map(plan.loss_tokens, counted)),
        "batch": BATCH,
        "rank": RANK,
        "alpha": ALPHA,
    }
    with tempfile.TemporaryDirectory(prefix="nomoat-bench-") as name:
        folder = Path(name)
        if given.speed_only:
            result = bench.speed(given.steps, folder)
            medians = result["tokens_per_second"]
            print(f"nomoat {medians['nomoat']:,.0f} tokens/s, PEFT {medians['peft']:,.0f}: x {result['ratio']:.2f}")
            result = {"work": work, **result, "machine": environment(given.threads)}
            print(f"written: {write('train_speed', result, of_this_cpu())}")
            return
        todo = [("nomoat", given.rate or default_rate)] if given.only != "peft" else []
        if given.only != "nomoat":
            todo += [("peft", rate) for rate in ((BEST_RATE,) if given.quick else RATES)]
        runs = [bench.epoch(name, rate, folder) for name, rate in todo]
    print(table(runs))
    figures: dict[str, Any] = {"work": work, "runs": runs, "machine": environment(given.threads)}
    if given.only is None:
        own, peer = runs[0], max(runs[1:], key=lambda run: float(run["accuracy"]))
        figures["speed_ratio"] = own["tokens_per_second"] / peer["tokens_per_second"]
        figures["accuracy_difference"] = own["accuracy"] - peer["accuracy"]
        print(f"nomoat / PEFT's best: speed x {figures['speed_ratio']:.2f}, accuracy {figures['accuracy_difference']:+.1%}")
    if given.only is None and given.first is None:  # a part of the work is no result
        print(f"written: {write('train_vs_peft', figures, of_this_cpu())}")


if __name__ == "__main__":
    main()
