"""loadtest/memory_ceiling.py: its arithmetic, its decisions at the ceiling, and what it writes."""

from __future__ import annotations

import _thread
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loadtests import script

ceiling_report = script("ceiling_report")
host_memory = script("host_memory")
interrupts = script("interrupts")
installation = script("installation")
memory_ceiling = script("memory_ceiling")
ramp = script("ramp")
roundtrip = script("roundtrip")

MIB, GIB = 1024**2, 1024**3


# ---------------------------------------------------------------- reading the host


def test_counters_of_meminfo_are_read_in_bytes_and_those_without_a_unit_left_out() -> None:
    text = "MemTotal:       1024 kB\nMemAvailable:    512 kB\nHugePages_Total:   7\n"
    assert host_memory.meminfo(text) == {"MemTotal": MIB, "MemAvailable": MIB // 2}


def test_a_process_named_like_a_line_of_stat_is_read_right() -> None:
    rest = " ".join(str(number) for number in range(3, 53))  # fields 4.. hold their number less one
    process = host_memory.parsed_stat(7, f"7 (a) S 1 (b)) S {rest}")
    assert (process.pid, process.parent, process.started) == (7, 3, 21)
    assert process.cpu_s == pytest.approx((13 + 14) / os.sysconf("SC_CLK_TCK"))


def test_what_runs_below_a_process_is_found_to_any_depth_and_nothing_else() -> None:
    def one(pid: int, parent: int) -> Any:
        return host_memory.Process(pid, parent, 0.0, 0)

    all_ = {process.pid: process for process in (one(1, 0), one(2, 1), one(3, 2), one(4, 3), one(5, 1))}
    assert host_memory.below(all_, [2]) == {2, 3, 4}
    assert host_memory.below(all_, [2, 5]) == {2, 3, 4, 5}
    assert host_memory.below(all_, [99]) == set()


def test_memory_of_a_process_is_its_own_pages_and_ended_ones_have_none() -> None:
    with Holding(32) as child:
        assert 32 * MIB <= host_memory.pss_bytes([child.pid]) < 64 * MIB
        assert child.pid in host_memory.below(host_memory.processes(), [os.getpid()])
        before = {child.pid: host_memory.processes()[child.pid]}
        assert list(host_memory.still_there(before)) == [child.pid]
    assert list(host_memory.still_there(before)) == []
    assert host_memory.pss_bytes([child.pid]) == 0


class Holding:
    """A child that holds so many MiB."""

    def __init__(self, mib: int) -> None:
        code = f"h = bytearray(b'x') * ({mib} << 20); print('there', flush=True); input()"
        self._child = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> subprocess.Popen[bytes]:
        assert self._child.stdout is not None
        assert self._child.stdout.readline() == b"there\n"
        return self._child

    def __exit__(self, *_: object) -> None:
        self._child.communicate(b"\n", timeout=30)


# ---------------------------------------------------------------- arithmetic


@given(st.floats(-100, 100), st.floats(-1000, 1000), st.sets(st.integers(0, 1000), min_size=2, max_size=20))
def test_the_slope_of_a_straight_line_is_its_own(slope: float, start: float, xs: set[int]) -> None:
    points = sorted(xs)
    assert ramp.slope(points, [start + slope * x for x in points]) == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_one_point_has_no_slope_and_no_cost_of_a_sandbox() -> None:
    with pytest.raises(ValueError, match="slope"):
        ramp.slope([3, 3], [1, 2])
    assert ramp.per_sandbox([]) is None
    assert ramp.per_sandbox([_step(0), _step(0)]) is None
    assert ramp.per_sandbox([_step(0), _step(10)]) == {
        "lost_bytes": 80 * MIB,
        "keepers_pss_bytes": 2 * MIB,
        "sandboxes_pss_bytes": 70 * MIB,
        "platform_growth_bytes": 0,
        "kernel_growth_bytes": MIB,
        "counted_bytes": 71 * MIB,
    }


@given(st.integers(1, 100 * GIB), st.integers(1, GIB))
def test_as_many_fit_as_have_room_and_not_one_more(room: int, each: int) -> None:
    count = ceiling_report.fits(room, each)
    assert count * each <= room < (count + 1) * each


def test_nothing_fits_by_a_cost_that_is_not_known() -> None:
    assert ceiling_report.fits(GIB, None) is None
    assert ceiling_report.fits(GIB, -1.0) is None


@given(st.floats(0.1, 60), st.integers(1, 16))
def test_a_suite_leaves_time_for_every_run(left: float, runs: int) -> None:
    for remaining in range(runs, 0, -1):
        minutes = memory_ceiling.fair_share(left, remaining)
        assert 0 < minutes <= memory_ceiling.SUITE_RUN_MINUTES
        left -= minutes if remaining > 2 else 0
        if left <= 0:
            break
    assert left > 0


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * GIB), ("512MiB", 512 * MIB), ("0.5 GiB", GIB // 2), ("64", 64 * MIB)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert memory_ceiling._size(text) == size


def test_the_script_stops_by_itself_only_where_the_runner_should_have_refused() -> None:
    for headroom in (0, GIB // 2, 2 * GIB, 14 * GIB):
        plan = memory_ceiling.Plan("idle", 512, 10, 1.0, 1, headroom)
        assert plan.least_available <= headroom
        assert headroom == 0 or plan.least_available > 0


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "argv",
    [
        ["--agent", "fork-bomb"],
        ["--memory-limit", "0"],
        ["--memory-limit", "lots"],
        ["--max-sessions", "0"],
        ["--max-minutes", "0"],
        ["--max-minutes", "nan"],
        ["--step", "0"],
        ["--concurrency", "1000"],
        ["--stop-at-available", "some"],
        ["--url", "127.0.0.1:4100"],
        ["--url", "http://127.0.0.1:4100", "--suite"],
        ["--url", "http://127.0.0.1:4100", "--config", __file__],
        ["--api-key", "a\nb"],
        ["--capacity-page", __file__],
        ["--from", "/nowhere.json"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        memory_ceiling.parse(argv)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_limit_is_a_number_or_none() -> None:
    assert memory_ceiling.parse(["--memory-limit", "128"]).memory_limit == 128
    assert memory_ceiling.parse(["--memory-limit", "none"]).memory_limit is None


def test_the_runner_it_starts_keeps_the_headroom_and_has_a_limit_no_host_reaches_for_none() -> None:
    def told(limit: int | None) -> Any:
        return memory_ceiling.settings(memory_ceiling.Plan("idle", limit, 10, 1.0, 1, 2 * GIB))["runner"]

    assert told(512) == {"memory_headroom": "2048MiB"}
    assert told(None)["limits"] == {"memory": memory_ceiling.NO_LIMIT}


def test_settings_are_laid_over_a_file_section_by_section() -> None:
    file = {"runner": {"max_sandboxes": 8, "limits": {"processes": 9}}, "mode": "standalone"}
    assert installation.laid_over(file, {"runner": {"limits": {"memory": "1GiB"}, "max_sandboxes": 4}}) == {
        "runner": {"max_sandboxes": 4, "limits": {"processes": 9, "memory": "1GiB"}},
        "mode": "standalone",
    }


def test_no_server_is_an_exit_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with interrupts.undisturbed():  # puts the handlers back
        assert memory_ceiling.main(["--url", "http://127.0.0.1:1", "--timeout", "2"]) == 3
    assert "can't be measured" in capsys.readouterr().err


# ---------------------------------------------------------------- at the ceiling, against a server of one's own making


class _Script:
    """Stands for a connection: answers each create with the next of `creates`, and everything else well."""

    def __init__(self, creates: Iterator[Any]) -> None:
        self._creates = creates
        self.made: list[str] = []
        self.ended: list[str] = []

    def json(self, method: str, path: str, body: Any = None) -> Any:
        if (method, path) == ("POST", "/api/sessions"):
            answer = next(self._creates)
            if isinstance(answer, Exception):
                raise answer
            self.made.append(f"session-{len(self.made)}")
            return {"session": {"id": self.made[-1]}}
        if method == "DELETE" and path.startswith("/api/sessions/"):
            self.ended.append(path.rpartition("/")[2])
        live = [{"id": session} for session in self.made if session not in self.ended]
        return {"sessions": live if "status=active" in path else []}

    def turn(self, path: str, body: Any) -> Any:
        return roundtrip.Turn(0.0, 0.0, 0.0, "completed", "")

    def close(self) -> None:
        pass


def _full() -> Exception:
    error: Exception = roundtrip.Failure("POST /api/sessions: 503 Fleet capacity reached", 503, "fleet.full")
    return error


@pytest.fixture
def climb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, _Script]]:
    """A ramp against a script of answers, without the pauses."""
    for name in ("REFUSAL_PAUSE_S", "IDLE_S"):
        monkeypatch.setattr(ramp, name, 0.001)

    def run(creates: Iterator[Any], **bounds: Any) -> tuple[Any, _Script]:
        given = {"sessions": 50, "deadline": time.monotonic() + 60, "step": 4, "concurrency": 1, "least_available": 0}
        server = _Script(creates)
        monkeypatch.setattr(ramp.Server, "connection", lambda _: server)
        at = ramp.Server("http://127.0.0.1:1", None, 1.0)
        climbing = ramp.Ramp(at, "idle", 512, ramp.Bounds(**{**given, **bounds}), host_memory.Watch(None))
        return climbing.run(), server

    return run


def _answers(*answers: Any) -> Iterator[Any]:
    """These, the last of them for ever."""
    yield from answers
    while True:
        yield answers[-1]


def test_refusals_on_end_are_the_ceiling_and_everything_is_removed(climb: Any) -> None:
    found, server = climb(_answers(1, 1, 1, 1, 1, _full()))
    assert (found.stop.reason, found.sessions, found.refusals) == ("refused", 5, ramp.REFUSALS)
    assert "capacity" in found.stop.detail
    assert server.ended == server.made and not found.left
    assert found.active_at_end == 5


def test_one_refusal_that_passes_is_not_the_ceiling(climb: Any) -> None:
    found, _ = climb(_answers(1, _full(), _full(), 1), sessions=9)
    assert (found.stop.reason, found.sessions, found.refusals) == ("sessions", 9, 2)


def test_a_server_that_is_unavailable_is_not_called_full(climb: Any) -> None:
    found, _ = climb(_answers(1, roundtrip.Failure("POST: 503 No runners available", 503, "fleet.no_runners")))
    assert found.stop.reason == "unavailable"


def test_an_agent_that_does_not_fit_ends_the_ramp_with_its_error(climb: Any) -> None:
    found, _ = climb(_answers(roundtrip.Failure("POST: 400 used more memory", 400, "sandbox.oom")))
    assert (found.stop.reason, found.sessions) == ("failing", 0)
    assert found.failures == {"create: sandbox.oom": ramp.FAILURES}
    assert found.report()["per_sandbox_bytes"] is None


def test_sandboxes_that_die_alone_and_answers_that_never_come_do_not_end_the_ramp(climb: Any) -> None:
    found, _ = climb(_answers(1, roundtrip.Failure("oom", 400, "sandbox.oom"), 1, roundtrip.Failure("timeout"), 1))
    assert (found.stop.reason, found.sessions) == ("sessions", 50)
    assert found.failures == {"create: sandbox.oom": 1, "create: no answer": 1}


def test_a_ramp_ends_at_its_deadline_and_when_the_host_is_nearly_full(climb: Any) -> None:
    late, _ = climb(_answers(1), deadline=time.monotonic() - 1)
    assert (late.stop.reason, late.sessions) == ("minutes", 0)
    full, _ = climb(_answers(1), least_available=10**18)
    assert (full.stop.reason, full.sessions) == ("available", 0)


def test_an_interrupted_ramp_removes_what_it_made(climb: Any) -> None:
    found, server = climb(_interrupting())
    assert found.stop.reason == "interrupted"
    assert server.ended == server.made


def _interrupting() -> Iterator[Any]:
    """Ctrl-c arrives in the main thread, not in the one that asks; two sessions are made before it."""
    yield from (1, 1)
    _thread.interrupt_main()
    while True:
        yield roundtrip.Failure("late", 0)


def test_what_cleans_up_is_not_disturbed_by_interrupts_and_they_are_not_lost() -> None:
    done = []

    def clean_up() -> None:
        with interrupts.undisturbed():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        clean_up()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---------------------------------------------------------------- what is written


def _step(sandboxes: int) -> dict[str, Any]:
    return {
        "sessions": sandboxes,
        "sandboxes": sandboxes,
        "processes": 2 * sandboxes,
        "available_bytes": 20 * GIB - 80 * MIB * sandboxes,
        "lost_bytes": 80 * MIB * sandboxes,
        "kernel_growth_bytes": MIB * sandboxes,
        "sandboxes_pss_bytes": 70 * MIB * sandboxes,
        "keepers_pss_bytes": 2 * MIB * sandboxes,
        "platform_growth_bytes": 0,
        "create_ms": {"count": 1, "min": 1.0, "p50": 1.0, "p95": 2.0, "p99": 2.0, "max": 2.0} if sandboxes else None,
    }


def _run(agent: str, limit: int | None, *, reason: str = "refused") -> dict[str, Any]:
    found = ramp.Ramped(ramp.Stop(reason, "POST /x: 503 capacity | reached"), sessions=10, active_at_end=10)
    found.create_s, found.platform_pss = [0.010, 0.020], 256 * MIB
    found.steps = [] if reason == "failing" else [_step(0), _step(5), _step(10)]
    return {"agent": agent, "memory_limit_mb": limit, "version": "0", **found.report()}


def _report(*runs: dict[str, Any]) -> dict[str, Any]:
    about = {"machine": "a machine", "commit": "abc", "version": "0", "command": "python x.py", "notes": []}
    return {"at": "2026-01-01T00:00:00+00:00", **about, "runs": list(runs)}


def test_table_and_numbers_are_written_and_the_picture_only_where_its_library_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> None:
        raise ceiling_report.NoLibrary("pip install matplotlib")

    monkeypatch.setattr(ceiling_report, "draw", missing)
    files = memory_ceiling.write(_report(_run("idle", 512)), tmp_path, "day")
    assert [file.name for file in files] == ["day.json", "day.md"]
    assert "pip install matplotlib" in capsys.readouterr().err
    text = (tmp_path / "day.md").read_text(encoding="utf-8")
    assert "day.png" not in text
    assert "| 512 MiB | idle Python | 10 | 800 | 71.0 | 70.0 | 0.00 | 1.00 | 80.0 |" in text
    assert "refused (slots): capacity / reached" in text
    assert json.loads((tmp_path / "day.json").read_text(encoding="utf-8"))["runs"][0]["sessions"] == 10


def test_the_picture_is_drawn_for_runs_that_measured_something_and_for_none(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for runs in ([_run("idle", 512), _run("heap64", None), _run("heap256", 128, reason="failing")], []):
        ceiling_report.draw(_report(*runs), tmp_path / "day.png")
        assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("end", "status"), [(roundtrip.Failure("gone"), 1), (KeyboardInterrupt(), 130)])
def test_a_suite_that_breaks_off_writes_what_it_has_and_leaves_the_page(
    end: BaseException, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suite(_: Any) -> Iterator[dict[str, Any]]:
        yield _run("idle", 512)
        raise end

    monkeypatch.setattr(memory_ceiling, "suite", suite)
    page = tmp_path / "capacity.md"
    page.write_text("mine", encoding="utf-8")
    with interrupts.undisturbed():  # puts the handlers back
        argv = ["--suite", "--write", str(tmp_path / "out"), "--capacity-page", str(page)]
        assert memory_ceiling.main(argv) == status
    (raw,) = (tmp_path / "out").glob("*.json")
    assert len(json.loads(raw.read_text(encoding="utf-8"))["runs"]) == 1
    assert page.read_text(encoding="utf-8") == "mine"


def test_every_row_of_a_table_has_the_cells_of_its_head() -> None:
    report = _report(_run("idle", 512), _run("heap256", 128, reason="failing"))
    for text in (ceiling_report.page(report, "day", picture=True), ceiling_report.capacity_block(report, "day.json")):
        widths = [line.count("|") for line in text.splitlines()]
        for before, after in itertools.pairwise(widths):
            assert before == after or 0 in (before, after)


def test_long_ramps_are_shown_by_some_of_their_steps_the_first_and_last_among_them() -> None:
    shown = ceiling_report._some(list(range(100)), 12)
    assert (len(shown), shown[0], shown[-1]) == (12, 0, 99)
    assert shown == sorted(set(shown))


def test_the_page_of_capacity_gets_its_numbers_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "capacity.md"
    begin = ceiling_report.BEGIN.format(source="none")
    page.write_text(f"before\n\n{begin}\nstale\n{ceiling_report.END}\n\nafter\n", encoding="utf-8")
    report = _report(_run("idle", 512), _run("heap256", 128, reason="failing"))
    for _ in range(2):
        memory_ceiling.update_capacity_page(page, report, tmp_path / "measurements" / "day.json")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n\n<!-- measured: begin measurements/day.json -->") and text.endswith("\n\nafter\n")
    assert text.count("Measured 2026-01-01") == 1 and "stale" not in text
    room = 16 * GIB - 1024 * MIB - 256 * MIB
    assert f"| 512 MiB | 30 | {room // (512 * MIB)} | {room // (71 * MIB)} | not measured |" in text
    assert "does not fit" in text
    block, source = ceiling_report.block_of(text)
    assert (block, source) == (ceiling_report.capacity_block(report, source), "measurements/day.json")


def test_a_refusal_is_told_by_what_the_last_runner_said() -> None:
    run = _run("idle", 512)
    run["stop"]["detail"] = (
        "POST /api/sessions: 503 Fleet capacity reached: 9 sandboxes (the last runner asked: this host has 100 MiB of "
        "memory left, memory_headroom asks for 512 MiB)"
    )
    said = "this host has 100 MiB of memory left, memory_headroom asks for 512 MiB"
    assert ceiling_report.reason(run) == f"refused (memory): {said}"
    run["stop"]["detail"] = "POST /api/sessions: 503 Fleet capacity reached: 9 sandboxes"
    assert ceiling_report.ended_by(run) == "refused (slots)"


def test_a_page_without_marks_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        ceiling_report.with_block("no marks", "block")
    with pytest.raises(ValueError, match="no generated part"):
        ceiling_report.block_of("no marks")


def test_more_than_the_slots_of_a_runner_are_shown_as_its_slots() -> None:
    run = _run("idle", 512)
    run["per_sandbox_bytes"]["counted_bytes"] = MIB
    count = (16 * GIB - 1024 * MIB - 256 * MIB) // MIB
    assert ceiling_report.scaled(ceiling_report.Machine(), run) == f"1000 ({count})"
