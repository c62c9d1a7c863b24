"""What it costs a runner to know what its sandboxes use, and to look for orphans among them.

    python loadtest/sampling.py --sandboxes 1000 --seconds 60 --write-measurement docs/measurements

Covers: processor time of one look and of the sampler's thread as a share of one core, how old what it knows becomes,
what else the process pays (with the interpreter's lock between it and an event loop), the reconciler's search.
Leaves out: real jails; a look reads the same files whatever is in them. README.md says what each number means.

Makes N sandboxes of two processes each, as keeper and bridge are: forked from one preloaded parent, idle.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ashd.domain.sandbox import Fact
from ashd.runner import cgroup, processes
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.usage import SHARE, Pace, Sampler
from ashd.runner.zygote_process import PRELOADED

MOST_SANDBOXES = 10_000
LIMIT_BYTES = 512 * 1024 * 1024
_READY = b"."


@dataclass(frozen=True)
class Numbers:
    """What was measured; times in the unit of the name."""

    sandboxes: int
    with_groups: bool
    counters_us: float
    processes_us: float
    seconds: float
    looks: int
    thread_percent: float
    process_percent: float
    oldest_s: float
    late_without_ms: float
    late_with_ms: float
    scan_ms: float


def main(arguments: list[str]) -> int:
    """Measures, prints, and writes a page where asked to."""
    options = _parser().parse_args(arguments)
    with _sandboxes(options.sandboxes, options.busy) as (sandboxes, groups_of):
        numbers = _measure(sandboxes, groups_of, options.seconds)
    page = _page(numbers, options)
    print(page)
    if options.write_measurement:
        target = Path(options.write_measurement) / f"{datetime.now(UTC):%Y-%m-%d}-sampling.md"
        target.write_text(page, encoding="utf-8")
    return 0 if numbers.process_percent < 2.0 else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sandboxes", type=int, default=1000, choices=range(1, MOST_SANDBOXES + 1), metavar="N")
    parser.add_argument("--busy", type=int, default=100, metavar="N", help="of them in a turn (default 100)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to watch (default 60)")
    parser.add_argument("--write-measurement", metavar="FOLDER", help="also write a page there")
    return parser


# ---------------------------------------------------------------- sandboxes to look at


@contextlib.contextmanager
def _sandboxes(count: int, busy: int) -> Iterator[tuple[list[SandboxTask], Callable[[str], list[Path]]]]:
    """As many pairs of processes, each pair in cgroups of its own where this host lets us; gone afterwards."""
    hierarchies = cgroup.find(f"ashd-test/{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="ashd-sampling-") as folder:
        made: list[SandboxTask] = []
        zygote = _Zygote()
        try:
            for number in range(count):
                sandbox = SandboxTask(f"s{number}", Path(folder) / f"s{number}", None, lambda _: None)
                groups = cgroup.create(hierarchies, sandbox.id, LIMIT_BYTES, 64) if hierarchies else []
                sandbox.keeper_pid = zygote.fork(groups)
                facts = (Fact.FORKED, Fact.CLAIMED, Fact.LOADED, *((Fact.TURN_LAUNCHED,) if number < busy else ()))
                for fact in facts:
                    sandbox.learn(fact)
                made.append(sandbox)
            yield made, lambda name: [hierarchy.parent / name for hierarchy in hierarchies]
        finally:
            zygote.end()
            for sandbox in made:
                asyncio.run(cgroup.remove(hierarchies, sandbox.id))
            cgroup.remove_parents(hierarchies)


class _Zygote:
    """A preloaded process that forks pairs: one outside the groups, its child inside. FORK: before any thread."""

    def __init__(self) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.setsid()
            for module in PRELOADED:
                importlib.import_module(module)
            self._serve(ours[0], theirs[1])
        self._ask, self._answer = os.fdopen(ours[1], "w"), os.fdopen(theirs[0])

    def _serve(self, ask: int, answer: int) -> None:
        for line in os.fdopen(ask):
            pid = os.fork()
            if pid == 0:
                inner = os.fork()
                if inner == 0:
                    for group in line.split():
                        Path(group, "cgroup.procs").write_text("0")
                    os.write(answer, f"{os.getppid()}\n".encode())
                while True:
                    signal.pause()
        os.killpg(0, signal.SIGKILL)

    def fork(self, groups: list[Path]) -> int:
        """The pid of the outer process of a new pair."""
        self._ask.write(" ".join(map(str, groups)) + "\n")
        self._ask.flush()
        return int(self._answer.readline())

    def end(self) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


# ---------------------------------------------------------------- measuring


def _measure(sandboxes: list[SandboxTask], groups_of: Callable[[str], list[Path]], seconds: float) -> Numbers:
    counters_us, processes_us = (_cost_us(sandboxes, groups_of, processes_too=deep) for deep in (False, True))
    before = asyncio.run(_watch_a_loop(seconds / 3))
    sampler = Sampler(lambda: sandboxes, groups_of, lambda: Pace(SHARE))
    thread_s: list[float] = []

    def work() -> None:
        sampler.run_in_thread()
        thread_s.append(time.thread_time())

    thread = threading.Thread(target=work)
    began_s = time.monotonic()
    thread.start()
    during = asyncio.run(_watch_a_loop(seconds))
    took_s = time.monotonic() - began_s
    records = sampler._records.values()
    oldest_s = time.monotonic() - min(record.processes_at for record in records)
    known = sum(1 for record in records if record.usage.pss_bytes)
    sampler.stop()
    thread.join()
    return Numbers(
        len(sandboxes),
        bool(groups_of("x")),
        counters_us,
        processes_us,
        took_s,
        sampler.looks,
        100 * thread_s[0] / took_s,
        100 * (during.process_s - before.process_s / before.wakes * during.wakes) / took_s,
        oldest_s if known == len(sandboxes) else float("inf"),
        before.late_ms,
        during.late_ms,
        _scan_ms(),
    )


def _cost_us(sandboxes: list[SandboxTask], groups_of: Callable[[str], list[Path]], *, processes_too: bool) -> float:
    """Processor time of one look, the mean over all sandboxes; one before it opens their records."""
    sampler = Sampler(lambda: sandboxes, groups_of)
    for sandbox in sandboxes:
        sampler._look(sandbox, processes_too=False)
    began_s = time.thread_time()
    for sandbox in sandboxes:
        sampler._look(sandbox, processes_too=processes_too)
    return 1e6 * (time.thread_time() - began_s) / len(sandboxes)


@dataclass(frozen=True)
class Loop:
    """An event loop that only wants to wake every 5 ms: how often it did, how late it was at the 99th percentile, and
    what the whole process used meanwhile.
    """

    wakes: int
    late_ms: float
    process_s: float


async def _watch_a_loop(seconds: float) -> Loop:
    late_ms: list[float] = []
    began_s, ends_s = time.process_time(), time.monotonic() + seconds
    while (now := time.monotonic()) < ends_s:
        await asyncio.sleep(0.005)
        late_ms.append(1000 * (time.monotonic() - now - 0.005))
    return Loop(len(late_ms), statistics.quantiles(late_ms, n=100)[98], time.process_time() - began_s)


def _scan_ms() -> float:
    """The reconciler's search for processes: every one of this host, once."""
    began_s = time.thread_time()
    for _ in range(5):
        processes.by_sandbox(Path("/nowhere"))
    return 1000 * (time.thread_time() - began_s) / 5


