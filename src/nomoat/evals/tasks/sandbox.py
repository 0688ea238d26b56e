"""Runs code that a model wrote, in bubblewrap (`bwrap`) or not at all.

Each program gets its own namespaces: no network, no other process in sight, and a file system that holds Python, the system's
shared libraries and 16 MiB of /tmp, all but /tmp read-only. No environment, no capabilities, no new processes or threads, and
limits on memory, time, file size and open files. What runs inside, and how a verdict comes about, is in `guest.py`; the
system calls that are closed, in `seccomp.py`.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nomoat.errors import SandboxError, printable
from nomoat.evals.tasks.seccomp import MACHINES, filter_program

TMP_BYTES = 16 << 20
FILE_BYTES = 4 << 20
NOBODY = "65534"
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))  # of a virtual environment: the one behind it
_GUEST, _PAYLOAD = "/sandbox/guest.py", "/sandbox/payload"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_MAX_LOG = 64 << 10  # bytes that are read of what a sandbox reports
_SETUP_SECONDS = 30.0
PATIENCE = 3


@dataclass(frozen=True)
class Limits:
    """For one answer, all its tests together: `seconds` of processor time and bytes of address space in either process.

    Processor time gives the same verdict on a busy machine; answers that sleep end after PATIENCE times as long on the clock.
    """

    seconds: int = 10
    memory: int = 512 << 20


@dataclass(frozen=True)
class Verdict:
    """`outcome`: passed; failed (a wrong result), error (an exception), crashed (its process ended) or timeout."""

    outcome: str
    detail: str
    seconds: float


class Sandbox:
    """A bubblewrap that was seen to keep its promises on this machine.

    Raises SandboxError E_SANDBOX where there is none; there is no weaker mode. Several threads may call `judge`.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        machine = platform.machine()
        if not sys.platform.startswith("linux") or machine not in MACHINES:
            raise SandboxError(
                f"code that a model wrote is run in bubblewrap only: expected Linux on {' or '.join(MACHINES)}, "
                f"this is {sys.platform} on {machine}"
            )
        found = shutil.which("bwrap")
        if found is None:
            raise SandboxError(
                "code that a model wrote is run in bubblewrap only, and its program `bwrap` is not on the PATH. "
                "Install the package bubblewrap (`apt install bubblewrap`, `dnf install bubblewrap`, `pacman -S bubblewrap`)"
            )
        self._command = command(found)
        self._filter = filter_program(machine)
        self._probe()

    def judge(self, answer: str, tests: Mapping[str, Any]) -> Verdict:
        """Run the tests (`helpers`, `program`, `remote`: see `guest.verdict`) against an answer's program.

        Raises SandboxError if a sandbox cannot be set up, which says nothing about the answer.
        """
        began = time.monotonic()
        with ExitStack() as held:
            requests, replies = _pipe(held), _pipe(held)
            complaints, report = _memory_file(held), _memory_file(held)
            theirs = held.enter_context(self._run("answer", answer, requests[0], replies[1], complaints))
            ours = held.enter_context(self._run("tests", json.dumps(dict(tests)), replies[0], requests[1], report))
            for end in (*requests, *replies):
                end.close()  # so that each side notices when the other has gone
            in_time = _ended(ours, PATIENCE * self.limits.seconds)
            seconds = time.monotonic() - began
            if complaint := _text(complaints):  # this descriptor is closed before the answer begins
                raise _no_setup(complaint)
            if not in_time:
                return Verdict("timeout", f"no verdict after {seconds:.0f} s", seconds)
            outcome, detail = _verdict(_text(report))
            if outcome == "crashed" and not detail:
                code = theirs.returncode if _ended(theirs, 1.0) else None
                if code == 128 + signal.SIGXCPU:
                    outcome, detail = "timeout", f"more than {self.limits.seconds} s of processor time"
                else:
                    detail = "the answer's process ended" + (f" with exit code {code}" if code is not None else "")
        return Verdict(outcome, printable(detail), seconds)

    def _probe(self) -> None:
        """Run a program of ours that tries what must be impossible."""
        with ExitStack() as held:
            nowhere = held.enter_context(open(os.devnull, "r+b", buffering=0))
            report = _memory_file(held)
            process = held.enter_context(self._run("probe", "", nowhere, nowhere, report))
            if not _ended(process, _SETUP_SECONDS):
                raise SandboxError(f"bubblewrap did not run a trivial program within {_SETUP_SECONDS:g} s")
            text = _text(report)
        if not text.startswith("{"):
            raise _no_setup(text)
        if possible := json.loads(text)["possible"]:
            raise SandboxError(f"bubblewrap works here, but code inside could {', '.join(possible)}. Nothing was run")

    @contextmanager
    def _run(
        self, side: str, payload: str, stdin: BinaryIO, stdout: BinaryIO, stderr: BinaryIO
    ) -> Iterator[subprocess.Popen[bytes]]:
        """One side in a sandbox of its own; when the block ends, everything in it is dead."""
        with ExitStack() as held:
            rules, text = _memory_file(held, self._filter), _memory_file(held, payload.encode("utf-8", "surrogatepass"))
            limits = (self.limits.memory, self.limits.seconds, FILE_BYTES)
            process = subprocess.Popen(
                [
                    *self._command,
                    *("--seccomp", str(rules.fileno())),
                    *("--file", str(text.fileno()), _PAYLOAD),
                    *("--ro-bind", str(Path(__file__).with_name("guest.py")), _GUEST),
                    *("--remount-ro", "/"),
                    *("--", PYTHON, "-sSB", _GUEST, side, *map(str, limits)),
                ],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(rules.fileno(), text.fileno()),
            )
        try:
            yield process
        finally:
            process.kill()  # bubblewrap's own process; the kernel ends the sandbox with it (--die-with-parent)
            process.wait()


