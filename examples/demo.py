"""The whole job on real input: a small model learns to read customer messages, and it is measured before and after.

    make demo          or          python examples/demo.py

Gets SmolLM2-135M, scores it on 200 messages, trains an adapter on 576 of 1,200 others, scores again, asks two fresh questions.
The last line of output is one JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomoat.train.job import TrainResult

MODEL = "smollm2:135m"
ADAPTER = "tickets"
TICKETS = Path(__file__).resolve().parent / "tickets"
#: 72 steps of 8 messages, half of those there are: all of them gain a point or two, and take twice as long.
RECIPE: dict[str, Any] = {
    "batch_sequences": 8,
    "max_steps": 72,
    "learning_rate": 1e-3,
    "validation_rows": 24,
    "evaluations": 3,
}

#: Written for this script; neither the sentences nor the products are in the data.
QUESTIONS = (
    "Good afternoon, the parcel with my Thimble Ukulele was supposed to be here on Tuesday and nobody can tell me where it is. "
    "I travel on Thursday, so I need an answer as soon as possible. Order 4471-0098, thank you. Wanda Fitzroy",
    "hiya, i bought a Juniper Footrest from you, but there was somebody else's lamp in the box. no rush. cheers, Ovid",
)

QUIET_SECONDS = 15.0  # between two lines of progress where there is no terminal


class Screen:
    """Numbered steps, and under them one line of progress: live on a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.began = time.monotonic()
        self.told = 0.0
        self.open = False

    def step(self, number: int, title: str) -> None:
        elapsed = time.monotonic() - self.began
        self.say(f"\n{number}/5  {title}{f'   [{clock(elapsed)} so far]' if number > 1 else ''}")

    def say(self, text: str) -> None:
        if self.open:
            print("\r\x1b[K", end="")
            self.open = False
        print(text, flush=True)

    def progress(self, text: str) -> None:
        if self.live:
            print(f"\r\x1b[K     {text}", end="", flush=True)
            self.open = True
        elif time.monotonic() - self.told >= QUIET_SECONDS:
            self.told = time.monotonic()
            print(f"     {text}", flush=True)


class Events:
    """What training reports, as progress for a person."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.scoring_began = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "plan":
                self.screen.step(2, "Before: what does it answer untrained?")
            case "scoring":
                self._scoring(event["done"], event["total"])
            case "before":
                self.screen.say(f"     {score_line(event)}")
                self.screen.step(3, "Training")
            case "step":
                self.screen.progress(
                    f"step {event['step']} of {event['steps']}   loss {event['loss'] or float('nan'):.3f}   "
                    f"{event['tokens_per_second']:,.0f} tokens/s   {event['memory_mb']:,.0f} MB   "
                    f"{clock(event['eta_seconds'])} left"
                )
            case "validation":
                self.screen.say(f"     step {event['step']} of {event['steps']}   loss on rows held back: {event['loss']:.3f}")
                if event["step"] == event["steps"]:
                    self.screen.step(4, "After: the same 200 messages")
            case "after":
                self.screen.say(f"     {score_line(event)}")
            case "resumed" | "skipped" | "checkpoint_failed":
                self.screen.say(f"     {event['event']} at step {event['step']}")

    def _scoring(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self.scoring_began = now
            return
        left = (now - self.scoring_began) / done * (total - done)
        left_shown = f"   {clock(left)} left" if 10 * done >= total else ""  # the first answers come late, all at once
        self.screen.progress(f"{done} of {total} answers{left_shown}")


def main() -> None:
    screen = Screen()
    print(f"nomoat demo: {MODEL} learns to read customer messages on this computer. It takes some minutes.")
    fetch(screen)
    show_data(screen)
    result = teach(Events(screen))
    if result.before is None or result.after is None:
        screen.say("     stopped; run the demo again to start anew")
        sys.exit(130)
    show_change(screen, result)
    ask(screen)
    print_next_steps(screen)
    summary = {
        "base": round(result.before.score, 4),
        "tuned": round(result.after.score, 4),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "train_seconds": round(result.train_seconds, 1),
        "peak_rss_mb": round(result.peak_rss_mb, 1),
    }
    print(json.dumps(summary))


def fetch(screen: Screen) -> None:
    from nomoat.hub.pull import pull

    def progress(what: str, done: int, total: int) -> None:
        screen.progress(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

    screen.step(1, "Model and data")
    path = pull(MODEL, progress=progress)
    screen.say(f"     {MODEL}: SmolLM2-135M-Instruct, {path.stat().st_size / 1e6:.0f} MB")


def show_data(screen: Screen) -> None:
    """One row of the training data, and what sets the test apart."""
    train, test = rows("train"), rows("test")
    _, question, answer = train[0]["messages"]
    screen.say(
        f"     {len(train):,} messages to learn from; {len(test)} for the test, with sentences, names and products of their own"
    )
    screen.say("")
    for line in question["content"].splitlines():
        screen.say(f"       {line}")
    screen.say(f"       -> {answer['content']}")


def rows(split: str) -> list[dict[str, Any]]:
    with (TICKETS / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def teach(events: Events) -> TrainResult:
    """Score, train, score again. The demo's own adapter of an earlier run is replaced."""
    import nomoat

    return nomoat.train(
        MODEL,
        TICKETS / "train.jsonl",
        name=ADAPTER,
        test=TICKETS / "test.jsonl",
        metric="json",
        overwrite=True,
        report=events,
        **RECIPE,
    )