# ---------------------------------------------------------------- the page


def _page(numbers: Numbers, options: argparse.Namespace) -> str:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    release, python = ".".join(platform.release().split(".")[:2]), platform.python_version()
    machine = (
        f"{os.cpu_count()} CPUs, {memory_gib:.0f} GiB, Linux {release}, Python {python}; load {os.getloadavg()[0]:.0f}"
    )
    chosen = f"--sandboxes {options.sandboxes} --busy {options.busy} --seconds {options.seconds:g}"
    groups = "each in cgroups of its own" if numbers.with_groups else "without cgroups"
    return f"""# Cost of knowing what sandboxes use, {datetime.now(UTC):%Y-%m-%d}

Written by `loadtest/sampling.py --write-measurement`; what each row means is said in
[loadtest/README.md](../../loadtest/README.md).

* machine: {machine}
* command: `python loadtest/sampling.py {chosen}`
* {numbers.sandboxes} sandboxes of two idle processes, {groups}, {options.busy} of them taken for running

| | |
|---|---:|
| one look at a sandbox's counters, µs of CPU | {numbers.counters_us:.0f} |
| one look at its processes too, µs of CPU | {numbers.processes_us:.0f} |
| sampler's thread, % of one core | {numbers.thread_percent:.2f} |
| whole process, beyond as many turns of its loop without sampler, % of one core | {numbers.process_percent:.2f} |
| looks in {numbers.seconds:.0f} s | {numbers.looks} |
| oldest PSS of all sandboxes at the end, s | {numbers.oldest_s:.0f} |
| event loop late without sampler, p99, ms | {numbers.late_without_ms:.2f} |
| event loop late with it, p99, ms | {numbers.late_with_ms:.2f} |
| one search of the reconciler for processes (every 3 s), ms of CPU | {numbers.scan_ms:.1f} |
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
