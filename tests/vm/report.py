"""What came out: collected from the guest's facts, shown while it runs, and rendered as a page of docs/measurements.

Facts in, text out; only `record` touches a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTCOMES = ("passed", "failed", "skipped")
WAYS = {
    "root": "root in the topmost cgroup",
    "service": "root in a delegated cgroup, as of a systemd unit with Delegate=yes",
    "user": "an ordinary user in a subtree delegated to them, as of systemd's user manager",
}
MEASUREMENTS = "docs/measurements"
CUT_OFF = "cut off at the deadline"


@dataclass
class Way:
    """What came out of one way of living."""

    name: str
    tests: list[dict[str, Any]] = field(default_factory=list)
    collected: int = 0
    exit: int | None = None
    ended: bool = False
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)

    def count(self) -> Counter[str]:
        return Counter(test["outcome"] for test in self.tests)

    def failed(self) -> list[dict[str, Any]]:
        return [test for test in self.tests if test["outcome"] == "failed"]

    @property
    def is_good(self) -> bool:
        """All that was collected ran, and nothing failed or stayed."""
        return self.exit == 0 and len(self.tests) >= self.collected > 0 and not self.failed() and not self.left

    def summary(self) -> str:
        count = self.count()
        said = [f"{count[outcome]} {outcome}" for outcome in OUTCOMES]
        if missing := self.collected - len(self.tests):
            said.append(f"{missing} not run")
        if self.left:
            said.append(f"{len(self.left)} left behind")
        if self.ended and self.exit is None:
            said.append(CUT_OFF)
        return f"{', '.join(said)} in {self.seconds:.0f} s"


@dataclass
class Report:
    """A whole run."""

    guest: dict[str, Any] = field(default_factory=dict)
    ways: list[Way] = field(default_factory=list)
    stuck: str = ""

    def hear(self, fact: dict[str, Any]) -> str:
        """Takes a fact in; what to show of it, or nothing."""
        match fact["fact"]:
            case "booted":
                self.guest = {name: value for name, value in fact.items() if name != "fact"}
                return f"booted: {guest_line(self.guest)}"
            case "way":
                self.ways.append(Way(fact["way"]))
                return f"{fact['way']}: {WAYS.get(fact['way'], '')}"
            case "collected":
                self.ways[-1].collected = fact["tests"]
                return f"{self.ways[-1].name}: {fact['tests']} tests"
            case "test":
                way = self.ways[-1]
                way.tests.append({name: value for name, value in fact.items() if name != "fact"})
                return _test_line(way, fact)
            case "way-end":
                way = self.ways[-1]
                way.exit, way.left, way.seconds, way.ended = fact["exit"], fact["left"], fact["seconds"], True
                return "\n".join([f"{way.name}: {way.summary()}", *(f"  left behind: {what}" for what in way.left)])
        return ""

    def is_good(self, ways: Sequence[str]) -> bool:
        """Whether each of these ways came to its end well."""
        return not self.stuck and [way.name for way in self.ways] == list(ways) and all(w.is_good for w in self.ways)


def guest_line(guest: dict[str, Any]) -> str:
    """The guest's kernel in one line."""
    landlock = f"Landlock ABI {guest['landlock']}" if guest["landlock"] else "no Landlock"
    psi = "PSI" if guest["psi"] else "no PSI"
    quotas = "ext4 with project quotas" if guest["quotas"] else "no project quotas"
    controllers = " ".join(guest["controllers"])
    return f"Linux {guest['kernel']}, Python {guest['python']}, cgroup v2 ({controllers}), {landlock}, {psi}, {quotas}"


def _test_line(way: Way, test: dict[str, Any]) -> str:
    place = f"{len(way.tests)}/{way.collected}"
    if test["outcome"] == "passed":
        return f"  {place} passed {test['id']} ({test['seconds']} s)"
    why = test["why"] if test["outcome"] == "failed" else test["why"].splitlines()[-1] if test["why"] else ""
    indented = why.replace("\n", "\n      ")
    return f"  {place} {test['outcome'].upper()} {test['id']} ({test['seconds']} s)\n      {indented}"


# ---------------------------------------------------------------- the page


def page(report: Report, about: dict[str, str], today: str) -> str:
    """The measurement as Markdown."""
    lines = [
        f"# Tests on cgroup v2 in a virtual machine, {today}",
        "",
        "Written by `python -m tests.vm --record`: Debian's kernel under qemu, this checkout's tests inside.",
        "",
        *(f"* {name}: {value}" for name, value in about.items()),
        f"* guest: {guest_line(report.guest)}" if report.guest else "* guest: did not boot",
        "",
        "| way | passed | failed | skipped | not run | left behind | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_row(way) for way in report.ways),
    ]
    if report.stuck:
        lines += ["", f"**Not finished**: {report.stuck}."]
    for way in report.ways:
        lines += ["", f"## {way.name}", "", f"{WAYS.get(way.name, way.name)}: {way.summary()}.", "", *_by_file(way)]
        lines += _listed("Failed", way.failed())
        lines += _skipped(way)
        if way.left:
            lines += ["", "Left behind:", "", *(f"* `{what}`" for what in way.left)]
    return "\n".join(lines) + "\n"


def _row(way: Way) -> str:
    count = way.count()
    cells = [
        *(count[outcome] for outcome in OUTCOMES),
        way.collected - len(way.tests),
        len(way.left),
        f"{way.seconds:.0f}",
    ]
    return f"| {way.name} | " + " | ".join(map(str, cells)) + " |"


def _by_file(way: Way) -> list[str]:
    files: dict[str, Counter[str]] = {}
    for test in way.tests:
        files.setdefault(test["id"].partition("::")[0], Counter())[test["outcome"]] += 1
    head = ["| file | passed | failed | skipped |", "|---|---:|---:|---:|"]
    return head + [
        f"| {name} | " + " | ".join(str(count[outcome]) for outcome in OUTCOMES) + " |" for name, count in files.items()
    ]


def _listed(title: str, tests: Sequence[dict[str, Any]]) -> list[str]:
    if not tests:
        return []
    return ["", f"{title}:", "", *(f"* `{test['id']}`: {last_line(test['why'])}" for test in tests)]


def _skipped(way: Way) -> list[str]:
    reasons = Counter(last_line(test["why"]) for test in way.tests if test["outcome"] == "skipped")
    if not reasons:
        return []
    return ["", "Skipped:", "", *(f"* {count}: {why}" for why, count in reasons.most_common())]


def last_line(text: str) -> str:
    """The line that says most: the last error (`E …`) of a traceback, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E ")]
    said = errors[0].removeprefix("E").strip() if errors else lines[-1] if lines else "no reason given"
    return re.sub(r"\s+", " ", said)[:300]


def record(folder: Path, text: str, today: str) -> Path:
    """Writes the page of the day, in place of an earlier one."""
    target = folder / f"{today}-vm-cgroup-v2.md"
    target.write_text(text, encoding="utf-8")
    return target
