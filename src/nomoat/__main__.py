"""`python -m nomoat` is `nomoat`."""

from __future__ import annotations

import sys

from nomoat.cli import main

if __name__ == "__main__":
    sys.exit(main())