def command(bwrap: str) -> list[str]:
    """The arguments that every sandbox shares. The root and /dev are tmpfs without a limit: made read-only before use."""
    masks = [folder for folder in (_stdlib() / "site-packages", _stdlib() / "dist-packages") if folder.is_dir()]
    return [
        bwrap,
        *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        *("--cap-drop", "ALL", "--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"),
        # Sets of strings have one order in every run, so that an answer that depends on it always gets the same verdict.
        *("--clearenv", "--setenv", "PYTHONHASHSEED", "0"),
        *(part for path in python_files() for part in ("--ro-bind", path, path)),
        *(part for folder in masks for part in ("--tmpfs", str(folder), "--remount-ro", str(folder))),
        *("--dev-bind", "/dev/null", "/dev/null"),
        *("--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),
    ]


def python_files() -> list[str]:
    """What this Python needs to start and to import its own library: interpreter, library, shared objects."""
    prefix = Path(sys.base_prefix).resolve()  # as PYTHON: inside, it finds its library from its own place
    if prefix in (Path("/usr"), Path("/usr/local")):  # shared with other programs
        own = [_stdlib(), *prefix.glob("lib/libpython*.so*")]
    else:
        own = [_stdlib(), prefix / "lib"]
    wanted = [*_LIBRARIES, PYTHON, *map(str, own)]
    return [path for path in dict.fromkeys(wanted) if os.path.exists(path)]


def _stdlib() -> Path:
    return Path(os.__file__).resolve().parent


def _pipe(held: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    reader, writer = os.pipe()
    return held.enter_context(os.fdopen(reader, "rb", 0)), held.enter_context(os.fdopen(writer, "wb", 0))


def _memory_file(held: ExitStack, content: bytes = b"") -> BinaryIO:
    """A file that has no name, ready to be read from its start."""
    file = held.enter_context(os.fdopen(os.memfd_create("nomoat"), "r+b", 0))
    file.write(content)
    file.seek(0)
    return file


def _text(file: BinaryIO) -> str:
    return os.pread(file.fileno(), _MAX_LOG, 0).decode("utf-8", "replace")


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait so long for a process. `Popen.wait` with a timeout would poll, and add up to 50 ms to each of many answers."""
    if process.returncode is not None:
        return True
    watch = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        ended = bool(poll.poll(seconds * 1000))
    finally:
        os.close(watch)
    if ended:
        process.wait()
    return ended


def _verdict(text: str) -> tuple[str, str]:
    if not text:
        return "crashed", "the process that runs the tests ended without a verdict"
    if not text.startswith("{"):
        raise _no_setup(text)
    report = json.loads(text)
    return report["outcome"], report["detail"]


def _no_setup(complaint: str) -> SandboxError:
    """What bubblewrap or Python wrote before any program of ours ran, and what usually helps."""
    line = printable(complaint.strip().splitlines()[-1][:400]) if complaint.strip() else "it ended without a word"
    if "unknown option" in complaint.lower():
        advice = "Expected bubblewrap 0.8 or newer"
    elif any(sign in complaint for sign in ("uid map", "ermission", "not permitted", "amespace", "loopback")):
        advice = (
            "Most likely the system forbids user namespaces: on Ubuntu 24.04 and newer allow them to bwrap (an AppArmor profile "
            "with `userns`, or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`), elsewhere see "
            "`sysctl user.max_user_namespaces`; inside a container, the container's own rules must allow them"
        )
    else:
        advice = f"Try it by hand: `bwrap --unshare-all --ro-bind / / true`. The Python that it runs is {printable(PYTHON)}"
    return SandboxError(f"bubblewrap cannot set up a sandbox here ({line}). {advice}. Nothing was run")
