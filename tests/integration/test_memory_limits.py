"""Memory, processes and processor time of real sandboxes in real cgroups: who is killed, who is told, who lives on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ashd.runner import cgroup
from sandbox.protocol import Kind, Record
from tests.integration.sandboxes import MIB, Host, Sandbox, Zygote, status_of, until

OBEYS = '''
import asyncio, json, os, signal, subprocess, sys, time
from pathlib import Path

GREEDY = "hoard = []\\nwhile True: hoard.append(bytearray(1 << 20))"

def memory_group(pid="self"):
    """The last part of a process's memory cgroup; a cgroup namespace begins at the agent's own."""
    lines = [line.split(":") for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return next(path for _, names, path in lines if names in ("memory", "")).rpartition("/")[2] or "agent"

WHERE = "import sys; sys.path.insert(0, '.'); import agent; print(agent.memory_group())"

async def killed(number=1):
    while len(session.memory_kills) < number:
        await asyncio.sleep(0.01)
    return session.memory_kills

async def turn(message, its_session):
    """Does what it is told."""
    global session
    session = its_session
    scope = globals() | {"said": []}
    exec("async def job():\\n" + "\\n".join("    " + line for line in message.text.splitlines()), scope)
    await scope["job"]()
    for item in scope["said"]:
        yield item
'''

PROGRAM = """#!/usr/bin/env python3
import json, os, subprocess, sys
from pathlib import Path

def say(text):
    content = [{"type": "text", "text": text}]
    print(json.dumps({"type": "assistant", "message": {"role": "assistant", "content": content}}), flush=True)

