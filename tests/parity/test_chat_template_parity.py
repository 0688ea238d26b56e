"""The golden texts of chat templates are what transformers renders today."""

from __future__ import annotations

import json
from pathlib import Path

from golden import make_chat_templates


def test_golden_is_what_transformers_renders(shared_data: Path) -> None:
    stored = json.loads(make_chat_templates.FILE.read_text(encoding="utf-8"))
    assert make_chat_templates.make(shared_data / "chat_templates") == stored
