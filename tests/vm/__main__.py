"""`python -m tests.vm`: boots the machine, runs tests in it, says what came out."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.vm import initramfs, machine, packages, report

ROOT = Path(__file__).parents[2]
OK, FAILED, UNUSABLE, STUCK = 0, 1, 3, 4
CONSOLE = "console.log"
EMULATED_PATIENCE = 4  # tests' deadlines are for processors that aren't emulated
DEFAULT_TESTS = (
    "tests/unit/test_cgroup.py",
    "tests/unit/test_memory.py",
    "tests/unit/test_seccomp.py",
    "tests/integration/test_memory_limits.py",
    "tests/integration/test_jail.py",
    "tests/integration/test_quota.py",
    "tests/integration/test_disk.py",
    "tests/integration/test_sandbox.py",
    "tests/integration/test_keeper_hostile.py",
    "tests/integration/test_runtimes.py",
)
DESCRIPTION = """\
Runs tests of this repository in a virtual machine with cgroup v2: Debian's kernel under qemu, which needs no
rights on the host beyond reading /usr (emulated, hence slow: about ten times). The guest has no network; it sees /usr,
a copy of this checkout and the running Python read-only, and writes to a throw-away disk.

Each way runs the same tests, with a machine cleaned in between:
"""
EPILOG = """\
examples:
  python -m tests.vm                                     the default tests, as root and as an ordinary user
  python -m tests.vm --ways user tests/hostile -k files  one family of attacks, as the user
  python -m tests.vm --verbose --ways service            a line for each test; root below Delegate=yes
  python -m tests.vm --record                            write docs/measurements/<date>-vm-cgroup-v2.md
  make vm ARGS="--record"                                the same by make

