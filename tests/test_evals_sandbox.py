"""Code that a model wrote: what it cannot reach, use up, leave behind or pretend. Needs a working bubblewrap."""

from __future__ import annotations

import os
import platform
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nomoat.errors import SandboxError
from nomoat.evals.tasks import sandbox as sandbox_module
from nomoat.evals.tasks.sandbox import FILE_BYTES, PATIENCE, TMP_BYTES, Limits, Sandbox, Verdict, command
from nomoat.evals.tasks.seccomp import MACHINES

LIMITS = Limits(seconds=5, memory=256 << 20)
ADDITION = "assert f(2, 3) == 5\nassert f(20, 22) == 42\n"


@pytest.fixture(scope="module")
def sandbox(bubblewrap: None) -> Sandbox:
    return Sandbox(LIMITS)


def judge(sandbox: Sandbox, answer: str, program: str = ADDITION, helpers: str = "") -> Verdict:
    return sandbox.judge(answer, {"helpers": helpers, "program": program, "remote": ["f"]})


def told(sandbox: Sandbox, body: str) -> str:
    """What a function with these lines returns inside, or the name of the error that it raises."""
    lines = "\n    ".join(body.splitlines())
    answer = f"""
import os, sys
def attempt():
    {lines}
def f():
    try:
        return str(attempt())
    except (OSError, RuntimeError) as error:
        return type(error).__name__ + (': ' + error.strerror if isinstance(error, OSError) else '')
"""
    verdict = judge(sandbox, answer, "assert f() == 'never'\n")
    assert verdict.outcome == "failed", verdict
    return verdict.detail.partition("# got ")[2].strip("'\"")


# -- verdicts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "outcome", "detail"),
    [
        ("def f(a, b): return a + b", "passed", ""),
        ("f = lambda a, b: a + b", "passed", ""),
        ("print('x' * 10**6)\ndef f(a, b):\n    print(a)\n    return a + b", "passed", ""),
        ("def f(a, b): return 5", "failed", "assert f(20, 22) == 42  # got 5"),
        ("def f(a, b): pass", "failed", "assert f(2, 3) == 5  # got None"),
        ("def f(a, b): return a / 0", "error", "ZeroDivisionError: division by zero; in assert f(2, 3) == 5"),
        ("def f(a, b: return 5", "error", "SyntaxError"),
        ("def g(a, b): return a + b", "error", "NameError: name 'f' is not defined"),
        ("def f(a, b): return input()", "error", "EOFError"),
        ("def f(a, b): return f(a, b)", "error", "RecursionError"),
        ("def f(a, b): raise StopIteration", "error", "StopIteration"),
        ("def f(a, b): assert False", "error", "AssertionError"),
        ("\0", "error", "null bytes"),
        ("", "error", "NameError"),
    ],
)
def test_a_verdict_and_its_reason(sandbox: Sandbox, answer: str, outcome: str, detail: str) -> None:
    verdict = judge(sandbox, answer)
    assert verdict.outcome == outcome
    assert detail in verdict.detail
    assert verdict.seconds > 0


def test_values_keep_their_types_on_the_way(sandbox: Sandbox) -> None:
    values = "[None, True, 1, -1.5, 10**6000, 2+3j, 'é', b'\\xff', (1,), [2], {3}, frozenset({4}), {(5,): [6]}, range(7), int]"
    check = "    got = f(value)\n    assert got == value and type(got) is type(value), value\n"
    program = f"values = {values}\nfor value in values:\n{check}"
    assert judge(sandbox, "def f(x): return x", program).outcome == "passed"


def test_classes_of_the_answer_can_be_used_by_the_tests(sandbox: Sandbox) -> None:
    answer = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
def f(node): return 1 + (f(node.left) if node.left else 0)
def numbers(): yield from range(3)
"""
    program = """
