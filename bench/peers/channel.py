"""One side of a comparison in a process and a Python environment of its own: JSON lines over its pipes, arrays in files.

The child calls `serve`, the parent keeps a `Side`. Standard library only, because every environment imports this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Handler = Callable[..., Mapping[str, Any]]


class SideError(RuntimeError):
    """The other side could not do what it was asked to; the message is its own."""


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answers {"op": NAME, ...} lines on standard input until it ends. An answer is what the handler returns, or {"error": ...}.

    Whatever else the process prints goes to standard error: native libraries write to standard output too.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = dict(handlers[asked.pop("op")](**asked))
        except Exception as error:  # the parent decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB of 10^6 bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) / 1e6


def rss_mb() -> float:
    """Resident memory of this process now, pages of mapped files included, in MB of 10^6 bytes; 0 where /proc is not there."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
    except OSError:
        return 0.0


class Side:
    """A child process that serves `module` (for example "bench.peers.llamacpp_side") under the interpreter `python`."""

    def __init__(self, module: str, python: Path | str = sys.executable, *, env: Mapping[str, str] | None = None) -> None:
        self.module = module
        self._process = subprocess.Popen(
            [str(python), "-m", module],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, op: str, **values: Any) -> dict[str, Any]:
        """The answer to one request. Raises SideError: the handler failed, or the process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(
                f"{self.module} ended with status {self._process.wait()} before it answered {op!r}; its message is above"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(f"{self.module}, {op!r}: {answer['error']}")
        return answer

    def timed(self, op: str, **values: Any) -> tuple[dict[str, Any], float]:
        """The answer, and the seconds it took as the parent saw it."""
        began = time.perf_counter()
        answer = self.ask(op, **values)
        return answer, time.perf_counter() - began

    def close(self) -> None:
        """Ends the process: its input ends, so its loop does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