needed: qemu-system-x86 (installed by you, or by --install); the kernel and busybox are fetched by `apt-get download`,
unpacked below ~/.cache/ashd-vm (XDG_CACHE_HOME) and not installed. What the guest's console said lies there too.
exit status: 0 all passed and nothing was left behind, 1 not so, 2 wrong usage, 3 no machine to be had, 4 it got stuck
"""


def parser() -> argparse.ArgumentParser:
    ways = "".join(f"  {name:8} {text}\n" for name, text in report.WAYS.items())
    top = argparse.ArgumentParser(
        prog="python -m tests.vm",
        description=DESCRIPTION + ways,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("tests", nargs="*", default=list(DEFAULT_TESTS), metavar="TEST", help="what pytest is given")
    top.add_argument("-k", dest="only", metavar="EXPRESSION", help="only tests of these names, as for pytest")
    top.add_argument(
        "--ways",
        type=_ways,
        default=["root", "user"],
        metavar="WAY,…",
        help="which, in this order (default: root,user)",
    )
    top.add_argument("--minutes", type=_number, default=25, help="for all tests together (default: %(default)g)")
    top.add_argument("--boot-seconds", type=_number, default=120, help="default: %(default)g")
    top.add_argument("--memory", type=int, default=2048, metavar="MIB", help="of the machine (default: %(default)s)")
    top.add_argument("--cpus", type=int, default=2, help="default: %(default)s")
    top.add_argument("--kvm", action="store_true", help="use /dev/kvm instead of emulating")
    top.add_argument("--share", type=Path, action="append", default=[], metavar="DIR", help="a further folder to see")
    top.add_argument(
        "--install", action="store_true", help=f"run `{shlex.join(packages.qemu_install_command())}` first"
    )
    top.add_argument("--verbose", action="store_true", help="a line for each test that passed or was skipped too")
    top.add_argument("--record", action="store_true", help=f"write the day's page into {report.MEASUREMENTS}")
    return top


def _ways(text: str) -> list[str]:
    named = text.split(",")
    if unknown := [name for name in named if name not in report.WAYS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(report.WAYS)}")
    return named


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1440")
    return value


def shares(root: Path, python: Path, prefixes: Sequence[str], further: Sequence[Path]) -> list[initramfs.Share]:
    """What the guest sees of the host: /usr, the checkout, and where the running Python and its packages lie."""
    seen = [initramfs.Share("usr", Path("/usr"), "/usr"), initramfs.Share("checkout", root, "/mnt/checkout")]
    # A link of a virtual environment names its interpreter by a path that may be a link again.
    homes = [Path(prefix) for prefix in prefixes] + [python.resolve().parent.parent, *further]
    for number, folder in enumerate(sorted({home.resolve() for home in homes} | set(homes))):
        if any(folder.is_relative_to(share.path) for share in seen):
            continue
        seen.append(initramfs.Share(f"share{number}", folder, str(folder)))
    return seen


def plan(options: argparse.Namespace, python: str) -> dict[str, Any]:
    """What guest.py is to do."""
    tests = [*options.tests, *(("-k", options.only) if options.only else ())]
    own = [str(Path(python).parent), f"{sys.base_prefix}/bin"]
    return {
        "python": python,
        "path": ":".join([*own, "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]),
        "checkout": initramfs.CHECKOUT,
        "user": initramfs.USER,
        "env": {} if options.kvm else {"ASHD_TEST_PATIENCE": str(EMULATED_PATIENCE)},
        "ways": options.ways,
        "tests": tests,
        "seconds": options.minutes * 60,
    }


def about(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, str]:
    """What a reader of the measurement wants to know of the host."""
    accelerator = "KVM" if options.kvm else "TCG: emulated"
    qemu = subprocess.run([packages.QEMU, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[
        0
    ]
    size = f"{options.cpus} CPUs, {options.memory} MiB"
    return {
        "machine": f"{qemu} ({accelerator}), {size}, on {os.cpu_count()} shared CPUs",
        "commit": _commit(),
        "command": f"`{shlex.join(['python', '-m', 'tests.vm', *argv])}`",
        "host": f"Linux {'.'.join(platform.release().split('.')[:2])}, Python {platform.python_version()}",
    }


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "ashd", "sandbox", "tests"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + (" with uncommitted changes" if changed.strip() else "")


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every `finally`: nothing may be left running
    started = time.monotonic()
    cache = packages.cache_folder()
    try:
        packages.demand_qemu(install=options.install)
        parts = packages.parts(cache)
    except packages.Lacking as lacking:
        print(lacking, file=sys.stderr)
        return UNUSABLE
    settings = machine.Settings(options.memory, options.cpus, options.kvm, options.boot_seconds, options.minutes * 60)
    described = about(options, argv) if options.record else {}
    result = report.Report()
    console = cache / CONSOLE
    print(f"booting Linux {parts.release}; console: {console}", flush=True)

    def hear(fact: machine.Fact) -> None:
        shown = result.hear(fact)
        quiet = fact["fact"] == "test" and fact["outcome"] != "failed" and not options.verbose
        if shown and (not quiet or len(result.ways[-1].tests) % 25 == 0):
            print(f"{time.monotonic() - started:6.1f} s  {shown}", flush=True)

    try:
        with tempfile.TemporaryDirectory(prefix="ashd-vm-") as folder:
            checkout = machine.copied(ROOT, Path(folder, "checkout"))
            seen = shares(checkout, Path(sys.executable), [sys.prefix, sys.base_prefix], options.share)
            machine.run(settings, parts, seen, plan(options, sys.executable), console, hear)
    except machine.Stuck as stuck:
        result.stuck = str(stuck)
        print(f"{stuck}; the console's end:\n{_end_of(console)}", file=sys.stderr)
    for way in result.ways:
        print(f"{way.name}: {way.summary()}")
    if options.record:
        now = datetime.now(UTC).date().isoformat()
        described["duration"] = f"{time.monotonic() - started:.0f} s, boot included"
        text = report.page(result, described, now)
        print(f"written: {report.record(ROOT / report.MEASUREMENTS, text, now)}")
    if result.stuck:
        return STUCK
    return OK if result.is_good(options.ways) else FAILED


def _end_of(console: Path, lines: int = 30) -> str:
    return "\n".join(console.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
