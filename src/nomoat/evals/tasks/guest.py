"""What runs inside the sandboxes: Python's own library only, nothing of nomoat is there.

    sandbox of the tests                          sandbox of the answer
    runs a problem's tests            request     runs the model's code
    candidate([1, 2]) == 3   ------------------>  calls what it defined
    compares the reply       <------------------  result as plain data
                                       reply

The process that decides never runs a line of the answer, and the answer never sees the tests. Between them go JSON lines:
numbers, texts, and containers of these, rebuilt from scratch. So an answer cannot patch `assert` or `len`, return an object
that claims to equal everything, leave with a good exit status, or look up what is expected: only right results pass.

`python guest.py answer | tests | probe`: the text of the answer, or the tests as JSON, are in the file `payload` beside this
one; stdin and stdout go to the other side; the verdict, one JSON object, goes to stderr.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import itertools
import json
import os
import random
import resource
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, KeysView
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

TESTS_FILE = "<tests>"
MAX_LINE = 16 << 20  # bytes of one request or reply
MAX_ITEMS = 1_000_000  # taken out of an answer's iterator
MAX_DETAIL = 400  # characters of an explanation
_SHORT = 1 << 64  # larger whole numbers are written in base 16: Python refuses decimal ones of thousands of digits


# -- values ------------------------------------------------------------------------------------------------------------------


_CONTAINERS: tuple[type, ...] = (list, tuple, set, frozenset, deque)


def encode(value: Any, reference: Callable[[Any], Any]) -> Any:
    """`value` as JSON: scalars as they are, all else as [kind, content]. `reference` writes what is not plain data."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -_SHORT < value < _SHORT else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return ["dict", [[encode(key, reference), encode(item, reference)] for key, item in value.items()]]
    kind = next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)
    if kind is not None:
        return [kind.__name__, [encode(item, reference) for item in value]]
    if isinstance(value, KeysView):
        return ["set", [encode(item, reference) for item in value]]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, Fraction | Decimal):
        return [type(value).__name__.lower(), str(value)]
    if isinstance(value, type) and value in vars(builtins).values():
        return ["type", value.__name__]
    return reference(value)


_BUILD: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "int": lambda content: int(content, 16),
    "complex": lambda content: complex(*content),
    "bytes": bytes.fromhex,
    "range": lambda content: range(*content),
    "fraction": Fraction,
    "decimal": Decimal,
}


def decode(wire: Any, reference: Callable[[list[Any]], Any]) -> Any:
    """The value that `encode` wrote; `reference` reads what it does not know. Raises ValueError, TypeError, RecursionError."""
    if not isinstance(wire, list):
        return wire
    kind, content = wire[0], wire[1]
    if kind == "dict":
        return {decode(key, reference): decode(item, reference) for key, item in content}
    if kind == "type":
        named = getattr(builtins, content, None)
        if not isinstance(named, type):
            raise ValueError(f"{content} is no type")
        return named
    if kind in _BUILD:
        build = _BUILD[kind]
        return build([decode(item, reference) for item in content] if isinstance(content, list) else content)
    return reference(wire)


