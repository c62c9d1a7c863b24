"""How many sandboxes a host holds, what each costs it, and what ends it.

    python loadtest/memory_ceiling.py --agent heap64 --memory-limit 256 --stop-at-available 4GiB
    python loadtest/memory_ceiling.py --url http://127.0.0.1:4100 --api-key ash_... --agent idle
    python loadtest/memory_ceiling.py --suite --capacity-page docs/capacity.md

Covers: the command: its options, one ramp or the suite of all limits and agents, the files it writes.
Leaves out: the ramp (ramp.py), the server it starts (installation.py), tables and picture (ceiling_report.py).
README.md says what each number means.

With --url it needs nothing but Python; the server it starts otherwise is this checkout's, and the picture is
matplotlib's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ceiling_report
import ramp
import roundtrip
from host_memory import Host, Watch
from installation import Installation, NotStarted
from interrupts import as_interrupts
from ramp import MIB, Bounds, Ramp, Server, named
from roundtrip import Failure, count

GIB = 1024 * MIB
OK, NOT_CLEAN, UNUSABLE, INTERRUPTED = 0, 1, 3, 130
LIMITS: tuple[int | None, ...] = (512, 256, 128, None)
NO_LIMIT = "1024GiB"
"""The runner's own limit where sandboxes shall have none: more than any host has."""
STEPS = {"idle": 40, "heap64": 8, "heap256": 4, "subprocess": 8}
"""Sessions between two looks at the host, unless --step says."""

SUITE_MEMORY = 10 * GIB
SUITE_SESSIONS = 1000
SUITE_MINUTES = 15.0
SUITE_RUN_MINUTES = 2.0

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(MiB|GiB)?")


