"""Does int8 arithmetic cost quality? Perplexity, and divergence from exact arithmetic, beside llama.cpp's on the same file.

    python bench/quality.py [--model smollm2:135m] [--windows 40] [--without-peer]

Both engines read the same windows of 512 tokens of wikitext2. The reference is the same dequantized weights in float32 from
end to end (precision "f32"). For every scored token KL(reference || engine) is the sum over the vocabulary of
p (log p - log q). Windows and scored tokens are those of `llama-perplexity`. Writes bench/results/quality.json;
without the peer, what nomoat's own precisions cost goes to bench/results/quality_own.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for bench.*, however this file is started

from bench.machine import environment, write  # noqa: E402
from bench.peers.channel import Side  # noqa: E402
from bench.peers.install import LLAMACPP_PYTHON  # noqa: E402

if TYPE_CHECKING:
    from nomoat.engine.kv import KvType
    from nomoat.engine.model import Model
    from nomoat.evals.perplexity import Window

Floats = npt.NDArray[np.floating[Any]]

REFERENCE = "reference f32"
#: name of a row: precision, and what keys and values are kept in
PRECISIONS: dict[str, tuple[str, KvType]] = {
    "nomoat int8": ("int8", "bf16"),
    "nomoat int8, KV int8": ("int8", "int8"),
    "nomoat bf16": ("bf16", "bf16"),
}
PEER = "llama.cpp"
CONTEXT = 512


@dataclass
class Scores:
    """Per scored token: nats = -log p(token), divergence = KL(reference || this), and whether both rank the same token first."""

    nats: list[Floats] = field(default_factory=list)
    divergence: list[Floats] = field(default_factory=list)
    agrees: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add(self, logits: Floats, reference: Floats, targets: npt.NDArray[np.int32]) -> None:
        """Scores rows of logits [n, V] against log-probabilities [n, V]."""
        logp = log_softmax(logits)
        self.nats.append(-logp[np.arange(len(targets)), targets])
        self.divergence.append(divergence(reference, logp))
        self.agrees.append(logp.argmax(-1) == reference.argmax(-1))

    def summary(self) -> dict[str, float]:
        nats, kl = np.concatenate(self.nats), np.concatenate(self.divergence)
        return {
            "perplexity": float(np.exp(nats.mean())),
            "kl": float(kl.mean()),
            "kl_error": standard_error(kl),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.percentile(kl, 99)),
            "same_first_token": float(np.concatenate(self.agrees).mean()),
        }


def log_softmax(logits: Floats) -> Floats:
    """log p [n, V] in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def divergence(reference: Floats, other: Floats) -> Floats:
    """KL(reference || other) in nats of every row of log-probabilities."""
    return np.asarray((np.exp(reference) * (reference - other)).sum(-1))


def standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def compare(scores: Mapping[str, Scores]) -> dict[str, float]:
    """nomoat's int8 against the peer, token by token: the claims of this page, with one standard error."""
    own, peer = scores["nomoat int8"], scores[PEER]
    difference = np.concatenate(own.divergence) - np.concatenate(peer.divergence)
    mean = {name: float(np.concatenate(score.nats).mean()) for name, score in scores.items()}
    return {
        "perplexity_ratio": float(np.exp(mean["nomoat int8"] - mean[PEER])),
        "perplexity_ratio_to_reference": float(np.exp(mean["nomoat int8"] - mean[REFERENCE])),
        "kl_ratio": float(np.concatenate(own.divergence).mean() / np.concatenate(peer.divergence).mean()),
        "kl_difference": float(difference.mean()),
        "kl_difference_error": standard_error(difference),
    }


def measure(
    models: Mapping[KvType, Model], peer: Side | None, windows: Iterable[Window], progress: Any = print
) -> dict[str, Scores]:
    """Scores of the reference, of each precision and of the peer. `models`: by the type of their keys and values."""
    scores = {name: Scores() for name in (REFERENCE, *PRECISIONS, *([PEER] if peer else []))}
    with tempfile.TemporaryDirectory(prefix="nomoat-bench-") as folder:
        out = str(Path(folder) / "logits.npy")
        for count, window in enumerate(windows, 1):
            tokens, rows = window.tokens, slice(window.first - 1, len(window.tokens) - 1)
            targets = np.array(tokens[window.first :], np.int32)
            exact = models["bf16"].logits(tokens, precision="f32")[rows]
            reference = log_softmax(exact)
            scores[REFERENCE].add(exact, reference, targets)
            for name, (precision, kv_type) in PRECISIONS.items():
                scores[name].add(models[kv_type].logits(tokens, precision=precision)[rows], reference, targets)
            if peer:
                peer.ask("logits", tokens=tokens, first=rows.start, last=rows.stop, out=out)
                scores[PEER].add(np.load(out), reference, targets)
            progress(f"  window {count}: " + ", ".join(f"{n} {s.summary()['kl']:.6f}" for n, s in scores.items()))
    return scores


def table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"{'':20} {'perplexity':>10} {'KL mean':>10} {'+-':>8} {'KL median':>10} {'KL p99':>8} {'same first':>10}"]
    for name, s in summaries.items():
        lines.append(
            f"{name:20} {s['perplexity']:10.4f} {s['kl']:10.6f} {s['kl_error']:8.6f} {s['kl_median']:10.6f} {s['kl_p99']:8.5f} "
            f"{s['same_first_token']:10.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    shared = Path(os.environ.get("NOMOAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--text", type=Path, default=shared / "wikitext2" / "wiki.test.txt")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-peer", action="store_true", help="nomoat's own precisions alone")
    parser.add_argument("--llamacpp-python", type=Path, default=LLAMACPP_PYTHON)
    given = parser.parse_args()

    from nomoat.engine.kv import KV_TYPES
    from nomoat.engine.model import Model
    from nomoat.evals.perplexity import windows
    from nomoat.hub.names import resolve

    path = resolve(given.model, download=True)
    models = {kv_type: Model.load(path, threads=given.threads, kv_type=kv_type) for kv_type in KV_TYPES}
    tokenizer = models["bf16"].tokenizer
    tokens = tokenizer.encode(given.text.read_text(encoding="utf-8"))
    cut = list(windows(tokens, CONTEXT, bos=tokenizer.bos_id if tokenizer.add_bos else None))[: given.windows]
    figures: dict[str, Any] = {}
    with contextlib.ExitStack() as running:
        peer = None
        if not given.without_peer:
            peer = running.enter_context(Side("bench.peers.llamacpp_side", given.llamacpp_python))
            figures["llama.cpp"] = peer.ask("load", path=str(path), context=CONTEXT, threads=given.threads)
        scores = measure(models, peer, cut, progress=lambda text: print(text, file=sys.stderr, flush=True))
    summaries = {name: score.summary() for name, score in scores.items()}
    print(table(summaries))
    if peer:
        verdict = figures["comparison"] = compare(scores)
        print(
            f"nomoat int8 / llama.cpp: perplexity x {verdict['perplexity_ratio']:.4f}, KL x {verdict['kl_ratio']:.3f} "
            f"(difference {verdict['kl_difference']:+.6f} +- {verdict['kl_difference_error']:.6f})"
        )
    work = {
        "model": path.name,
        "text": given.text.name,
        "windows": len(cut),
        "context": CONTEXT,
        "scored": (CONTEXT // 2 - 1) * len(cut),
    }
    figures |= {"work": work, "scores": summaries, "machine": environment(given.threads)}
    print(f"written: {write('quality' if peer else 'quality_own', figures)}")


if __name__ == "__main__":
    main()