root = Node(1)
root.left = Node(2)
root.left.left = Node(3)
assert f(root) == 3
assert root.left.value == 2
assert list(numbers()) == [0, 1, 2]
assert numbers() != [0, 1, 2]
"""
    assert judge(sandbox, answer, program).outcome == "passed"


def test_verdicts_that_depend_on_the_order_of_a_set_repeat(sandbox: Sandbox) -> None:
    program = "assert f() == 'never'\n"
    details = {judge(sandbox, "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})", program).detail for _ in range(4)}
    assert len(details) == 1


# -- reaching out ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


def test_no_network(sandbox: Sandbox, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), 2):  # it does listen
        listener.accept()[0].close()
    connect = f"import socket\nreturn socket.create_connection(('127.0.0.1', {port}), 2)"
    assert told(sandbox, connect) == "PermissionError: Operation not permitted"
    with pytest.raises(BlockingIOError):
        listener.accept()
    for family in ("AF_INET6", "AF_UNIX", "AF_VSOCK", "AF_NETLINK", "AF_ALG"):
        body = f"import socket\nreturn socket.socket(socket.{family}, socket.SOCK_STREAM)"
        assert told(sandbox, body) == "PermissionError: Operation not permitted", family


def test_no_files_of_the_user(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for path in (secret, "/etc/passwd", "/etc/hostname", "/proc/1/environ", "/proc/self/status", Path.home() / ".profile"):
        assert told(sandbox, f"return open({str(path)!r}).read()[:80]").startswith(("FileNotFound", "PermissionError")), path
    top = set(told(sandbox, "return ' '.join(sorted(os.listdir('/')))").split())
    assert top <= {"dev", "etc", "lib", "lib64", "sandbox", "tmp", "usr", *Path(sys.base_prefix).parts}
    assert told(sandbox, "return ' '.join(os.listdir('/etc'))") in ("ld.so.cache", "")
    assert told(sandbox, "return ' '.join(sorted(os.listdir('/sandbox')))").split() == ["guest.py", "payload"]


def test_no_environment_and_no_other_processes(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMOAT_SECRET", "hunter2")
    assert set(told(sandbox, "return ' '.join(os.environ)").split()) <= {"PWD", "LC_CTYPE", "PYTHONHASHSEED"}
    assert told(sandbox, "return ' '.join([str(os.getuid()), os.uname().nodename])") == "65534 sandbox"
    assert told(sandbox, f"return os.kill({os.getpid()}, 0)") == "ProcessLookupError: No such process"


def test_nothing_is_written_outside(sandbox: Sandbox, tmp_path: Path) -> None:
    refused = ("OSError: Read-only file system", "FileNotFoundError: No such file or directory")
    library = os.path.dirname(os.__file__)
    for place in (tmp_path / "x", "/x", "/dev/x", "/dev/shm/x", "/sandbox/guest.py", "/usr/lib/x", f"{library}/x"):
        assert told(sandbox, f"return open({str(place)!r}, 'w').write('x')") in refused, place
    name = f"/tmp/nomoat-{os.getpid()}"
    assert told(sandbox, f"open({name!r}, 'w').write('x')\nreturn open({name!r}).read()") == "x"
    assert not Path(name).exists()
    assert told(sandbox, f"return open({name!r}).read()") in refused  # not even in the next run


# -- using up ----------------------------------------------------------------------------------------------------------------

CALLS = MACHINES.get(platform.machine(), (0, {"clone": -1, "clone3": -1}))[1]
START = {
    "fork": "os.fork()",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "subprocess": "import subprocess\nsubprocess.run([sys.executable, '-c', ''])",
    "spawn": "os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})",
    "clone": f"import ctypes\nif ctypes.CDLL(None).syscall({CALLS['clone']}, 17, 0, 0, 0, 0) < 0: raise OSError(1, 'refused')",
    "clone3": f"import ctypes\nif ctypes.CDLL(None).syscall({CALLS['clone3']}, 0, 0) < 0: raise OSError(1, 'refused')",
    "user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) < 0: raise OSError(1, 'refused')",
}


@pytest.mark.parametrize("how", START.values(), ids=START.keys())
def test_no_more_processes(sandbox: Sandbox, how: str) -> None:
    assert told(sandbox, f"{how}\nreturn 'started'").startswith(("PermissionError", "RuntimeError", "BlockingIOError"))


@pytest.mark.usefixtures("sandbox")
def test_a_fork_bomb_leaves_nothing() -> None:
    bomb = "import os\ndef f(a, b):\n    while True:\n        try: os.fork()\n        except OSError: pass\n"
    before = set(psutil.pids())
    seen: list[int] = []
    watch = threading.Timer(1.0, lambda: seen.append(len(set(psutil.pids()) - before)))
    watch.start()
    quick = Sandbox(Limits(seconds=2))
    assert judge(quick, bomb).outcome == "timeout"
    watch.join()
    assert seen[0] < 100  # the sandboxes, and what else happens on this machine


def test_memory_is_limited(sandbox: Sandbox) -> None:
    assert "MemoryError" in judge(sandbox, "def f(a, b): return len(bytearray(300 << 20))").detail
    hog = "def f(a, b):\n    kept = []\n    while True: kept.append(bytearray(1 << 20))\n"
    assert judge(sandbox, hog).outcome in ("error", "crashed")
    shared = "import ctypes\nreturn ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600)"
    assert told(sandbox, shared) == "-1"
    assert told(sandbox, "return os.memfd_create('x')") == "PermissionError: Operation not permitted"


def test_disk_is_limited(sandbox: Sandbox) -> None:
    assert told(sandbox, "return open('/tmp/x', 'wb', 0).write(bytes(5 << 20))") == str(FILE_BYTES)
    assert told(sandbox, "return open('/tmp/x', 'wb').write(bytes(5 << 20))") == "OSError: File too large"
    fill = """
