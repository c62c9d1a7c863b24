"""When a runner takes another session, by the memory that is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from ashd.errors import Unavailable
from ashd.runner import host_memory
from ashd.runner.admission import Admission
from ashd.runner.host_memory import HostMemory, Reading
from ashd.wire.status import FULL

MIB = 1024 * 1024


class Host:
    """A host whose memory a test sets, and its admission."""

    def __init__(self, left_mib: int, headroom_mib: int = 512, most_pressure: int = 20, sandbox_mib: int = 0) -> None:
        self.reading = Reading(left_mib * MIB)
        self.reads = 0
        self.now_s = 0.0
        self.admission = Admission(
            headroom_mib * MIB, most_pressure, self.read, lambda: sandbox_mib * MIB, lambda: "", lambda: self.now_s
        )

    def read(self) -> Reading:
        self.reads += 1
        return self.reading

    def becomes(self, left_mib: int, pressure: float = 0.0) -> None:
        self.reading = Reading(left_mib * MIB, pressure=pressure)
        self.now_s += 1.0


def test_less_than_the_headroom_refuses_and_says_both_numbers() -> None:
    host = Host(left_mib=300)
    with pytest.raises(Unavailable, match="this host has 300 MiB of memory left, memory_headroom asks for 512") as full:
        host.admission.check()
    assert full.value.code == FULL and host.admission.refusing == "memory"
    assert host.admission.statement == f"memory: {full.value.message}"


def test_as_much_as_the_headroom_is_enough() -> None:
    host = Host(left_mib=512)
    host.admission.check()
    assert host.admission.refusing == host.admission.statement == ""


def test_a_headroom_of_nothing_never_refuses() -> None:
    assert Host(left_mib=0, headroom_mib=0).admission.allows()


def test_sandboxes_being_started_count_as_if_they_had_their_memory_already() -> None:
    host = Host(left_mib=600, sandbox_mib=40)
    with host.admission.beginning(), host.admission.beginning():
        assert host.admission.allows()
        with (
            host.admission.beginning(),
            pytest.raises(Unavailable, match=r"480 MiB .* beside 3 sandboxes being started"),
        ):
            host.admission.check()


def test_before_a_sandbox_was_measured_one_is_taken_to_need_a_little() -> None:
    host = Host(left_mib=519)
    with host.admission.beginning():
        assert not host.admission.allows()


def test_taking_sessions_again_asks_for_a_little_more_than_the_least() -> None:
    host = Host(left_mib=500)
    assert not host.admission.allows()
    host.becomes(left_mib=520)
    assert not host.admission.allows()
    host.becomes(left_mib=544)
    assert host.admission.allows()
    host.becomes(left_mib=520)
    assert host.admission.allows()


def test_pressure_refuses_until_it_has_clearly_gone_down() -> None:
    host = Host(left_mib=4000)
    host.becomes(4000, pressure=21.0)
    with pytest.raises(Unavailable, match="21 % of the last 10 s, memory_pressure allows 20 %"):
        host.admission.check()
    assert host.admission.refusing == "pressure"
    host.becomes(4000, pressure=18.0)
    assert not host.admission.allows()
    host.becomes(4000, pressure=14.0)
    assert host.admission.allows()


def test_all_of_the_time_can_not_be_exceeded() -> None:
    host = Host(left_mib=4000, most_pressure=100)
    host.becomes(4000, pressure=100.0)
    assert host.admission.allows()


def test_a_burst_reads_the_host_once_and_an_ended_start_makes_the_reading_old() -> None:
    host = Host(left_mib=4000)
    for _ in range(100):
        host.admission.check()
    assert host.reads == 1
    with host.admission.beginning():
        host.admission.check()
    host.admission.check()
    assert host.reads == 2


# ---------------------------------------------------------------- the readings


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    return tmp_path


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


STAT = "cache 0\ninactive_file 1048576\ntotal_inactive_file 2097152\n"


def test_the_tightest_cgroup_on_the_way_up_counts(root: Path) -> None:
    group(root / "a", memory__max="10485760\n", memory__current="5242880\n", memory__stat=STAT)
    below = group(root / "a" / "b", memory__max="max\n", memory__current="1\n", memory__stat=STAT)
    reading = HostMemory([below / "not-there"]).read()
    assert reading.available_bytes == 6 * MIB and reading.where == f"the cgroup {root / 'a'}"


def test_version_1_counts_the_caches_of_groups_below(root: Path) -> None:
    confined = group(
        root / "memory" / "a",
        memory__limit_in_bytes="10485760\n",
        memory__usage_in_bytes="5242880\n",
        memory__stat=STAT,
    )
    assert HostMemory([confined]).read().available_bytes == 7 * MIB


def test_without_limits_the_host_counts_and_swap_does_not(root: Path) -> None:
    open_to_all = group(root / "memory", memory__limit_in_bytes="9223372036854771712\n")
    reading = HostMemory([open_to_all]).read()
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(fields["MemTotal"].split()[0]) * 1024
    assert reading.where == "this host" and 0 < reading.available_bytes < total
    assert 0.0 <= reading.pressure <= 100.0


def test_a_kernel_without_psi_is_fine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_PRESSURE", root / "absent")
    assert HostMemory([]).read().pressure == 0.0
