"""What the jail costs a session's creation: the same creates with isolation and without, by turns, in one run.

    python loadtest/jail_cost.py --creates 100

Covers: POST /api/sessions as a client sees it, on two `ashd up` of its own that differ in nothing but `isolation`;
cold (a sandbox is forked for it) and warm (one is there); the milliseconds of both and their ratio. Leaves out: what a
jailed session costs while it runs (exec_cost.py, roundtrip.py).
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from installation import Installation
from roundtrip import Connection, Progress, Summary, commit, count, machine, shown_command

AGENT = {"agent.yaml": "runtime: echo\n"}
LEVELS = ("none", "strict")
_WARM_ENOUGH_S = 0.15
_TIMEOUT_S = 60.0


class Side:
    """One `ashd up`, and how long creates took on it, in seconds."""

    def __init__(self, installation: Installation) -> None:
        self._connection = Connection(installation.url, installation.api_key, _TIMEOUT_S)
        self.took: list[float] = []
        files = [{"path": name, "content": base64.b64encode(text.encode()).decode()} for name, text in AGENT.items()]
        self._connection.json("POST", "/api/agents", {"name": "jail-cost", "files": files})
        self.create()  # fetches the bundle
        self.took.clear()

    def create(self) -> None:
        """One session, made and ended; only the making is measured."""
        self._connection.close()  # one that has waited for the other side may have been closed meanwhile
        self._connection.open()
        started = time.perf_counter()
        session = self._connection.json("POST", "/api/sessions", {"agent": "jail-cost"})["session"]
        self.took.append(time.perf_counter() - started)
        self._connection.json("DELETE", f"/api/sessions/{session['id']}")


def measure(creates: int, warm: int) -> dict[str, Summary]:
    """Creates by turns on both sides, with so many warm sandboxes kept."""
    progress = Progress(sys.stderr)
    with ExitStack() as stack:
        sides = {}
        for level in LEVELS:
            settings = {"runner": {"isolation": level, "warm_sandboxes": warm}, "coordinator": {"workers": 1}}
            sides[level] = Side(stack.enter_context(Installation(settings)))
        for number in range(creates):
            progress.show(f"{'warm' if warm else 'cold'} {number + 1} of {creates}")
            for side in sides.values():
                time.sleep(_WARM_ENOUGH_S)  # what the last one left to do is done, and the warm pool is full
                side.create()
        progress.clear()
        return {level: summary for level, side in sides.items() if (summary := Summary.of(side.took))}


def rows(kind: str, measured: dict[str, Summary]) -> list[str]:
    """As lines of a table, the last with the ratio."""
    none, strict = (measured[level] for level in LEVELS)
    lines = [
        f"| {kind} | `{level}` | {one.count} | {one.p50:.1f} | {one.p95:.1f} | {one.max:.1f} |"
        for level, one in measured.items()
    ]
    return [*lines, f"| {kind} | ratio | | **{strict.p50 / none.p50:.2f}** | {strict.p95 / none.p95:.2f} | |"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--creates", type=count(10_000), default=100, help="on each side, cold and warm")
    parser.add_argument("--write-measurement", type=Path, metavar="DIR", help="write the page of the day there")
    options = parser.parse_args(argv)
    table = ["| Create | `isolation` | n | p50, ms | p95, ms | max, ms |", "|---|---|---:|---:|---:|---:|"]
    for kind, warm in (("cold", 0), ("warm", 2)):
        table += rows(kind, measure(options.creates, warm))
    today = datetime.now(UTC).date().isoformat()
    page = [
        "# What the jail costs a session's creation",
        "",
        f"{machine()}, {today}, commit {commit()}: `{shown_command(argv, 'jail_cost.py')}`",
        "",
        *table,
        "",
        "By turns on two `ashd up` of one machine that differ in `isolation` only; one client, one worker. What is",
        "made with `none` has its cgroups and rlimits, but no user, namespaces, root, filter or Landlock of its own.",
    ]
    print("\n".join(table))
    if options.write_measurement is not None:
        (options.write_measurement / f"{today}-jail-cost.md").write_text("\n".join(page) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
