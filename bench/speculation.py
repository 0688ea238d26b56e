"""Decoding with and without guessed tokens: the same prompts, taking turns, the same answers.

    python bench/speculation.py [--model smollm2:135m] [--prompts 12] [--rounds 3]

edit     "Add a docstring to this function", MBPP's functions: the answer is mostly the function
extract  a product note with its fields; the answer is a line for each field out of the note
chat     open questions (MT-bench), where little repeats: what guessing costs when it wins nothing

A figure is new tokens per second of the whole answer after its prompt. Writes bench/results/LEVEL/speculation.json; exits with 1
if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import environment, of_this_cpu, write  # noqa: E402

if TYPE_CHECKING:
    from nomoat.engine.model import Model

FIELDS = ("name", "material", "colour", "weight", "price", "warehouse")
VALUES = {
    "name": ("Harbour lamp", "Fold-away desk", "Trail kettle", "Linen curtain", "Oak stool", "Field radio"),
    "material": ("brushed steel", "beech wood", "anodised aluminium", "washed linen", "recycled plastic"),
    "colour": ("slate grey", "deep green", "off-white", "copper red", "midnight blue"),
    "weight": ("1.2 kg", "840 g", "6.5 kg", "310 g", "2.75 kg"),
    "price": ("39.90 EUR", "124.00 EUR", "17.50 EUR", "68.25 EUR"),
    "warehouse": ("Rotterdam North, aisle 14", "Gdansk 2, aisle 3", "Porto, aisle 27", "Turin East, aisle 9"),
}


def prompts(kind: str, shared: Path, count: int) -> list[str]:
    draw = random.Random(kind)
    if kind == "edit":
        rows = [json.loads(line) for line in (shared / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()]
        codes = draw.sample([row["code"].replace("\r", "") for row in rows if 200 < len(row["code"]) < 700], count)
        return [f"Add a docstring to this function and repeat its code unchanged:\n\n```python\n{code}\n```" for code in codes]
    if kind == "extract":
        notes = [{field: draw.choice(VALUES[field]) for field in FIELDS} for _ in range(count * 4)]
        groups = [notes[at : at + 4] for at in range(0, len(notes), 4)]
        said = [
            "\n".join(
                f"The {n['name']} is made of {n['material']}, comes in {n['colour']}, weighs {n['weight']}, costs {n['price']} "
                f"and is kept in {n['warehouse']}."
                for n in group
            )
            for group in groups
        ]
        return [f"List the sentences of this text one by one, each in quotes:\n\n{text}" for text in said]
    rows = [
        json.loads(line) for line in (shared / "mt_bench" / "mt_bench_question.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return draw.sample([row["turns"][0] for row in rows], count)


def measure(model: Model, texts: list[str], rounds: int, max_tokens: int) -> dict[str, Any]:
    from nomoat.data.mask import prompt_tokens
    from nomoat.engine.generate import Sampling, Session, stream

    assert model.template is not None
    seconds: dict[bool, list[float]] = {False: [], True: []}
    tokens, same = 0, True
    for text in texts:
        ids = prompt_tokens([{"role": "user", "content": text}], model.tokenizer, model.template)
        answers: dict[bool, list[int]] = {}
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for speculate in (False, True):
                session = Session(model)
                sampling = replace(Sampling(max_tokens=max_tokens), speculate=speculate)
                list(stream(model, ids, replace(sampling, max_tokens=1), session=session))  # the prompt is not timed
                began = time.perf_counter()
                answer = stream(model, ids, sampling, session=session)
                while True:
                    try:
                        next(answer)
                    except StopIteration as end:
                        answers[speculate] = end.value.tokens
                        break
                times[speculate].append(time.perf_counter() - began)
                session.release()
        same = same and answers[False] == answers[True]
        tokens += len(answers[True])
        for speculate, values in times.items():
            seconds[speculate].append(statistics.median(values))
    plain, guessed = tokens / sum(seconds[False]), tokens / sum(seconds[True])
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    return {
        "prompts": len(texts),
        "tokens": tokens,
        "tokens_per_second": {"plain": plain, "guessed": guessed},
        "ratio": guessed / plain,
        "ratio_by_prompt": [round(ratio, 3) for ratio in ratios],
        "same_answers": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("NOMOAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    )
    given = parser.parse_args()
    import nomoat

    model = nomoat.load(given.model, threads=given.threads)
    results = {}
    for kind in ("edit", "extract", "chat"):
        results[kind] = measure(model, prompts(kind, given.shared, given.prompts), given.rounds, given.max_tokens)
        speeds, ratio = results[kind]["tokens_per_second"], results[kind]["ratio"]
        print(f"{kind:8} tokens/s: plain {speeds['plain']:,.0f}, guessed {speeds['guessed']:,.0f}   (x {ratio:.2f})")
    machine = environment(given.threads)
    print(f"written: {write('speculation', {'model': given.model, 'work': results, 'machine': machine}, of_this_cpu())}")
    if not all(result["same_answers"] for result in results.values()):
        raise SystemExit("answers differ")


if __name__ == "__main__":
    main()