def short(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"


# -- the answer's side -------------------------------------------------------------------------------------------------------


class AnswerSide:
    """Runs the answer's program, then what the tests ask for, until they stop asking."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self.requests, self.replies = requests, replies
        self.namespace: dict[str, Any] = {"__name__": "answer"}
        self.objects: list[Any] = []  # results that are not plain data stay here; the tests hold their index

    def serve(self, program: str) -> None:
        fault = self._attempt(lambda: exec(compile(program, "answer.py", "exec"), self.namespace))
        for line in self.requests:
            reply = fault if fault[0] == "raised" else self._attempt(functools.partial(self._do, line))
            self.replies.write(json.dumps(reply).encode() + b"\n")
            self.replies.flush()

    def _attempt(self, action: Callable[[], Any]) -> list[Any]:
        try:
            return ["value", encode(action(), self._keep)]
        except BaseException as error:
            return ["raised", type(error).__name__, short(str(error))]

    def _keep(self, value: Any) -> list[Any]:
        self.objects.append(value)
        return ["object", len(self.objects) - 1, bool(value)]

    def _do(self, line: bytes) -> Any:
        action, target, *rest = json.loads(line)
        subject = self._named(target) if isinstance(target, str) else self.objects[target]
        values = [decode(value, lambda wire: self.objects[wire[1]]) for value in rest]
        if action == "call":
            return subject(*values[0], **values[1])
        if action == "get":
            return getattr(subject, values[0])
        if action == "set":
            return setattr(subject, values[0], values[1])
        return list(itertools.islice(subject, MAX_ITEMS))

    def _named(self, name: str) -> Any:
        if name not in self.namespace:
            raise NameError(f"name {name!r} is not defined")
        return self.namespace[name]


# -- the tests' side ---------------------------------------------------------------------------------------------------------


class AnswerError(Exception):
    """The answer raised an exception. One type for all: a StopIteration of its own making could end a test's `map` early."""


class AnswerGoneError(BaseException):
    """The answer's process ended, or sends what is no reply. No `except Exception` in a test stops it."""


class Link:
    """Asks the other side. `last` holds what it answered most recently, for explanations."""

    def __init__(self, replies: BinaryIO, requests: BinaryIO) -> None:
        self.replies, self.requests = replies, requests
        self.last: list[Any] = []

    def ask(self, action: str, target: Any, *values: Any) -> Any:
        request = [action, target, *(encode(value, _reference) for value in values)]
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()
            line = self.replies.readline(MAX_LINE + 1)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise AnswerGoneError(f"a result of more than {MAX_LINE >> 20} MiB" if len(line) > MAX_LINE else "")
        try:
            kind, *content = json.loads(line)
            value = ": ".join(map(str, content)) if kind == "raised" else decode(content[0], self._remote)
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise AnswerGoneError(f"a result that is no data: {short(str(error))}") from None
        if kind == "raised":
            raise AnswerError(value)
        self.last = [value]
        return value

    def _remote(self, wire: list[Any]) -> Remote:
        kind, index, truth = wire
        if kind != "object" or not isinstance(index, int):
            raise ValueError(f"a value of kind {kind!r}")
        return Remote(self, index, truth is True)


class Remote:
    """A function, class or object of the answer. It equals nothing but itself, and its truth was told once."""

    def __init__(self, link: Link, target: str | int, truth: bool = True) -> None:
        vars(self).update(_link=link, _target=target, _truth=truth)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._link.ask("call", self._target, list(values), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python looks for by itself
            raise AttributeError(name)
        return self._link.ask("get", self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self._target, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask("list", self._target))

    def __bool__(self) -> bool:
        return bool(self._truth)


def _reference(value: Any) -> list[Any]:
    if isinstance(value, Remote) and isinstance(vars(value)["_target"], int):
        return ["object", vars(value)["_target"]]
    raise TypeError(f"the test passes an object of type {type(value).__name__}, which is no plain data")


def _got(value: Any) -> str:
    try:
        return f"  # got {short(repr(value))}"
    except ValueError:  # a number of thousands of digits
        return ""


def used_names(program: str) -> tuple[set[str], set[str]]:
    """Names that a program uses and neither defines nor finds among Python's own: (all, those that are modules, as `math.pi`)."""
    used: set[str] = set()
    made: set[str] = set(dir(builtins))
    dotted: set[str] = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted.add(node.value.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).split(".")[0])
    used -= made
    return used, used & dotted & sys.stdlib_module_names


def verdict(tests: dict[str, Any], link: Link) -> dict[str, str]:
    """Run `helpers`, then `program` with the names in `remote` standing for the answer's; outcome and explanation.

    Names that the program uses and nobody defines are the answer's too (a class of its own, say), except modules of the
    standard library: those are imported here, as an answer must not replace `math.isclose`.
    """
    program, remote = tests["program"], set(tests["remote"])
    namespace: dict[str, Any] = {"__name__": "tests"}
    random.seed(0)
    try:
        exec(compile(tests["helpers"], "<helpers>", "exec"), namespace)
        used, modules = used_names(program)
        for name in (used - namespace.keys()) | remote:
            local = name in modules - remote
            namespace[name] = importlib.import_module(name) if local else Remote(link, name)
        exec(compile(program, TESTS_FILE, "exec"), namespace)
    except AnswerGoneError as error:
        return {"outcome": "crashed", "detail": str(error)}
    except BaseException as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == TESTS_FILE]
        line = program.splitlines()[at[-1] - 1].strip() if at and at[-1] else ""
        if isinstance(error, AssertionError):
            return {"outcome": "failed", "detail": f"{short(line)}{''.join(map(_got, link.last))}"}
        what = str(error) if isinstance(error, AnswerError) else f"{type(error).__name__}: {error}"
        return {"outcome": "error", "detail": f"{short(what)}; in {short(line)}"}
    return {"outcome": "passed", "detail": ""}


# -- both --------------------------------------------------------------------------------------------------------------------


def set_limits(memory: int, seconds: int, file_bytes: int) -> None:
    """Hard limits: no process can raise them again. What ignores the signal at the end of its time is killed a second later."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for which, value in {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }.items():
        resource.setrlimit(which, (value, value))


def probe(memory: int) -> list[str]:
    """What the sandbox should make impossible and does not."""

    def possible(action: Callable[[], object]) -> bool:
        try:
            action()
        except (OSError, MemoryError):
            return False
        return True

    def process() -> None:
        if os.fork() == 0:
            os._exit(0)

    tries: dict[str, Callable[[], object]] = {
        "start a process": process,
        "open a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "write to /": lambda: Path("/new").touch(),
        "write to /sandbox": lambda: Path("/sandbox/new").touch(),
        "list the processes": lambda: os.listdir("/proc"),
        "read /etc/passwd": lambda: Path("/etc/passwd").read_bytes(),
        "take more memory than allowed": lambda: bytearray(memory),
    }
    found = [name for name, action in tries.items() if possible(action)]
    if extra := os.environ.keys() - {"PYTHONHASHSEED", "PWD", "LC_CTYPE"}:
        found.append(f"read the environment variable {min(extra)}")
    return found


def main(side: str, memory: int, seconds: int, file_bytes: int) -> None:
    """The other side and the verdict get descriptors of their own; 0, 1 and 2 lead nowhere before foreign code runs."""
    incoming, outgoing, log = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(2), "w")
    nowhere = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    payload = Path(__file__).with_name("payload").read_text(encoding="utf-8")
    set_limits(memory, seconds, file_bytes)
    if side == "answer":
        log.close()
        AnswerSide(incoming, outgoing).serve(payload)
        return
    with log:
        json.dump(verdict(json.loads(payload), Link(incoming, outgoing)) if side == "tests" else {"possible": probe(memory)}, log)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
