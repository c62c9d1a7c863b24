"""The examples, run as they are, in real sandboxes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ashd.coordinator import agent_yaml
from sandbox.protocol import Kind, Record
from tests.integration.sandboxes import DEADLINE_S, Host, Sandbox, text_of, until

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(host: Host, name: str) -> Sandbox:
    folder = EXAMPLES / name
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    spec = agent_yaml.read(files, files["agent.yaml"])
    sandbox = host.sandbox(kill_timeout_s=5.0)
    assert sandbox.claim(files, spec.runtime, entry=spec.entry).get("ready")
    return sandbox


@pytest.fixture
def shell(host: Host) -> Sandbox:
    return example(host, "shell-agent")


@pytest.fixture
def data(host: Host) -> Sandbox:
    return example(host, "data-agent")


@pytest.fixture
def countdown(host: Host) -> Sandbox:
    return example(host, "command-agent")


def result_of(records: list[Record]) -> dict[str, Any]:
    (result,) = (json.loads(record.payload) for record in records if record.type == "result")
    return {name: result[name] for name in ("result", "is_error")}


def outcome_of(records: list[Record]) -> str:
    outcome: str = json.loads(records[-1].payload)["outcome"]
    return outcome


def has_said(sandbox: Sandbox, text: str) -> bool:
    deltas = [json.loads(record.payload) for record in sandbox.records() if record.kind is Kind.DELTA]
    return text in "".join(delta["event"]["delta"]["text"] for delta in deltas)


# ---------------------------------------------------------------- shell-agent


def test_the_shell_agent_runs_a_command_and_tells_its_exit_code(shell: Sandbox) -> None:
    records = shell.turn("echo out; echo err >&2; exit 3")
    assert text_of(records) == "out\nerr\n[exit code 3]\n"
    assert result_of(records) == {"result": "exit code 3", "is_error": True}
    records = shell.turn("printf fine")
    assert (text_of(records), result_of(records)) == ("fine", {"result": "exit code 0", "is_error": False})


def test_the_shell_agent_keeps_its_working_directory(shell: Sandbox) -> None:
    shell.turn("mkdir -p 'a b/c' && cd 'a b/c'")
    assert text_of(shell.turn("pwd")) == f"{shell.inside}/a b/c\n"
    shell.turn("cd .. ; false")
    assert text_of(shell.turn("pwd; exit 0")) == f"{shell.inside}/a b\n"
    shell.turn('rmdir c; cd ..; rmdir "a b"')
    assert text_of(shell.turn("pwd")) == f"{shell.inside}\n"


def test_the_shell_agent_streams_output_as_it_comes(shell: Sandbox) -> None:
    shell.start_turn("echo first; until [ -e go ]; do sleep 0.01; done; echo second", includePartialMessages=True)
    until(lambda: has_said(shell, "first\n"), "the first line has come")
    (shell.workspace / "go").touch()
    assert text_of(shell.settled()) == "first\nsecond\n"


@pytest.mark.parametrize("command", ["sleep 60", "trap '' INT; sleep 60; sleep 60"], ids=["obedient", "deaf"])
def test_an_interrupt_stops_the_shell_agents_command(shell: Sandbox, command: str) -> None:
    shell.turn("cd /tmp")
    shell.start_turn(f"echo begun; {command}", includePartialMessages=True)
    until(lambda: has_said(shell, "begun"), "the command has begun")
    shell.interrupt()
    records = shell.settled()
    assert outcome_of(records) == "interrupted"
    assert "[killed by SIG" in text_of(records) or "[exit code 130]" in text_of(records)
    assert len(shell.processes()) == 1
    assert text_of(shell.turn("pwd")) == "/tmp\n"


def test_the_shell_agent_does_not_wait_for_what_runs_in_the_background(shell: Sandbox) -> None:
    assert text_of(shell.turn("sleep 60 & echo on")) == "on\n"
    assert text_of(shell.turn("echo further")) == "further\n"


def test_the_shell_agent_passes_on_large_and_odd_output(shell: Sandbox) -> None:
    assert len(text_of(shell.turn("head -c 3000000 /dev/zero | tr '\\0' x"))) == 3_000_000
    assert text_of(shell.turn("printf 'a\\377é'")) == "a\ufffdé"


def test_the_shell_agent_says_what_it_wants(shell: Sandbox) -> None:
    assert "Send a shell command" in text_of(shell.turn("  "))
    assert "Send a shell command" in text_of(shell.turn([{"type": "image", "source": {}}]))


# ---------------------------------------------------------------- data-agent


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which columns are there?", "sales.csv has 6 columns:\n  date (e.g. 2025-01-06)\n"),
        ("How many rows?", "12 rows\n"),
        ("sum of units", "sum of units: 88\n"),
        ("What is the average of price by product?", "average of price by product:\n  Chair: 87\n  Desk: 238.75\n"),
        ("max revenue", "max of revenue: 940\n"),
        ("min of units per region", "min of units by region:\n  East: 4\n  North: 2\n"),
        ("count of product by region", "count of product by region:\n  East: 3\n"),
        ("top 1 by revenue", "2025-04-07  East    Desk     4      235.00  940.00\n"),
        ("show 1", "2025-01-06  North   Lamp     12     24.50  294.00\n"),
        ("sum of region", "region does not hold numbers only"),
        ("sum of sadness", "There is no column sadness. There are: date, region,"),
        ("use other.csv", "There is no CSV file other.csv. CSV files here: sales.csv."),
        ("tell me a joke", "I don't understand that. I can answer:\n  columns"),
        ("", "I can answer:"),
    ],
)
def test_the_data_agent_answers(data: Sandbox, question: str, answer: str) -> None:
    records = data.turn(question, includePartialMessages=True)
    assert answer in text_of(records)
    assert outcome_of(records) == "completed"


def test_the_data_agents_filters_hold_for_the_session(data: Sandbox) -> None:
    assert text_of(data.turn("where region is north")) == "3 of 12 rows where region is north\n"
    assert text_of(data.turn("where units > 5")) == "2 of 12 rows where region is north and units > 5\n"
    assert text_of(data.turn("sum of revenue")) == "sum of revenue: 804\n"
    assert text_of(data.turn("all")) == "12 rows\n"
    assert "lots is not a number" in text_of(data.turn("where units > lots"))


def test_the_data_agent_reads_other_files_of_its_workspace(data: Sandbox) -> None:
    (data.workspace / "odd.csv").write_bytes(b"\xef\xbb\xbfname,n\nx,1\ny\n")
    assert text_of(data.turn("use odd.csv")) == "Reading odd.csv: 2 rows\n"
    assert text_of(data.turn("sum of n")) == "sum of n: 1\n"
    (data.workspace / "bad.csv").write_bytes(b"a\n\xff\n")
    assert "bad.csv can't be read" in text_of(data.turn("use bad.csv"))


# ---------------------------------------------------------------- command-agent


def test_the_command_agent_counts_down(countdown: Sandbox) -> None:
    records = countdown.turn("2", includePartialMessages=True)
    assert text_of(records) == "2 1 lift-off! (turn 1, from 2)"
    assert f"turn 1 of session {countdown.session}" in countdown.log_text()


def test_the_command_agent_refuses_what_is_no_number(countdown: Sandbox) -> None:
    end = json.loads(countdown.turn("x")[-1].payload)
    assert (end["outcome"], end["error"]) == ("failed", "send a number, and I count down from it")
    assert "lift-off" in text_of(countdown.turn("1"))


def test_the_command_agent_can_be_interrupted(countdown: Sandbox) -> None:
    countdown.start_turn("1000", includePartialMessages=True)
    until(lambda: has_said(countdown, "1000"), "it has begun")
    countdown.interrupt()
    assert outcome_of(countdown.settled()) == "interrupted"
    assert "(turn 2, from 1)" in text_of(countdown.turn("1"))


def test_the_command_agent_can_be_tried_by_hand() -> None:
    line = '{"type": "turn", "turn": 1, "content": "1", "session": {"id": "x"}}\n'
    agent = [sys.executable, str(EXAMPLES / "command-agent" / "agent.py")]
    said = subprocess.run(agent, input=line, capture_output=True, text=True, timeout=DEADLINE_S, check=True).stdout
    assert [json.loads(line)["type"] for line in said.splitlines()] == ["delta", "assistant", "done"]
