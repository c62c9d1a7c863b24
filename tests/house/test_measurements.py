"""Numbers in pages are those that were measured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.loadtests import script

DOCS = Path(__file__).parents[2] / "docs"


def test_the_numbers_in_capacity_are_those_of_the_measurement_it_names() -> None:
    ceiling_report = script("ceiling_report")
    block, source = ceiling_report.block_of((DOCS / "capacity.md").read_text(encoding="utf-8"))
    report = json.loads((DOCS / source).read_text(encoding="utf-8"))
    assert block == ceiling_report.capacity_block(report, source), "run loadtest/memory_ceiling.py --from … again"
