"""loadtest/roundtrip.py: its arithmetic, the checks of its arguments, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loadtests import script

roundtrip = script("roundtrip")


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [(1, 50, 1), (1, 99, 1), (2, 50, 1), (2, 51, 2), (100, 50, 50), (100, 99, 99), (100, 100, 100), (200, 99, 198)],
)
def test_a_percentile_is_the_nearest_rank(count: int, percent: float, expected: int) -> None:
    assert roundtrip.percentile(range(1, count + 1), percent) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 100))
def test_a_percentile_is_a_measured_value_with_that_share_at_or_below_it(values: list[float], percent: float) -> None:
    found = roundtrip.percentile(sorted(values), percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values) - 1e-9 * len(values)


@pytest.mark.parametrize("percent", [0, -1, 100.1])
def test_a_percentage_outside_its_range_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="percentage"):
        roundtrip.percentile([1.0], percent)


def test_no_values_have_no_percentile_and_no_summary() -> None:
    with pytest.raises(ValueError, match="no values"):
        roundtrip.percentile([], 50)
    assert roundtrip.Summary.of([]) is None


def test_a_summary_is_in_milliseconds_and_does_not_mind_the_order() -> None:
    assert roundtrip.Summary.of([0.003, 0.001, 0.002]) == roundtrip.Summary(3, 1.0, 2.0, 3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    "argv",
    [
        ["--sessions", "0"],
        ["--sessions", "ten"],
        ["--sessions", "1000000"],
        ["--messages", "-1"],
        ["--concurrency", "0"],
        ["--concurrency", "1", "512"],
        ["--concurrency", "8", "--sessions", "4"],
        ["--max-seconds", "0"],
        ["--max-seconds", "86400"],
        ["--url", "127.0.0.1:4100"],
        ["--url", "ftp://127.0.0.1"],
        ["--api-key", "a\nb"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        roundtrip.parse(argv)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_defaults_can_be_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASH_API_KEY", raising=False)
    options = roundtrip.parse([])
    assert (options.url, options.api_key, options.concurrency) == ("http://127.0.0.1:4100", None, [1])


def test_the_command_is_shown_without_the_key() -> None:
    for argv in (
        ["--api-key", "ash_secret", "--json", "a b"],
        ["--json", "a b", "--api-key=ash_secret"],
        ["--json", "a b"],
    ):
        assert roundtrip.shown_command(argv) == "python loadtest/roundtrip.py --json 'a b'"
    assert roundtrip.shown_command(["--note", "--api-key", "--json", "x"]).endswith("roundtrip.py --json x")


def test_no_server_is_an_exit_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert roundtrip.main(["--url", "http://127.0.0.1:1", "--timeout", "2"]) == 3
    assert "can't be measured" in capsys.readouterr().err


def _report(label: str) -> dict[str, Any]:
    run = roundtrip.Run(concurrency=2, sessions=3, messages=4, create=[0.01], done=[0.002, 0.004], message_seconds=1.0)
    run.failed(roundtrip.Failure("no `done`"))
    return {
        "label": label,
        "note": "",
        "at": "2026-01-01T00:00:00+00:00",
        "machine": "a machine",
        "commit": "abc",
        "version": "0",
        "command": "python loadtest/roundtrip.py",
        "runs": [run.report()],
    }


def test_reports_of_a_day_are_collected_in_one_measurement(tmp_path: Path) -> None:
    for label in ("First", "Second"):
        page = roundtrip.write_measurement(tmp_path, _report(label), "2026-01-01")
    text = page.read_text(encoding="utf-8")
    assert text.index("## First") < text.index("## Second")
    assert "1 failed, 2.0 messages/s" in text
    assert "| create session | 1 | 10.00 | 10.00 |" in text
    raw = json.loads((tmp_path / "2026-01-01-roundtrip.json").read_text(encoding="utf-8"))
    assert [report["label"] for report in raw] == ["First", "Second"]
    assert raw[0]["runs"][0]["raw_ms"]["done"] == [2.0, 4.0]