def group(pid="self"):
    lines = [line.split(":") for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return next(path for _, names, path in lines if names in ("memory", "")).rpartition("/")[2] or "agent"

greedy = "hoard = []\\nwhile True: hoard.append(bytearray(1 << 20))"
for line in sys.stdin:
    asked = json.loads(line)
    if asked["type"] == "memory_kill":
        say(json.dumps(asked))
    elif asked["content"] == "tool":
        say(str(subprocess.run([sys.executable, "-c", greedy]).returncode))
        continue  # done when it is told of the kill
    elif asked["content"] == "where":
        say(group())
    elif asked["content"] == "greedy":
        exec(greedy)
    print(json.dumps({"type": "done"}), flush=True)
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.fixture
def host(zygote: Zygote) -> Iterator[Host]:
    with Host(zygote) as host:
        if "cgroup-memory" not in cgroup.controllers(host.hierarchies) or not zygote.shown["tools"]:
            pytest.skip("no memory cgroup can be made here, or what is executed can't be watched")
        yield host


def program(host: Host, **limits: Any) -> Sandbox:
    """A sandbox whose agent is a program, ready for turns."""
    made = host.sandbox(**limits)
    assert made.claim({"agent": PROGRAM}, "command", entry=["./agent"]).get("ready")
    return made


def text_of(records: list[Record]) -> str:
    messages = [json.loads(record.payload) for record in records if record.type == "assistant"]
    return "".join(block["text"] for message in messages for block in message["message"]["content"])


def end_of(records: list[Record]) -> dict[str, Any]:
    end: dict[str, Any] = json.loads(records[-1].payload)
    assert (records[-1].kind, end["action"]) == (Kind.SETTLED, "turn_settled")
    return end


def happened(records: list[Record], action: str) -> list[dict[str, Any]]:
    """The lifecycle events of a turn with this action, without it."""
    events = [json.loads(record.payload) for record in records if record.kind is Kind.TIMELINE]
    return [
        {name: value for name, value in event.items() if name != "action"}
        for event in events
        if event.get("action") == action
    ]


def group_of(host: Host, sandbox: Sandbox, controller: str = "memory") -> Path:
    return next(made.parent / sandbox.id for made in host.hierarchies if controller in made.controllers)


# ---------------------------------------------------------------- who is where


def test_what_an_agent_executes_is_a_tool_and_the_agent_is_not(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = """
said.append(memory_group() + " ")
said.append(subprocess.run([sys.executable, "-c", WHERE], stdout=-1, text=True).stdout)
process = await asyncio.create_subprocess_exec(sys.executable, "-c", WHERE, stdout=-1)
said.append((await process.communicate())[0].decode())
said.append(str(os.system("exit 7") >> 8))
"""
    assert text_of(sandbox.turn(code)).split() == ["agent", "tools", "tools", "7"]


def test_a_tools_grandchild_and_what_it_forks_are_tools(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = """
nested = ["sh", "-c", "sh -c 'cat /proc/self/cgroup & wait'; (cat /proc/self/cgroup)"]
lines = subprocess.run(nested, stdout=-1, text=True).stdout.splitlines()
ours = [line for line in lines if line.endswith(("/agent", "/tools"))]
said.append(" ".join(line.rpartition("/")[2] for line in ours))
"""
    assert text_of(sandbox.turn(code)) == "tools tools"


def test_what_an_agent_forks_without_executing_stays_with_it(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(1) as pool:
    said.append(pool.apply(memory_group))
"""
    assert text_of(sandbox.turn(code)) == "agent"


def test_a_program_that_is_the_agent_stays_one_when_it_executes_another(host: Host) -> None:
    sandbox = host.sandbox()
    files = {"agent": '#!/bin/sh\nexec ./again "$@"\n', "again": PROGRAM, "startup.sh": "exit 0\n"}
    assert sandbox.claim(files, "command", entry=["./agent"]).get("ready")
    assert text_of(sandbox.turn("where")) == "agent"


def test_tools_are_the_first_to_go_and_nobody_inside_may_change_that(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = """
own = Path("/proc/self/oom_score_adj")
said.append(own.read_text())
said.append(subprocess.run(["cat", own], stdout=-1, text=True).stdout)
"""
    agent, tool = text_of(sandbox.turn(code)).split()
    assert (int(agent) >= 500, int(tool)) == (True, 1000)


def test_500_quick_programs_all_run(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = """
said.append(str(sum(subprocess.run(["true"]).returncode == 0 for _ in range(300))))
many = [await asyncio.create_subprocess_exec("true") for _ in range(20) for _ in range(10)]
said.append(" " + str(sum([await process.wait() == 0 for process in many])))
"""
    assert text_of(sandbox.turn(code)) == "300 200"


def test_an_agent_that_executes_too_fast_waits_and_all_its_programs_run(host: Host) -> None:
    sandbox = host.agent(OBEYS, max_execs_per_s=20)
    begun = time.monotonic()
    code = "said.append(str(sum(subprocess.run(['/bin/true']).returncode == 0 for _ in range(250))))"
    assert text_of(sandbox.turn(code)) == "250"
    assert time.monotonic() - begun > 2  # 200 may run at once, and 50 take their time


def test_executing_waits_for_a_keeper_that_is_stopped_and_goes_on_with_it(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    sandbox.start_turn(
        "Path('ready').touch()\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "started = os.fork()\n"
        "if started == 0:\n"
        "    Path('about').write_text(str(os.getpid()))\n"
        "    os.execv('/bin/sh', ['sh', '-c', 'echo ran > ran'])\n"
        "said.append(str(os.waitpid(started, 0)[1]))\n"
    )
    until((sandbox.workspace / "ready").exists, "the agent has begun")
    os.kill(sandbox.keeper, signal.SIGSTOP)
    try:
        (sandbox.workspace / "go").touch()
        until((sandbox.workspace / "about").exists, "a child is about to execute")
        until(lambda: len(sandbox.processes()) == 2, "the child is there")
        child = max(sandbox.processes())
        until(lambda: status_of(child, "State")[0] in "SD", "it waits")
        assert not (sandbox.workspace / "ran").exists()
    finally:
        os.kill(sandbox.keeper, signal.SIGCONT)
    assert text_of(sandbox.settled()) == "0"
    assert (sandbox.workspace / "ran").read_text() == "ran\n"


# ---------------------------------------------------------------- tools that eat memory


def test_a_tool_that_eats_memory_dies_and_its_session_lives(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=96 * MIB)
    code = """
tool = subprocess.Popen([sys.executable, "-c", GREEDY])
said.append(str(tool.wait()))
(kill,) = await killed()
assert kill["victim"]["pid"] == tool.pid
said.append(json.dumps(kill))
"""
    records = sandbox.turn(code)
    (event,) = happened(records, "memory_kill")
    assert event["scope"] == "tool"
    assert event["victim"]["name"].startswith("python")
    assert event["limitBytes"] == cgroup.tools_limit(96 * MIB)
    assert event["limitBytes"] - MIB <= event["peakBytes"] <= event["limitBytes"]
    status, _, told = text_of(records).partition("{")
    assert status == "-9"
    assert json.loads("{" + told) == event
    assert end_of(records)["outcome"] == "completed"
    assert "the tool used more memory than its limit of 84 MiB" in sandbox.log_text()
    assert text_of(sandbox.turn("said.append(str(len(session.memory_kills)))")) == "1"


def test_a_program_hears_on_its_stdin_of_a_tool_that_was_killed(host: Host) -> None:
    sandbox = program(host, memory=96 * MIB)
    records = sandbox.turn("tool")
    (event,) = happened(records, "memory_kill")
    status, _, told = text_of(records).partition("{")
    assert status == "-9"
    assert json.loads("{" + told) == {"type": "memory_kill", **event}
    assert text_of(sandbox.turn("where")) == "agent"


def test_each_of_several_victims_is_told_of(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=96 * MIB)
    code = """
for number in range(3):
    subprocess.run([sys.executable, "-c", GREEDY])
    await killed(number + 1)
"""
    assert [event["scope"] for event in happened(sandbox.turn(code), "memory_kill")] == ["tool"] * 3
    for _ in range(3):
        sandbox.connection.wait_for(lambda said: said == {"kill": "tool_oom"})


def test_when_agent_and_tool_fill_the_sandbox_together_the_tool_goes(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=128 * MIB)
    code = """
hoard = bytearray(60 << 20)
said.append(str(subprocess.run([sys.executable, "-c", GREEDY]).returncode))
(kill,) = await killed()
said.append(" " + kill["scope"])
"""
    records = sandbox.turn(code)
    assert text_of(records) == "-9 tool"
    (event,) = happened(records, "memory_kill")
    assert event["limitBytes"] == 128 * MIB


def test_a_warning_comes_before_the_kill_and_once_a_turn(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=96 * MIB)
    code = """
for _ in range(2):
    before = len(session.memory_kills)
    subprocess.run([sys.executable, "-c", GREEDY])
    await killed(before + 1)
"""
    for _ in range(2):
        records = sandbox.turn(code)
        events = [record for record in records if (record.kind, record.type) == (Kind.TIMELINE, "lifecycle")]
        actions = [json.loads(event.payload)["action"] for event in events]
        assert actions == ["memory_warning", "memory_kill", "memory_kill"]
        (warning,) = happened(records, "memory_warning")
        assert warning["limitBytes"] == 96 * MIB
        assert 0 < warning["usedBytes"] <= 96 * MIB


# ---------------------------------------------------------------- agents that eat memory


def test_an_agent_that_eats_memory_ends_its_sandbox_with_the_details(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=96 * MIB)
    end = end_of(sandbox.turn("exec(GREEDY)"))
    assert (end["outcome"], end["code"]) == ("oom", "sandbox.oom")
    assert end["error"] == ("The agent used more memory than its limit of 96 MiB (peak 96 MiB) and was killed: python3")
    details = {name: end[name] for name in ("victim", "limitBytes", "peakBytes", "scope")}
    assert details["victim"]["name"] == "python3"
    assert (details["limitBytes"], details["scope"]) == (96 * MIB, "agent")
    sandbox.wait_until_gone()
    last = sandbox.records()[-1]
    closed = json.loads(last.payload)
    assert (last.kind, closed["cause"], closed["victim"]) == (Kind.CLOSED, "oom", details["victim"])


def test_a_program_that_eats_memory_fails_its_turn_as_oom_and_is_started_again(host: Host) -> None:
    sandbox = program(host, memory=96 * MIB)
    end = end_of(sandbox.turn("greedy"))
    assert (end["outcome"], end["code"], end["scope"]) == ("oom", "sandbox.oom", "agent")
    assert end["victim"]["name"].startswith("python")
    assert text_of(sandbox.turn("where")) == "agent"


def test_a_kill_of_an_earlier_turn_explains_no_later_end(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=96 * MIB)
    code = "child = os.fork()\nif child == 0: exec(GREEDY)\nos.waitpid(child, 0)\nawait killed()"
    (event,) = happened(sandbox.turn(code), "memory_kill")
    assert (event["scope"], event["victim"]) == ("agent", {"name": "a child of the agent"})
    sandbox.start_turn("Path('begun').touch(); time.sleep(99)")
    until((sandbox.workspace / "begun").exists, "the agent has begun")
    os.kill(min(sandbox.processes()), signal.SIGKILL)
    assert end_of(sandbox.settled())["code"] == "sandbox.killed"


# ---------------------------------------------------------------- other limits


def test_processor_time_is_limited(host: Host) -> None:
    if "cgroup-cpu" not in cgroup.controllers(host.hierarchies):
        pytest.skip("no cpu cgroup can be made here")
    sandbox = host.agent(OBEYS, cpu=10)
    statistics = group_of(host, sandbox, "cpu") / "cpu.stat"

    def throttled() -> int:
        return int(dict(line.split() for line in statistics.read_text().splitlines())["nr_throttled"])

    sandbox.start_turn("while True: pass")
    until(lambda: throttled() > 0, "the kernel has made the sandbox wait")


def test_a_fork_bomb_among_the_tools_stops_at_the_sandboxs_processes(host: Host) -> None:
    if "cgroup-pids" not in cgroup.controllers(host.hierarchies):
        pytest.skip("no pids cgroup can be made here")
    sandbox = host.agent(OBEYS, processes=24)
    bomb = "import os, time\nwhile True:\n    try: os.fork() or time.sleep(60)\n    except OSError: time.sleep(60)"
    sandbox.turn(f"subprocess.Popen([sys.executable, '-c', {bomb!r}])")
    pids = group_of(host, sandbox, "pids")
    until(lambda: int((pids / "pids.current").read_text()) == 24, "the bomb has met its limit")
    assert text_of(sandbox.turn("said.append('fine')")) == "fine"


def test_lower_limits_at_the_claim_hold_and_are_the_ones_told_of(host: Host) -> None:
    sandbox = host.sandbox(memory=256 * MIB)
    cgroup.create(host.hierarchies, sandbox.id, 64 * MIB, 64, 100)
    assert sandbox.claim({"agent.py": OBEYS}).get("ready")
    records = sandbox.turn('subprocess.run([sys.executable, "-c", GREEDY])\nawait killed()')
    (event,) = happened(records, "memory_kill")
    assert event["limitBytes"] == cgroup.tools_limit(64 * MIB) == 56 * MIB


# ---------------------------------------------------------------- nothing is left


def test_groups_left_behind_go_with_their_children_and_whatever_runs_in_them(host: Host) -> None:
    sandbox = host.agent(OBEYS, jailed=True)
    sandbox.turn("subprocess.Popen(['sleep', '60'])")
    groups = [made.parent / sandbox.id for made in host.hierarchies]
    assert all(group.is_dir() for group in groups)
    assert (group_of(host, sandbox) / "tools" / "cgroup.procs").read_text()
    assert cgroup.leftovers(host.hierarchies, set()) == {sandbox.id}
    assert asyncio.run(cgroup.remove(host.hierarchies, sandbox.id))
    assert not any(group.exists() for group in groups)
    sandbox.wait_until_gone()
    assert sandbox.processes() == set()


def test_without_cgroups_nothing_is_watched_and_all_works(host: Host) -> None:
    sandbox = host.agent(OBEYS, jailed=False)
    assert text_of(sandbox.turn("said.append(str(subprocess.run(['true']).returncode))")) == "0"
