"""How good are the files that `nomoat quantize` writes? Beside llama.cpp's own quantizer, on the same source.

    python bench/quantizers.py [--types Q4_0 Q4_K_M Q6_K Q8_0 IQ4_XS] [--windows 12]

The source is the catalogue's file, dequantized to float32: the highest precision there is of it here. Both programs quantize it
to every type without an importance matrix. For each file: size, perplexity and KL to the source by nomoat in float32 arithmetic,
and perplexity by nomoat's and by llama.cpp's usual arithmetic, on the same windows of 512 tokens of wikitext2. The types of all
tensors are compared. Writes bench/results/quantizers.json and docs/quantizers.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import environment, write  # noqa: E402
from bench.peers.channel import Side  # noqa: E402
from bench.peers.install import LLAMACPP_PYTHON  # noqa: E402
from bench.quality import CONTEXT, Floats, Scores, log_softmax  # noqa: E402

if TYPE_CHECKING:
    from nomoat.evals.perplexity import Window

PAGE = ROOT / "docs" / "quantizers.md"
TYPES = ("Q4_0", "Q4_K_M", "Q6_K", "Q8_0", "IQ4_XS", "Q3_K_M", "Q2_K")


def rows_of(window: Window) -> slice:
    return slice(window.first - 1, len(window.tokens) - 1)


def targets_of(window: Window) -> Any:
    return np.array(window.tokens[window.first :], np.int32)


def references(path: Path, cut: Sequence[Window], threads: int) -> list[Floats]:
    """log p [n, V] of the source in float32 arithmetic, as float32 to keep them all in memory."""
    from nomoat.engine.model import Model

    model = Model.load(path, threads=threads)
    return [log_softmax(model.logits(window.tokens, precision="f32")[rows_of(window)]).astype(np.float32) for window in cut]


def measure(path: Path, cut: Sequence[Window], reference: Sequence[Floats], peer: Side, threads: int, out: str) -> dict[str, Any]:
    """One file: KL and perplexity by exact arithmetic, and perplexity by the usual arithmetic of both engines."""
    from nomoat.engine.model import Model

    model = Model.load(path, threads=threads)
    scores = {name: Scores() for name in ("f32", "int8", "llama.cpp")}
    peer.ask("load", path=str(path), context=CONTEXT, threads=threads)
    for window, expected in zip(cut, reference, strict=True):
        targets, rows = targets_of(window), rows_of(window)
        for precision in ("f32", "int8"):
            scores[precision].add(model.logits(window.tokens, precision=precision)[rows], expected, targets)
        peer.ask("logits", tokens=window.tokens, first=rows.start, last=rows.stop, out=out)
        scores["llama.cpp"].add(np.load(out), expected, targets)
    found = {name: score.summary() for name, score in scores.items()}
    return {
        "bytes": path.stat().st_size,
        "perplexity": found["f32"]["perplexity"],
        "kl": found["f32"]["kl"],
        "kl_error": found["f32"]["kl_error"],
        "perplexity_nomoat": found["int8"]["perplexity"],
        "perplexity_llamacpp": found["llama.cpp"]["perplexity"],
        "ratio": found["int8"]["perplexity"] / found["llama.cpp"]["perplexity"],
    }


def same_types(own: Path, theirs: Path) -> list[str]:
    """Tensors whose types differ, with both types."""
    from nomoat.files.gguf import open_gguf

    with open_gguf(own) as a, open_gguf(theirs) as b:
        kinds = {name: (info.type.name, b.tensors[name].type.name) for name, info in a.tensors.items()}
        assert a.tensors.keys() == b.tensors.keys()
    return [f"{name}: {one} and {other}" for name, (one, other) in kinds.items() if one != other]


def page(figures: dict[str, Any]) -> str:
    work, machine = figures["work"], figures["machine"]
    lines = [
        "# Quantizers compared",
        "",
        f"`nomoat quantize` and llama.cpp's `llama_model_quantize` made these files from {work['model']},",
        "dequantized to float32, without an importance matrix. Perplexity and KL to the source are by float32",
        "arithmetic on the file's weights; the last three columns are by the usual arithmetic of each engine",
        "(activations in int8) on the same file.",
        f"{work['windows']} windows of {work['context']} tokens of wikitext2, of which {work['scored']:,} are scored.",
        f"The source has perplexity {figures['source']['perplexity']:.3f}. `python bench/quantizers.py` made this page on",
        f"{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}, with llama-cpp-python "
        f"{figures['llama.cpp']['version']}.",
        "",
        "| type | made by | MB | perplexity | KL to the source | run by nomoat | run by llama.cpp | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, makers in figures["files"].items():
        for maker, f in makers.items():
            lines.append(
                f"| {kind} | {maker} | {f['bytes'] / 1e6:.1f} | {f['perplexity']:.3f} | "
                f"{f['kl']:.5f} \u00b1 {f['kl_error']:.5f} | {f['perplexity_nomoat']:.3f} | {f['perplexity_llamacpp']:.3f} | "
                f"{f['ratio']:.4f} |"
            )
    differ = {kind: names for kind, names in figures["types_that_differ"].items() if names}
    lines += ["", "Both give every tensor the same type." if not differ else f"Types that differ: {differ}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    shared = Path(os.environ.get("NOMOAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--text", type=Path, default=shared / "wikitext2" / "wiki.test.txt")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llamacpp-python", type=Path, default=LLAMACPP_PYTHON)
    given = parser.parse_args()

    from nomoat import _native
    from nomoat.evals.perplexity import windows
    from nomoat.files.gguf import open_gguf
    from nomoat.hub.names import resolve
    from nomoat.quant.recipes import FILE_TYPES
    from nomoat.quant.write import quantize
    from nomoat.text.tokenizer import Tokenizer

    _native.set_threads(given.threads)
    model = resolve(given.model, download=True)
    with open_gguf(model) as file:
        tokenizer = Tokenizer.from_gguf(file)
    tokens = tokenizer.encode(given.text.read_text(encoding="utf-8"))
    cut = list(windows(tokens, CONTEXT, bos=tokenizer.bos_id if tokenizer.add_bos else None))[: given.windows]
    files: dict[str, dict[str, Any]] = {}
    differ = {}
    with tempfile.TemporaryDirectory(prefix="nomoat-bench-") as name:
        folder = Path(name)
        source = quantize(model, "F32", folder / "source.gguf").path
        reference = references(source, cut, given.threads)
        scores = Scores()
        for window, expected in zip(cut, reference, strict=True):
            scores.add(expected, expected, targets_of(window))
        with Side("bench.peers.llamacpp_side", given.llamacpp_python) as peer:
            for kind in given.types:
                paths = {"nomoat": folder / "nomoat.gguf", "llama.cpp": folder / "llamacpp.gguf"}
                quantize(source, kind, paths["nomoat"], overwrite=True)
                number = FILE_TYPES[kind][0]
                asked = {"source": str(source), "out": str(paths["llama.cpp"]), "file_type": number, "threads": given.threads}
                peer.ask("quantize", **asked)
                differ[kind] = same_types(paths["nomoat"], paths["llama.cpp"])
                files[kind] = {}
                for maker, path in paths.items():
                    files[kind][maker] = measure(path, cut, reference, peer, given.threads, str(folder / "logits.npy"))
                    print(f"{kind} by {maker}: {files[kind][maker]}", file=sys.stderr, flush=True)
            about = peer.ask("load", path=str(source), context=CONTEXT, threads=given.threads)
    scored = sum(len(targets_of(window)) for window in cut)
    figures = {
        "work": {"model": model.name, "text": given.text.name, "windows": len(cut), "context": CONTEXT, "scored": scored},
        "source": scores.summary(),
        "files": files,
        "types_that_differ": differ,
        "machine": environment(given.threads),
        "llama.cpp": about,
    }
    print(f"written: {write('quantizers', figures)}")
    PAGE.write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
