"""A plugin of pytest inside the guest: one JSON line for each test, to the host, the moment it is known.

The line of a test is written when its last phase is over, with the worst outcome of its phases.
Sources: pytest's hook reference.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

VARIABLE = "ASHD_VM_OUTCOMES"
LONGEST_REASON = 6_000
_RANK = ("passed", "skipped", "failed")


class Outcomes:
    """Tells outcomes to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._open: dict[str, dict[str, Any]] = {}

    def _tell(self, **fact: Any) -> None:
        os.write(self._descriptor, json.dumps(fact).encode() + b"\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._tell(fact="collected", tests=len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(fact="test", id=report.nodeid, outcome="failed", seconds=0.0, why=reason(report.longreprtext))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._open.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "why": ""})
        test["seconds"] += report.duration
        if _RANK.index(report.outcome) > _RANK.index(test["outcome"]):
            test["outcome"] = report.outcome
            test["why"] = _why(report)
        if report.when == "teardown":
            test["seconds"] = round(test["seconds"], 2)
            self._tell(fact="test", id=report.nodeid, **self._open.pop(report.nodeid))


def reason(text: str) -> str:
    """The end of a long text, where the reason is."""
    return text if len(text) <= LONGEST_REASON else "…" + text[-LONGEST_REASON:]


def _why(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return reason(report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    if place := os.environ.get(VARIABLE):
        config.pluginmanager.register(Outcomes(os.open(place, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)))