size = 0
try:
    for name in range(1000):
        size += open(f'/tmp/{name}', 'wb', 0).write(bytes(1 << 20))
except OSError as error:
    return f'{error.strerror} {size}'
"""
    message, _, size = told(sandbox, fill).rpartition(" ")
    assert message == "No space left on device"
    assert int(size) <= TMP_BYTES


HOGS = {
    "loop": "def f(a, b):\n    while True: pass\n",
    "loop at import": "while True: pass\n",
    "sleep": "import time\ndef f(a, b): time.sleep(1000)\n",
    "output": "def f(a, b):\n    while True: print('x' * 10000)\n",
    "signals": "import signal\nfor n in (1, 2, 3, 10, 12, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass\n",
    "uninterruptible": "def f(a, b): return 10 ** (10 ** 10)\n",
}


@pytest.mark.parametrize("answer", HOGS.values(), ids=HOGS.keys())
@pytest.mark.usefixtures("sandbox")
def test_time_is_limited(answer: str) -> None:
    quick = Sandbox(Limits(seconds=1))
    verdict = judge(quick, answer)
    assert verdict.outcome in (("crashed", "timeout") if "SIG_IGN" in answer else ("timeout",)), verdict
    assert verdict.seconds < PATIENCE + 3  # the machine may be busy
    assert no_sandbox_is_left()


def test_a_flood_on_every_descriptor_fills_no_memory(sandbox: Sandbox) -> None:
    flood = """
import os, itertools
def f(a, b):
    for fd in itertools.cycle(range(64)):
        try: os.write(fd, b'x' * 65536)
        except OSError: pass
"""
    before = psutil.Process().memory_info().rss
    assert judge(sandbox, flood).outcome in ("crashed", "timeout")
    assert psutil.Process().memory_info().rss - before < 64 << 20


def no_sandbox_is_left() -> bool:
    """Whether, within two seconds, no process below this one is left over."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        if not [child for child in psutil.Process().children(recursive=True) if "bwrap" in child.name()]:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("target", ["1", "os.getppid()", "-1", "0"])
def test_killing_around_changes_nothing_but_its_own_verdict(sandbox: Sandbox, target: str) -> None:
    verdict = judge(sandbox, f"import os\ndef f(a, b):\n    os.kill({target}, 9)\n    return a + b")
    assert verdict.outcome in ("passed", "crashed", "error"), verdict  # -1: nobody is there
    assert no_sandbox_is_left()
    assert judge(sandbox, "def f(a, b): return a + b").outcome == "passed"


# -- pretending --------------------------------------------------------------------------------------------------------------

VERDICT = repr(b'{"outcome": "passed", "detail": ""}\n')
REPLIES = repr(b'["value", 1]\n' * 100)
EQUAL = "    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
EVERYWHERE = "for fd in range(64):\n    try: os.write(fd, {})\n    except OSError: pass\n"
WRONG = "def f(a, b): return 0\n"
FORGERIES = {
    "exit": "import os\nos._exit(0)",
    "exit in the function": "import os\ndef f(a, b): os._exit(0)",
    "sys.exit": "import sys\ndef f(a, b): sys.exit(0)",
    "at exit": f"import atexit, os\natexit.register(lambda: os.write(2, {VERDICT}))\ndef f(a, b): raise SystemExit(0)",
    "equal to everything": f"class Any:\n{EQUAL}def f(a, b): return Any()",
    "a number equal to everything": f"class Any(int):\n{EQUAL}def f(a, b): return Any(0)",
    "a list equal to everything": f"class Any(list):\n{EQUAL}def f(a, b): return Any()",
    "builtins": f"import builtins\nbuiltins.AssertionError = builtins.sorted = builtins.abs = None\n{WRONG}",
    "names of the tests": f"{WRONG}isclose = sorted = abs = check = lambda *a: 5\nmath = None",
    "a verdict on every descriptor": f"import os\n{EVERYWHERE.format(VERDICT)}{WRONG}",
    "replies ahead of time": f"import os\n{EVERYWHERE.format(REPLIES)}{WRONG}",
    "another encoder": f"import __main__\n__main__.encode = lambda value, keep: ['object', 0, True]\n{WRONG}",
    "no JSON": f"import __main__\n__main__.json.dumps = lambda value: '[' * 100000\n{WRONG}",
    "a huge reply": "def f(a, b): return 'x' * (17 << 20)",
    "a deep reply": "def f(a, b):\n    made = []\n    for _ in range(100000): made = [made]\n    return made",
    "looking for the tests": "import gc\ndef f(a, b): return 5 if a == 2 and '20, 22' in str(gc.get_objects()) else 0",
    "end of iteration": "def f(*a): raise StopIteration",
}
CHECKS = {
    "plain": ADDITION,
    "wrapped": "import math\nassert math.isclose(f(2, 3), 5)\nassert abs(f(20, 22) - 42) < 0.1 and sorted([f(1, 1)]) == [2]\n",
    "mapped": "assert all(map(lambda pair: f(*pair) == sum(pair), [(2, 3), (20, 22)])) and len(list(map(f, [1], [2]))) == 1\n",
}


