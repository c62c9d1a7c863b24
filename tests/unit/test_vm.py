"""tests/vm without qemu: its options, what the guest is told and boots with, what becomes of its answers."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.vm import __main__ as command
from tests.vm import guest, initramfs, machine, outcomes, packages
from tests.vm.report import Report, last_line, page, record

BOOTED = {
    "fact": "booted",
    "kernel": "6.1.0-1-amd64",
    "python": "3.11.2",
    "controllers": ["cpu", "memory", "pids"],
    "landlock": 2,
    "psi": True,
    "quotas": True,
    "uptime": 7.5,
}
FAILURE = "self = <x>\n    assert 1 == 2\nE   assert 1 == 2\ntests/a.py:3: AssertionError"


def _test(name: str, outcome: str, why: str = "") -> dict[str, Any]:
    return {"fact": "test", "id": f"tests/a.py::{name}", "outcome": outcome, "seconds": 0.5, "why": why}


def _heard(*facts: dict[str, Any]) -> Report:
    report = Report()
    for fact in facts:
        report.hear(fact)
    return report


def _ended(way: str, *tests: dict[str, Any], left: tuple[str, ...] = (), code: int | None = 0) -> Report:
    collected = {"fact": "collected", "tests": len(tests)}
    end = {"fact": "way-end", "way": way, "exit": code, "left": list(left), "seconds": 12.3}
    return _heard(BOOTED, {"fact": "way", "way": way}, collected, *tests, end)


# ---------------------------------------------------------------- the command


def test_without_options_the_default_tests_run_as_root_and_as_a_user() -> None:
    options = command.parser().parse_args([])
    plan = command.plan(options, "/usr/bin/python3")
    assert plan["ways"] == ["root", "user"] and plan["tests"] == list(command.DEFAULT_TESTS)
    assert plan["seconds"] == 25 * 60


def test_a_selection_is_handed_to_pytest() -> None:
    options = command.parser().parse_args(["--ways", "user", "tests/hostile", "-k", "files or limits"])
    assert command.plan(options, "/usr/bin/python3")["tests"] == ["tests/hostile", "-k", "files or limits"]


def test_the_default_tests_are_there() -> None:
    assert [name for name in command.DEFAULT_TESTS if not (command.ROOT / name).exists()] == []


@pytest.mark.parametrize("wrong", [["--ways", "king"], ["--minutes", "0"], ["--minutes", "soon"], ["--memory", "lots"]])
def test_options_that_mean_nothing_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parser().parse_args(wrong)
    assert ended.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_the_help_says_what_is_needed_and_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert packages.QEMU_PACKAGE in text and "--install" in text and "examples:" in text
    assert all(way in text for way in guest.PLACES)


def test_the_guest_sees_usr_the_checkout_and_a_python_from_elsewhere_but_no_home(tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    seen = command.shares(command.ROOT, python, [str(tmp_path / "venv"), "/usr"], [])
    assert [share.path for share in seen] == ["/usr", "/mnt/checkout", str(tmp_path / "venv")]
    assert len({share.tag for share in seen}) == len(seen)


def test_the_guest_gets_a_copy_of_the_checkout_without_what_tools_left(tmp_path: Path) -> None:
    for name in ("ashd/cli.py", ".git/HEAD", ".venv/bin/python", ".ruff_cache/x", "ashd/__pycache__/cli.pyc"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    copy = machine.copied(tmp_path / "tree", tmp_path / "copy")
    files = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    assert files == ["ashd/__pycache__/cli.pyc", "ashd/cli.py"]


def test_without_qemu_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(packages.Lacking, match="apt-get install -y --no-install-recommends qemu-system-x86"):
        packages.demand_qemu(install=False)


def test_the_kernel_is_the_one_that_the_metapackage_stands_for() -> None:
    said = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n  Suggests: firmware\n"
    assert packages.newest_kernel(said) == "linux-image-6.1.0-56-amd64"
    with pytest.raises(packages.Lacking, match="apt-get update"):
        packages.newest_kernel("N: Unable to locate package")


# ---------------------------------------------------------------- what boots


def test_init_is_a_script_that_a_shell_can_read_and_ends_in_the_command() -> None:
    shares = [initramfs.Share("usr", Path("/usr"), "/usr"), initramfs.Share("checkout", Path("/x"), "/mnt/checkout")]
    text = initramfs.init_text(["9p", "ext4"], shares, ["/usr/bin/python3", "guest.py"])
    subprocess.run(["sh", "-n"], input=text.encode(), check=True, timeout=10)
    assert text.startswith("#!/bin/busybox sh\n")
    assert text.rstrip().endswith("exec switch_root /new /usr/bin/python3 guest.py")
    assert text.index("share usr /usr") < text.index("mke2fs") < text.index("share checkout /mnt/checkout")
    assert text.index("insmod /modules/9p.ko") < text.index("insmod /modules/ext4.ko")


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    folder = tmp_path / "kernel/fs"
    folder.mkdir(parents=True)
    for name, needs in {
        "ext4": "jbd2,crc-16",
        "jbd2": "",
        "crc-16": "",
        "9p": "9pnet",
        "9pnet": "",
        "btrfs": "",
    }.items():
        (folder / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + needs.encode() + b"\0name=x\0")
    found = [name for name, _ in initramfs.needed_modules(tmp_path, ["9p", "ext4", "built_in"])]
    assert found == ["9pnet", "9p", "jbd2", "crc_16", "ext4"]


def test_the_archive_holds_each_entry_and_the_folders_on_the_way(tmp_path: Path) -> None:
    entries = {
        "init": initramfs.file("#!", executable=True),
        "etc/a/b": initramfs.file("four"),
        "x": initramfs.link("y"),
    }
    packed = initramfs.cpio(entries)
    assert _members(packed) == {
        "init": (0o100755, b"#!"),
        "etc": (0o040755, b""),
        "etc/a": (0o040755, b""),
        "etc/a/b": (0o100644, b"four"),
        "x": (0o120777, b"y"),
    }


def _members(packed: bytes) -> dict[str, tuple[int, bytes]]:
    """Reads the archive as the kernel does."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert packed[at : at + 6] == b"070701"
        fields = [int(packed[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = packed[at + 110 : at + 110 + fields[11] - 1].decode()
        content = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], packed[content : content + fields[6]])
        at = (content + fields[6] + 3) // 4 * 4


def test_qemu_gets_its_limits_reads_only_and_dies_with_its_starter(tmp_path: Path) -> None:
    shares = [initramfs.Share("usr", Path("/usr"), "/usr")]
    settings = machine.Settings(memory_mib=512, cpus=1)
    line = machine.command(settings, Path("/k"), Path("/i"), tmp_path / "disk", tmp_path / "facts", shares)
    text = shlex.join(line)
    assert line[:3] == ["setpriv", "--pdeathsig", "KILL"]
    assert "-m 512" in text and "-smp 1" in text and "-no-reboot" in line and "-accel tcg" in text
    assert "cgroup_no_v1=all psi=1" in text
    assert "path=/usr,mount_tag=usr,security_model=none,readonly=on" in text
    assert "-net" not in text


# ---------------------------------------------------------------- what the guest says


def test_half_a_line_waits_for_its_end_and_noise_is_no_fact(tmp_path: Path) -> None:
    lines = tmp_path / "facts"
    facts = machine.Facts(lines)
    assert list(facts.new()) == []
    lines.write_bytes(b'noise\n{"fact": "a"}\r\n[1]\n{"fact"')
    assert list(facts.new()) == [{"fact": "a"}]
    with lines.open("ab") as more:
        more.write(b': "b"}\n')
    assert list(facts.new()) == [{"fact": "b"}]
    assert list(facts.new()) == []


def test_a_run_is_good_when_every_way_ran_everything_and_left_nothing() -> None:
    assert _ended("root", _test("one", "passed"), _test("two", "skipped", "no reason")).is_good(["root"])
    assert not _ended("root", _test("one", "passed")).is_good(["root", "user"])
    assert not _ended("root", _test("one", "failed", FAILURE), code=1).is_good(["root"])
    assert not _ended("root", _test("one", "passed"), left=("cgroup ashd",)).is_good(["root"])
    assert not _ended("root", _test("one", "passed"), code=None).is_good(["root"])
    assert not _ended("root").is_good(["root"])


def test_tests_that_were_cut_off_are_counted_as_not_run() -> None:
    facts = [{"fact": "way", "way": "user"}, {"fact": "collected", "tests": 3}, _test("one", "passed")]
    end = {"fact": "way-end", "way": "user", "exit": None, "left": [], "seconds": 60.0}
    assert _heard(BOOTED, *facts, end).ways[0].summary() == (
        "1 passed, 0 failed, 0 skipped, 2 not run, cut off at the deadline in 60 s"
    )


def test_the_page_names_kernel_counts_failures_reasons_and_what_was_left() -> None:
    report = _ended(
        "root",
        _test("one", "passed"),
        _test("two", "failed", FAILURE),
        _test("three", "skipped", "no Postgres"),
        left=("cgroup ashd/1",),
        code=1,
    )
    text = page(report, {"commit": "abc"}, "2026-01-02")
    for expected in (
        "# Tests on cgroup v2 in a virtual machine, 2026-01-02",
        "* commit: abc",
        "Linux 6.1.0-1-amd64, Python 3.11.2, cgroup v2 (cpu memory pids)",
        "Landlock ABI 2, PSI, ext4 with project quotas",
        "| root | 1 | 1 | 1 | 0 | 1 | 12 |",
        "| tests/a.py | 1 | 1 | 1 |",
        "* `tests/a.py::two`: assert 1 == 2",
        "* 1: no Postgres",
        "* `cgroup ashd/1`",
    ):
        assert expected in text


def test_a_run_that_got_stuck_says_so_on_its_page(tmp_path: Path) -> None:
    report = Report(stuck="waited in vain for the guest to boot")
    text = page(report, {}, "2026-01-02")
    assert "guest: did not boot" in text and "**Not finished**: waited in vain" in text
    written = record(tmp_path, text, "2026-01-02")
    assert written.name == "2026-01-02-vm-cgroup-v2.md" and written.read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no reason given"), ("a\nb\n", "b"), (FAILURE, "assert 1 == 2"), ("E   Timeout:  x\ny", "Timeout: x")],
)
def test_of_a_failure_the_line_that_says_most_is_shown(text: str, said: str) -> None:
    assert last_line(text) == said


def test_a_long_reason_keeps_its_end() -> None:
    assert outcomes.reason("x" * 10_000 + "end").endswith("xend")
    assert len(outcomes.reason("x" * 10_000)) == outcomes.LONGEST_REASON + 1


def test_the_guests_cgroups_are_removed_from_the_leaves_up(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    assert [path.name for path in guest.subgroups(tmp_path)][:2] == ["c", "b"]
    guest.remove_groups(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_survives_its_way_into_the_guest() -> None:
    plan = command.plan(command.parser().parse_args([]), "/usr/bin/python3")
    assert json.loads(json.dumps(plan)) == plan