def show_change(screen: Screen, result: TrainResult) -> None:
    from nomoat.evals.compare import compare
    from nomoat.evals.report import shorten, verdict_line

    assert result.before is not None
    assert result.after is not None
    comparison = compare(result.before, result.after)
    screen.say(f"     {verdict_line(comparison)}")
    if comparison.changed:
        before, after = comparison.changed[0]
        screen.say("")
        screen.say(f"       {shorten(str(before.prompt[-1]['content']), 110)}")
        screen.say(f"       before: {shorten(before.got, 100)}")
        screen.say(f"       after:  {shorten(after.got, 100)}")


def ask(screen: Screen) -> None:
    """Two messages that nobody has seen before, to the model with its new adapter."""
    from nomoat.adapters.open import open_model
    from nomoat.data.mask import prompt_tokens
    from nomoat.engine.generate import Sampling, generate
    from nomoat.evals.report import shorten

    screen.step(5, "Two fresh messages")
    model, stack = open_model(f"{MODEL}+{ADAPTER}")
    system = rows("train")[0]["messages"][0]
    prompts = [prompt_tokens([system, {"role": "user", "content": text}], model.tokenizer, model.template) for text in QUESTIONS]
    answers = generate(model, prompts, Sampling(max_tokens=96), stacks=[stack] * len(prompts))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        screen.say(f"       {shorten(question, 240)}")
        screen.say(f"       -> {shorten(answer.text, 240)}\n")


def print_next_steps(screen: Screen) -> None:
    """Commands to go on with, as they work in the shell that started the demo."""
    system = rows("train")[0]["messages"][0]["content"]
    nomoat, python = command("nomoat"), command("python")
    test = shown(TICKETS / "test.jsonl")
    screen.say(
        f"""Go on:
  {nomoat} run {MODEL}+{ADAPTER} --system "{system}" "Where is my order A-10233?"
  {nomoat} eval {MODEL}+{ADAPTER} {test} --metric json --against {MODEL}
  {nomoat} adapters
  {nomoat} train {MODEL} YOUR_ROWS.jsonl --name mytask
  {python} -c "import nomoat; print(nomoat.evaluate('{MODEL}+{ADAPTER}', '{test}', 'json').score)"
"""
    )


def command(name: str) -> str:
    """How to start a program of this environment: its name where the shell finds that one, else its path."""
    program = Path(sys.executable).parent / name
    on_path = shutil.which(name)
    return name if on_path and Path(on_path).resolve() == program.resolve() else shown(program)


def shown(path: Path) -> str:
    """A path as seen from the current folder, if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def score_line(event: dict[str, Any]) -> str:
    return (
        f"{100 * event['score']:.1f} % of {event['n']} answers are exactly right "
        f"(95 % interval {100 * event['low']:.1f} to {100 * event['high']:.1f}); {100 * event['partial']:.1f} % of the fields"
    )


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


if __name__ == "__main__":
    from nomoat.errors import NomoatError

    try:
        main()
    except NomoatError as error:
        print(f"\nnomoat demo: {error} [{error.code}]", file=sys.stderr)
        sys.exit(error.exit_code)