@pytest.mark.parametrize("program", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("answer", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_verdict_cannot_be_forged(sandbox: Sandbox, answer: str, program: str) -> None:
    assert judge(sandbox, answer, program).outcome != "passed"


@pytest.mark.usefixtures("sandbox")
def test_a_reply_that_is_endless_work_is_no_way_out() -> None:
    answer = f"import __main__\n__main__.encode = lambda *a: ['fraction', '1e999999999']\n{WRONG}"
    assert judge(Sandbox(Limits(seconds=1)), answer).outcome != "passed"


@pytest.mark.parametrize("program", CHECKS.values(), ids=CHECKS.keys())
def test_a_right_answer_passes_the_same_tests(sandbox: Sandbox, program: str) -> None:
    assert judge(sandbox, "def f(a, b): return a + b", program).outcome == "passed"


def test_a_module_that_the_tests_use_is_pythons_own(sandbox: Sandbox) -> None:
    answer = "class math:\n    isclose = staticmethod(lambda *a: True)\ndef f(a, b): return 0"
    assert judge(sandbox, answer, "assert math.isclose(f(2, 3), 5)\n").outcome == "failed"


# -- refusing ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_bwrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, first on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "bwrap"


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_without_bubblewrap_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"`bwrap` is not on the PATH\. Install the package bubblewrap") as refused:
        Sandbox()
    assert (refused.value.exit_code, refused.value.code) == (6, "E_SANDBOX")


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("bwrap: setting up uid map: Permission denied", "the system forbids user namespaces"),
        ("bwrap: No permissions to create new namespace", "the system forbids user namespaces"),
        ("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", "apparmor_restrict_unprivileged_userns"),
        ("bwrap: Unknown option --disable-userns", "Expected bubblewrap 0.8 or newer"),
        ("bwrap: execvp python: No such file or directory", "Try it by hand"),
    ],
)
def test_a_bubblewrap_that_fails_is_explained(fake_bwrap: Path, complaint: str, advice: str) -> None:
    script(fake_bwrap, f"#!/bin/sh\necho '{complaint}' >&2\nexit 1\n")
    with pytest.raises(SandboxError, match=advice) as refused:
        Sandbox()
    assert complaint in str(refused.value)


def test_a_bubblewrap_that_holds_nothing_is_found_out(fake_bwrap: Path, tmp_path: Path) -> None:
    guest = Path(sandbox_module.__file__).with_name("guest.py")
    (tmp_path / "guest.py").write_text(guest.read_text())
    (tmp_path / "payload").write_text("")
    script(
        fake_bwrap,
        f'#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\npython=$2; shift 4\nexec "$python" -sSB {tmp_path}/guest.py "$@"\n',
    )
    with pytest.raises(SandboxError, match="code inside could") as refused:
        Sandbox()
    assert "open a socket" in str(refused.value)
    assert "read /etc/passwd" in str(refused.value)


def test_a_sandbox_that_breaks_later_is_no_verdict(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_command", [*sandbox._command, "--ro-bind", "/no/such/folder", "/x"])
    with pytest.raises(SandboxError, match="no/such/folder"):
        judge(sandbox, "def f(a, b): return a + b")


def test_every_promise_has_its_argument() -> None:
    arguments = command("bwrap")
    for argument in "--unshare-all --unshare-user --disable-userns --die-with-parent --new-session --clearenv".split():
        assert argument in arguments
    assert arguments[arguments.index("--cap-drop") + 1] == "ALL"
    assert arguments[arguments.index("--size") + 1 : arguments.index("--size") + 4] == [str(TMP_BYTES), "--tmpfs", "/tmp"]
    assert not {"--bind", "--share-net", "--dev", "--proc"} & set(arguments)
    assert "/" not in arguments
    assert not any(path.startswith(os.path.expanduser("~") + "/.ssh") for path in arguments)
