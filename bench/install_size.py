"""What `pip install .` fetches, and what lies on disk afterwards.

    python bench/install_size.py

Builds a wheel of this checkout, fetches those of everything that it needs, and adds up both sizes of each: packed, as it is
fetched, and unpacked, as it is installed (without bytecode, which Python writes on first use). Writes
bench/results/install_size.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import environment, write  # noqa: E402


def sizes(wheel: Path) -> dict[str, float]:
    with zipfile.ZipFile(wheel) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    return {"fetched_mb": round(wheel.stat().st_size / 1e6, 2), "on_disk_mb": round(unpacked / 1e6, 2)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build = f"--config-settings=build-dir={folder}/build"  # not the one that `make build` keeps
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", folder, build, str(ROOT)], check=True)
        found = {wheel.name.partition("-")[0]: sizes(wheel) for wheel in Path(folder).glob("*.whl")}
    packages = dict(sorted(found.items(), key=lambda entry: -entry[1]["on_disk_mb"]))
    total = {key: round(sum(package[key] for package in packages.values()), 1) for key in ("fetched_mb", "on_disk_mb")}
    for name, size in [*packages.items(), (f"{len(packages)} wheels", total)]:
        print(f"{name:24} {size['fetched_mb']:6.1f} MB fetched {size['on_disk_mb']:7.1f} MB on disk")
    write("install_size", {"environment": environment(0), **total, "packages": packages})


if __name__ == "__main__":
    main()
