"""config.json of a Hugging Face folder: bounded, parsed, a mapping."""

from __future__ import annotations

import json
from pathlib import Path

from nomoat.errors import FileFormatError, NotFoundError, printable

#: The largest published config.json files hold a few hundred kilobytes of labels.
MAX_CONFIG_BYTES = 4 << 20


def read_config(folder: Path) -> dict[str, object]:
    """The parsed config.json. Raises NotFoundError, or FileFormatError with code E_LIMIT, E_UTF8, E_JSON, E_DUP or E_TYPE."""
    path = folder / "config.json"
    if not path.is_file():
        raise NotFoundError(f"{printable(str(folder))}: no config.json here; expected a Hugging Face model folder")
    with path.open("rb") as stream:
        raw = stream.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise FileFormatError(
            f"larger than {MAX_CONFIG_BYTES >> 20} MiB, which no configuration needs", code="E_LIMIT", path=path
        )
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise FileFormatError("not UTF-8", code="E_UTF8", path=path, offset=error.start) from None
    except _DuplicateKeyError as error:
        raise FileFormatError(f"the key `{printable(str(error))[:80]}` occurs twice", code="E_DUP", path=path) from None
    except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(str(error))[:120]
        raise FileFormatError(f"not JSON: {reason}", code="E_JSON", path=path) from None
    if not isinstance(found, dict):
        raise FileFormatError(f"holds a JSON {type(found).__name__}, expected an object", code="E_TYPE", path=path)
    return found


class _DuplicateKeyError(Exception):
    """Two values for one key: readers disagree about which counts."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return found
