"""The stored configurations, tensor names and rotary frequencies are what transformers makes today."""

from __future__ import annotations

import json
from typing import Any

import pytest

from golden.make_transformers_configs import CASES, FILE, make

STORED: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_goldens_are_what_transformers_writes(name: str) -> None:
    fresh = json.loads(json.dumps(make(name)))
    stored = STORED[name]
    assert fresh["config"] == stored["config"]
    assert fresh["tensors"] == stored["tensors"]
    assert fresh["ropes"].keys() == stored["ropes"].keys()
    for section, rope in fresh["ropes"].items():
        assert rope["inv_freq"] == pytest.approx(stored["ropes"][section]["inv_freq"], rel=1e-6)
        assert rope["magnitude"] == pytest.approx(stored["ropes"][section]["magnitude"], rel=1e-12)
