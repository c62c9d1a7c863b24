"""What it costs an agent to execute a program when its keeper hears of each, and moves it to the cgroup of tools.

    python loadtest/exec_cost.py --programs 200 --rounds 10

Covers: the time from asking for /bin/true to its end, without the filter, with it, and with the move; in one process
that stands for the agent and one that stands for its keeper, by the code the real ones use (sandbox/execs.py). Leaves
out: what the program itself does. Needs a memory cgroup to be made; says so where it can't be.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ashd.runner import cgroup
from sandbox import execs

MIB = 1024 * 1024
PROGRAM = "/bin/true"


def run_programs(number: int) -> list[float]:
    """The microseconds each took."""
    took = []
    for _ in range(number):
        begun = time.perf_counter()
        subprocess.run([PROGRAM], check=True)
        took.append((time.perf_counter() - begun) * 1e6)
    return took


def measure(number: int, tools: Path | None) -> list[float]:
    """The same in a child whose execs are answered for here; without `tools` nobody is asked."""
    ours, theirs = socket.socketpair()
    result_read, result_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        ours.close()
        if tools is not None:
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
            if theirs.fileno() != execs.CHANNEL:
                os.dup2(theirs.fileno(), execs.CHANNEL, inheritable=False)
            theirs.detach()
            execs.report_to_keeper()
        with os.fdopen(result_write, "w") as result:
            json.dump(run_programs(number), result)
        os._exit(0)
    theirs.close()
    os.close(result_write)
    if tools is not None:
        keep(pid, ours, tools)
    with os.fdopen(result_read) as result:
        took: list[float] = json.load(result)
    os.waitpid(pid, 0)
    ours.close()
    return took


def keep(pid: int, channel: socket.socket, tools: Path) -> None:
    """Answers for the child's programs until it is dead."""
    selector = selectors.DefaultSelector()
    watched = execs.Execs(selector, channel, pid, tools, float("inf"), lambda *_: None)
    ended = os.pidfd_open(pid)
    selector.register(ended, selectors.EVENT_READ)
    while True:
        timeout = None if watched.deadline == execs.FOREVER else max(0.0, watched.deadline - time.monotonic())
        for key, mask in selector.select(timeout):
            if key.fd == ended:
                return
            key.data(mask)
        if time.monotonic() >= watched.deadline:
            watched.catch_up()


def compare(number: int, rounds: int, tools: Path) -> None:
    """Takes turns, so that a busy machine is busy for both; the least of the rounds' medians is its quietest moment."""
    without, watched, keepers = [], [], []
    for _ in range(rounds):
        without.append(measure(number, None))
        before = time.process_time()
        watched.append(measure(number, tools))
        keepers.append((time.process_time() - before) / number * 1e6)
    for name, all_rounds in (("without", without), ("with", watched)):
        medians = [statistics.median(took) for took in all_rounds]
        first = statistics.median(took[0] for took in all_rounds)
        print(
            f"{name:8} median of all {statistics.median(medians):6.0f} us   "
            f"of the quietest round {min(medians):6.0f} us   the first of a round {first:6.0f} us"
        )
    print(f"the keeper's processor time for each: {statistics.median(keepers):.0f} us, least {min(keepers):.0f} us")


def main() -> int:
    """Prints one line for each way; 1 where there is no memory cgroup."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--programs", type=int, default=200, help="in each round")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    parent = f"ashd-test/{os.getpid()}"
    hierarchies = cgroup.find(parent)
    try:
        group = cgroup.memory_group(hierarchies, "cost")
        if group is None:
            print("no memory cgroup can be made here; run as root or in a delegated one", file=sys.stderr)
            return 1
        cgroup.create(hierarchies, "cost", 256 * MIB, 256, 400)
        compare(arguments.programs, arguments.rounds, Path(group["folder"], "tools"))
        return 0
    finally:
        asyncio.run(cgroup.remove(hierarchies, "cost"))
        cgroup.remove_parents(hierarchies)


if __name__ == "__main__":
    sys.exit(main())
