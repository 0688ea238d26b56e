"""The golden texts and cuts of model families are what transformers and the published expressions give today."""

from __future__ import annotations

import json
from pathlib import Path

from golden import make_family_templates, make_pretokenizers


def test_golden_is_what_apply_chat_template_gives(shared_data: Path) -> None:
    stored = json.loads(make_family_templates.FILE.read_text(encoding="utf-8"))
    assert make_family_templates.make(shared_data / "chat_templates") == stored


def test_golden_is_what_the_published_expressions_cut() -> None:
    stored = json.loads(make_pretokenizers.FILE.read_text(encoding="utf-8"))
    assert make_pretokenizers.make(None)["pieces"] == stored["pieces"]
