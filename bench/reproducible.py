"""The same adapter file from a fresh run, with one thread and with two, and after random kill -9 with resume.

    python bench/reproducible.py [--kills 20] [--steps 36] [--model smollm2:135m]

Trains on the first 320 ticket rows. Every run is a process of its own with a home of its own; the killed one writes a
checkpoint after every step and is killed at random moments until it has been killed often enough. Prints the sha256 of each
`adapter_model.safetensors`, writes bench/results/reproducible.json, exits with 1 if they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import environment, write  # noqa: E402

ROWS = 320
CHILD = """
import json, sys
import nomoat
options = json.loads(sys.argv[1])
model, data = options.pop("model"), options.pop("data")
nomoat.train(model, data, name="check", metric="none", learning_rate=1e-3, batch_sequences=8, **options)
"""


def start(home: Path, model: str, data: Path, steps: int, **options: object) -> subprocess.Popen[bytes]:
    values = {"model": model, "data": str(data), "max_steps": steps, "overwrite": True, **options}
    variables = {**os.environ, "NOMOAT_HOME": str(home)}
    return subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(values)], env=variables, stdout=subprocess.DEVNULL)


def digest(home: Path) -> str:
    adapter = home / "data" / "adapters" / "check" / "adapter_model.safetensors"
    return hashlib.sha256(adapter.read_bytes()).hexdigest()


def finish(child: subprocess.Popen[bytes]) -> None:
    if child.wait() != 0:
        raise SystemExit(f"a training run ended with exit code {child.returncode}")


def killed_run(home: Path, model: str, data: Path, steps: int, kills: int) -> int:
    """Kills the run at random moments until it was killed `kills` times, then lets it end. Returns the kills that landed."""
    chance = random.Random(0)
    landed = 0
    while True:
        child = start(home, model, data, steps, checkpoint_seconds=0, resume=landed > 0)
        if landed < kills:
            # from before the first step to past several checkpoints
            time.sleep(chance.uniform(0.5, 6.0))
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
                landed += 1
                continue
        finish(child)
        if landed >= kills or digest_exists(home):
            return landed


def digest_exists(home: Path) -> bool:
    return (home / "data" / "adapters" / "check" / "adapter_model.safetensors").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--model", default="smollm2:135m")
    arguments = parser.parse_args()
    from nomoat.hub.names import resolve

    model = str(resolve(arguments.model))
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        lines = (ROOT / "examples" / "tickets" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join(lines[:ROWS]), encoding="utf-8")
        for name, threads in (("1 thread", 1), ("2 threads", 2), ("2 threads, again", 2)):
            home = Path(folder) / name.replace(" ", "-")
            finish(start(home, model, data, arguments.steps, threads=threads))
            digests[name] = digest(home)
            print(f"{name:20} {digests[name]}", flush=True)
        home = Path(folder) / "killed"
        landed = killed_run(home, model, data, arguments.steps, arguments.kills)
        digests[f"killed {landed} times"] = digest(home)
        print(f"{f'killed {landed} times':20} {digests[f'killed {landed} times']}", flush=True)
    same = len(set(digests.values())) == 1
    write(
        "reproducible", {"environment": environment(2), "digests": digests, "steps": arguments.steps, "rows": ROWS, "same": same}
    )
    print("all equal" if same else "DIFFERENT")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