@dataclass(frozen=True)
class Plan:
    """One ramp."""

    agent: str
    memory_limit_mb: int | None
    sessions: int
    minutes: float
    step: int
    headroom: int
    """Bytes of this host that are to stay free."""

    @property
    def least_available(self) -> int:
        """Where we stop by ourselves: below the head-room, so that the runner's own refusal comes first."""
        return max(self.headroom - GIB, self.headroom // 2)


def settings(plan: Plan) -> dict[str, Any]:
    """What the runner of a plan is told."""
    runner: dict[str, Any] = {"memory_headroom": f"{plan.headroom // MIB}MiB"}
    if plan.memory_limit_mb is None:
        runner["limits"] = {"memory": NO_LIMIT}
    return {"runner": runner}


# ---------------------------------------------------------------- measuring


def measure(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """One ramp, on the server named or on one of its own. Raises NotStarted, Failure."""
    if options.url:
        return _ramped(options, plan, Server(options.url, options.api_key, options.timeout), Watch(None))
    base = _base(options.config)
    # Memory is to end it, not a number; where the file or ASH_MAX_SANDBOXES says another, that is what is wanted.
    base = {**base, "runner": {"max_sandboxes": max(plan.sessions, 1000), **base.get("runner", {})}}
    os.environ.pop("ASH_MEMORY_HEADROOM", None)  # ours, which is checked, is in the file
    with Installation(settings(plan), base) as own:
        run = _ramped(options, plan, Server(own.url, own.api_key, options.timeout), Watch(own.pid))
    run["left"] += own.left
    return run


def _base(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    import yaml  # ashd's own dependency: only a server of our own needs it

    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _ramped(options: argparse.Namespace, plan: Plan, server: Server, watch: Watch) -> dict[str, Any]:
    version = server.connection().json("GET", "/health")["version"]
    deadline = time.monotonic() + plan.minutes * 60
    bounds = Bounds(plan.sessions, deadline, plan.step, options.concurrency, plan.least_available)
    reporter = ramp.Reporter()
    found = Ramp(server, plan.agent, plan.memory_limit_mb, bounds, watch, reporter=reporter).run()
    run = {"agent": plan.agent, "memory_limit_mb": plan.memory_limit_mb, "version": version, **found.report()}
    reporter.done(
        f"{plan.agent}, limit {named(plan.memory_limit_mb)}: {found.sessions} sandboxes, {ceiling_report.reason(run)}"
    )
    return run


def suite(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every limit with every agent, as far as the time goes."""
    over = time.monotonic() + options.max_minutes * 60
    plans = [(agent, limit) for agent in ramp.AGENTS for limit in LIMITS]
    for number, (agent, limit) in enumerate(plans):
        minutes = fair_share((over - time.monotonic()) / 60, len(plans) - number)
        if minutes <= 0:
            print(f"{agent}, limit {named(limit)}: left out, the suite's time is over", file=sys.stderr)
            continue
        headroom = max(options.stop_at_available, Host.now().available - options.use_at_most)
        step = options.step or STEPS[agent]
        yield measure(options, Plan(agent, limit, options.max_sessions, minutes, step, headroom))


def single(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The one ramp asked for."""
    step, headroom = options.step or STEPS[options.agent], options.stop_at_available
    plan = Plan(options.agent, options.memory_limit, options.max_sessions, options.max_minutes, step, headroom)
    yield measure(options, plan)


def fair_share(left: float, runs: int) -> float:
    """Minutes one run may ramp: twice its share of what is left, for not every run needs its own."""
    return min(SUITE_RUN_MINUTES, 2 * left / runs)


# ---------------------------------------------------------------- writing


def report_of(options: argparse.Namespace, argv: Sequence[str], runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": options.machine or roundtrip.machine(),
        "commit": options.commit or roundtrip.commit(),
        "version": runs[0]["version"] if runs else "unknown",
        "command": roundtrip.shown_command(argv, "memory_ceiling.py"),
        "notes": [options.note] if options.note else [],
        "runs": runs,
    }


def write(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Table, numbers and picture, side by side; without the picture where its library is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    files[0].write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        ceiling_report.draw(report, files[2])
    except ceiling_report.NoLibrary as missing:
        print(f"no picture: {missing} {files[0]}", file=sys.stderr)
        files.pop()
    picture = (folder / f"{stem}.png") in files
    files[1].write_text(ceiling_report.page(report, stem, picture=picture), encoding="utf-8")
    return files


def update_capacity_page(page: Path, report: dict[str, Any], source: Path) -> None:
    """Puts the numbers of a report into the page. `source` is named there relative to it. Raises ValueError."""
    name = os.path.relpath(source, page.parent)
    block = ceiling_report.capacity_block(report, name)
    page.write_text(ceiling_report.with_block(page.read_text(encoding="utf-8"), block), encoding="utf-8")


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="memory_ceiling.py",
        description="Creates sessions until the server takes no more; what each costs its host.",
        epilog="exit status: 0 measured, 1 measured, but something was left out, left behind or lost, 2 wrong usage, "
        "3 no usable server, 130 interrupted (what was measured is written)",
    )
    where = top.add_argument_group("where (default: an `ashd up` of its own, on a temporary folder)")
    where.add_argument("--url", help="a server that is there; its runner's memory shows if it is on this host")
    where.add_argument("--api-key", default=os.environ.get("ASH_API_KEY"), metavar="KEY", help="default: ASH_API_KEY")
    where.add_argument("--config", type=Path, metavar="FILE", help="as for `ashd up -c`; ASH_* variables hold too")
    what = top.add_argument_group("what")
    what.add_argument("--agent", choices=tuple(ramp.AGENTS), default="idle", help="default: %(default)s")
    what.add_argument(
        "--memory-limit", type=_limit, default=512, metavar="MIB|none", help="of each sandbox; default: %(default)s"
    )
    what.add_argument("--suite", action="store_true", help="every limit (512, 256, 128, none) with every agent")
    what.add_argument("--from", dest="source", type=Path, metavar="JSON", help="measure nothing: write this one again")
    bounds = top.add_argument_group("bounds")
    bounds.add_argument("--max-sessions", type=count(10_000), metavar="N", help=f"default: {SUITE_SESSIONS}")
    bounds.add_argument(
        "--max-minutes", type=_minutes, metavar="M", help=f"default: 10; of a suite {SUITE_MINUTES:.0f}"
    )
    bounds.add_argument(
        "--stop-at-available", type=_size, default=2 * GIB, metavar="SIZE",
        help="memory of this host that stays free, the own runner's memory_headroom; default: 2GiB",
    )  # fmt: skip
    bounds.add_argument(
        "--use-at-most", type=_size, default=SUITE_MEMORY, metavar="SIZE", help="in a suite; default: 10GiB"
    )
    bounds.add_argument("--step", type=count(1000), metavar="N", help="sessions between two looks at the host")
    bounds.add_argument("--concurrency", type=count(64), default=4, metavar="N", help="default: %(default)s")
    bounds.add_argument(
        "--timeout", type=count(600), default=30, metavar="S", help="of a request; default: %(default)s"
    )
    out = top.add_argument_group("what is written")
    out.add_argument(
        "--write", type=Path, metavar="DIR", help="default: docs/measurements for a suite, else this folder"
    )
    out.add_argument("--capacity-page", type=Path, metavar="FILE", help="put a suite's numbers into this page")
    out.add_argument("--note", default="", help="a line about the circumstances")
    out.add_argument("--machine", metavar="TEXT", help="description of the machine; default: found out")
    out.add_argument("--commit", metavar="NAME", help="what the server runs; default: this checkout's")
    return top


def _limit(text: str) -> int | None:
    if text == "none":
        return None
    return int(count(1024 * 1024)(text))


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= 240:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 240")
    return value


def _size(text: str) -> int:
    """Bytes of "2GiB", "512 MiB" or "512" (MiB)."""
    if (found := _SIZE.fullmatch(text.strip())) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2GiB or 512MiB")
    return int(float(found[1]) * (GIB if found[2] == "GiB" else MIB))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked. Exits with 2 where they can't be used."""
    top = parser()
    options = top.parse_args(argv)
    if options.url is not None:
        url = urllib.parse.urlsplit(options.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            top.error(f"--url {options.url!r} is not like http://127.0.0.1:4100")
        if options.suite:
            top.error("--suite starts its own servers: the limit `none` is a setting of the runner")
        if options.config:
            top.error("--config is for a server of its own, not for one that is there (--url)")
    if options.api_key and not (options.api_key.isascii() and options.api_key.isprintable()):
        top.error("--api-key has characters that no key has")
    if options.capacity_page and not (options.suite or options.source):
        top.error("--capacity-page takes the numbers of a whole --suite, or of one measured before (--from)")
    for file in (options.capacity_page, options.source, options.config):
        if file is not None and not file.is_file():
            top.error(f"{file} is not a file")
    options.max_sessions = options.max_sessions or SUITE_SESSIONS
    options.max_minutes = options.max_minutes or (SUITE_MINUTES if options.suite else 10.0)
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.source:
        return _written_again(options)
    as_interrupts()
    runs: list[dict[str, Any]] = []
    interrupted, expected = False, len(ramp.AGENTS) * len(LIMITS) if options.suite else 1
    try:
        for run in suite(options) if options.suite else single(options):
            runs.append(run)
            if interrupted := run["stop"]["reason"] == "interrupted":
                break
    except (NotStarted, Failure, KeyError, TypeError, ValueError) as error:
        print(f"{options.url or 'a server of its own'} can't be measured: {error}", file=sys.stderr)
        if not runs:
            return UNUSABLE
    except KeyboardInterrupt:
        interrupted = True
    if not runs:
        return INTERRUPTED
    report = report_of(options, argv, runs)
    folder, stem = _target(options, report)
    files = write(report, folder, stem)
    print("\n".join(ceiling_report.summary(runs)))
    if options.capacity_page and len(runs) == expected:
        update_capacity_page(options.capacity_page, report, files[0])
        files.append(options.capacity_page)
    print("written: " + ", ".join(str(file) for file in files))
    return INTERRUPTED if interrupted else _status(runs, expected)


def _target(options: argparse.Namespace, report: dict[str, Any]) -> tuple[Path, str]:
    stem = f"{report['at'][:10]}-memory-ceiling"
    if options.suite:
        return options.write or roundtrip.ROOT / "docs" / "measurements", stem
    limit = "none" if options.memory_limit is None else str(options.memory_limit)
    return options.write or Path(), f"{stem}-{options.agent}-{limit}"


def _status(runs: Sequence[Mapping[str, Any]], expected: int) -> int:
    if len(runs) < expected:
        return NOT_CLEAN
    return NOT_CLEAN if any(run["left"] or run["active_at_end"] != run["sessions"] for run in runs) else OK


def _written_again(options: argparse.Namespace) -> int:
    """Table, picture and page from numbers measured before."""
    source: Path = options.source
    report = json.loads(source.read_text(encoding="utf-8"))
    files = write(report, options.write or source.parent, source.stem)
    if options.capacity_page:
        update_capacity_page(options.capacity_page, report, source)
    print("written: " + ", ".join(str(file) for file in files))
    return OK


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(INTERRUPTED)
