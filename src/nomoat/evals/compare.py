"""Did it get better? Two results on the same rows, compared row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nomoat.errors import InputError
from nomoat.evals.intervals import bootstrap, mcnemar, newcombe_paired, sign_flip
from nomoat.evals.metrics import rule_of
from nomoat.evals.run import Record, Result


@dataclass(frozen=True)
class Comparison:
    """`difference` is after minus before, with its 95 % interval; `p_value` is two-sided, for "nothing changed".

    `gained` and `lost` count rows that got better and worse. `changed` holds those rows as (before, after) pairs,
    the largest changes first.
    """

    metric: str
    before: Result
    after: Result
    difference: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int
    changed: list[tuple[Record, Record]] = field(repr=False)

    @property
    def verdict(self) -> str:
        """better, worse, or unclear: whether the interval of the difference leaves out zero, and on which side."""
        sign = 1 if rule_of(self.metric).higher_is_better else -1
        if self.low <= 0 <= self.high:
            return "unclear"
        return "better" if sign * self.difference > 0 else "worse"

    def summary(self) -> dict[str, Any]:
        """Ready for JSON, without the rows."""
        numbers = {name: getattr(self, name) for name in ("difference", "low", "high", "p_value", "gained", "lost", "verdict")}
        return {"metric": self.metric, "before": self.before.summary(), "after": self.after.summary()} | numbers


def compare(before: Result, after: Result) -> Comparison:
    """Pair the rows of two evaluations. Raises InputError if they are not of the same rows with the same metric.

    Scores of 0 and 1: McNemar's exact test and Newcombe's interval. Others: sign-flip test and bootstrap of the paired
    difference, rows weighted as in the score itself.
    """
    if before.metric != after.metric:
        raise InputError(f"two metrics cannot be compared: {before.metric} before, {after.metric} after")
    pairs = list(zip(before.records, after.records, strict=False))
    same = before.n == after.n and all(b.line == a.line and b.prompt == a.prompt for b, a in pairs)
    if not same:
        raise InputError(f"different rows were evaluated ({before.n} before, {after.n} after): use the same file and limit")
    sign = 1 if rule_of(before.metric).higher_is_better else -1
    steps = [sign * (a.score - b.score) for b, a in pairs]
    gained, lost = sum(s > 0 for s in steps), sum(s < 0 for s in steps)
    if rule_of(before.metric).binary:
        both = sum(b.score == a.score == 1.0 for b, a in pairs)
        low, high = newcombe_paired(both, gained, lost, len(pairs) - both - gained - lost)
        p_value = mcnemar(gained, lost)
    else:
        weights = [b.tokens for b, _ in pairs] if rule_of(before.metric).per_token else [1.0] * len(pairs)
        raw = [a.score - b.score for b, a in pairs]
        low, high = bootstrap(raw, weights)
        p_value = sign_flip([d * w for d, w in zip(raw, weights, strict=True)])
    order = sorted((i for i, s in enumerate(steps) if s), key=lambda i: -abs(steps[i]))
    return Comparison(
        metric=before.metric,
        before=before,
        after=after,
        difference=after.score - before.score,
        low=low,
        high=high,
        p_value=p_value,
        gained=gained,
        lost=lost,
        changed=[pairs[i] for i in order],
    )
