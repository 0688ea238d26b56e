"""Every path, environment variable and default, once.

NOMOAT_HOME     one folder for everything nomoat writes (default: the platform's data and cache folders)
NOMOAT_CPU      force a CPU level: scalar, avx2, avx2_vnni, avx512, amx, neon
NOMOAT_THREADS  worker threads (default: the physical cores this process may use)
NOMOAT_OFFLINE  1 = never open a socket (same as --offline)
NOMOAT_CACHE_GB packed weights kept in the cache folder, in GB (default: 50)
"""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "NOMOAT_HOME"
CPU_VARIABLE = "NOMOAT_CPU"
THREADS_VARIABLE = "NOMOAT_THREADS"
OFFLINE_VARIABLE = "NOMOAT_OFFLINE"
CACHE_VARIABLE = "NOMOAT_CACHE_GB"

#: GB of packed weights that stay in the cache folder beside those in use.
PACKED_GB = 50.0


def data_dir() -> Path:
    """Models and adapters: what would hurt to lose."""
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home) / "data"
    import platformdirs

    return Path(platformdirs.user_data_dir("nomoat", appauthor=False))


def cache_dir() -> Path:
    """Packed weights: rebuilt when missing."""
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home) / "cache"
    import platformdirs

    return Path(platformdirs.user_cache_dir("nomoat", appauthor=False))


def packed_limit() -> int:
    """Bytes of packed weights that the cache folder may hold; what is in use stays beyond it."""
    wanted = os.environ.get(CACHE_VARIABLE)
    try:
        gigabytes = PACKED_GB if not wanted else float(wanted)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes <= 1e6:  # also refuses NaN
        from nomoat.errors import InputError

        raise InputError(f"{CACHE_VARIABLE}={wanted!r}: expected gigabytes from 0 to 1000000")
    return int(gigabytes * 1e9)


def models_dir() -> Path:
    """The content-addressed model store."""
    return data_dir() / "models"


def adapters_dir() -> Path:
    """Trained and installed adapters, one PEFT directory each."""
    return data_dir() / "adapters"


def runs_dir() -> Path:
    """Training runs: checkpoints and event logs, one folder each."""
    return data_dir() / "runs"


def benchmarks_dir() -> Path:
    """Public benchmarks, put there by the user: nomoat neither ships nor downloads them."""
    return data_dir() / "benchmarks"


def history_file() -> Path:
    """What was typed into `nomoat run`; readable by its owner only."""
    return data_dir() / "history"


def offline() -> bool:
    """True when the environment forbids opening sockets."""
    return os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0")


def threads() -> int:
    """Worker threads: NOMOAT_THREADS, else the physical cores this process may run on."""
    wanted = os.environ.get(THREADS_VARIABLE)
    if wanted:
        try:
            count = int(wanted)
        except ValueError:
            count = 0
        if not 1 <= count <= 1024:
            from nomoat.errors import InputError

            raise InputError(f"{THREADS_VARIABLE}={wanted!r}: expected a whole number from 1 to 1024")
        return count
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        usable = os.cpu_count() or 1
    import psutil

    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))
