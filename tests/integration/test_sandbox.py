"""Sandboxes as their supervisor sees them: turns in the journal, the keeper's commands, the ways an agent may end."""

from __future__ import annotations

import json
import os
import signal
import uuid
from typing import Any

import pytest

from sandbox.journal import Position
from sandbox.ledger import Outcome, reopen
from sandbox.protocol import Kind, Record
from tests.integration.sandboxes import BOUNDS, MIB, Host, Sandbox, Zygote, is_running, status_of, text_of, until

HELLO = """
async def turn(message, session):
    yield "hello "
    yield message.text
"""

OBEYS = '''
import asyncio, ctypes, os, resource, signal, subprocess, sys, threading, time
from pathlib import Path

async def turn(message, session):
    """Does what it is told."""
    scope = globals() | {"session": session, "said": []}
    exec(message.text, scope)
    for item in scope["said"]:
        yield item
'''

DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        Path("daemon").write_text("runs")
        time.sleep(1000)
    os._exit(0)
while not os.path.exists("daemon"):
    time.sleep(0.01)
"""


def shape(records: list[Record]) -> list[tuple[int, int, str, str]]:
    return [(record.seq, record.part, record.kind.name, record.type) for record in records]


def end_of(records: list[Record]) -> dict[str, Any]:
    """What the settling record says, without what every one says."""
    assert records[-1].kind is Kind.SETTLED
    end: dict[str, Any] = json.loads(records[-1].payload)
    assert end.pop("action") == "turn_settled"
    assert end.pop("turnId") == records[-1].turn
    return end


def cause_of(sandbox: Sandbox) -> str:
    """Why the sandbox was closed, as its last record says."""
    sandbox.wait_until_gone()
    last = sandbox.records()[-1]
    assert last.kind is Kind.CLOSED
    cause: str = json.loads(last.payload)["cause"]
    return cause


# ---------------------------------------------------------------- turns


def test_a_turns_events_are_journaled_densely_from_1(host: Host) -> None:
    sandbox = host.agent(HELLO)
    records = sandbox.turn("you", includePartialMessages=True)
    assert shape(records) == [
        (1, 0, "MESSAGE", "user"),
        (1, 1, "DELTA", "stream_event"),
        (1, 2, "DELTA", "stream_event"),
        (2, 0, "TIMELINE", "text"),
        (3, 0, "MESSAGE", "assistant"),
        (4, 0, "TIMELINE", "turn_complete"),
        (5, 0, "MESSAGE", "result"),
        (6, 0, "SETTLED", "lifecycle"),
    ]
    assert json.loads(records[0].payload) == {"type": "user", "content": "you"}
    assert text_of(records) == "hello you"
    assert end_of(records) == {"outcome": "completed"}


def test_the_second_turn_goes_on_where_the_first_ended(host: Host) -> None:
    sandbox = host.agent(HELLO)
    first, second = sandbox.turn("one"), sandbox.turn("two")
    assert first[-1].seq + 1 == second[0].seq
    assert [record.seq for record in first + second] == list(range(1, 13))


def test_a_resumed_session_is_numbered_on_from_its_last_event(host: Host) -> None:
    sandbox = host.sandbox()
    assert "ready" in sandbox.claim({"agent.py": HELLO}, last_seq=41)
    assert sandbox.turn("again")[0].seq == 42


def test_the_same_turn_is_launched_once_and_answered_alike(host: Host) -> None:
    sandbox = host.agent(HELLO)
    turn = str(uuid.uuid4())
    first = sandbox.start_turn("once", turn=turn)
    ended = sandbox.settled()
    again = sandbox.start_turn("once", turn=turn)
    assert first["after_seq"] == again["after_seq"] == 0
    sandbox.turn("a second one")
    assert [record for record in sandbox.records() if record.turn == turn] == ended


def test_a_turn_is_refused_while_another_is_open(host: Host) -> None:
    sandbox = host.agent("import asyncio\nasync def turn(message, session):\n    await session.interrupted.wait()\n")
    sandbox.start_turn("wait", turn=(first := str(uuid.uuid4())))
    refused = sandbox.start_turn("me too")
    assert refused["code"] == "turn.open"
    assert sandbox.connection.call("interrupt", turn=first)["interrupted"]


def test_a_sandbox_is_claimed_once(host: Host) -> None:
    sandbox = host.agent(HELLO)
    assert sandbox.connection.call("claim", session="other", epoch=2, last_seq=0, agent={})["code"] == "sandbox.taken"


def test_a_turn_before_the_claim_is_refused(host: Host) -> None:
    sandbox = host.sandbox()
    sandbox.wait_until_warm()
    assert sandbox.start_turn("too soon")["code"] == "sandbox.gone"


def test_a_command_of_a_newer_supervisor_is_refused_and_costs_nothing(host: Host) -> None:
    sandbox = host.agent(HELLO)
    assert sandbox.connection.call("levitate")["code"] == "command.unknown"
    assert text_of(sandbox.turn("you")) == "hello you"


def test_a_message_of_many_megabytes_arrives_whole(host: Host) -> None:
    sandbox = host.agent(
        "async def turn(message, session):\n    yield str(len(message.text))\n", max_journal_bytes=64 * MIB
    )
    assert text_of(sandbox.turn("é" * (6 * MIB))) == str(6 * MIB)


# ---------------------------------------------------------------- supervisors come and go


def test_a_new_supervisor_in_mid_turn_is_told_where_things_stand(host: Host) -> None:
    sandbox = host.agent(
        "import asyncio, os\n"
        "async def turn(message, session):\n"
        "    yield 'before'\n"
        "    while not os.path.exists('go'):\n"
        "        await asyncio.sleep(0.01)\n"
        "    yield ' and after'\n"
    )
    sandbox.start_turn("go on", turn=(turn := str(uuid.uuid4())), includePartialMessages=True)
    until(lambda: len(sandbox.records()) == 2, "the agent has begun")
    hello = sandbox.connect().hello
    assert hello == {
        "session": sandbox.session,
        "epoch": 1,
        "life": "ready",
        "last_seq": 1,
        "open_turn": turn,
        "pid": sandbox.keeper,
    }
    (sandbox.workspace / "go").touch()
    bell = sandbox.connection.wait_for(lambda said: said.get("open_turn") == "")
    assert bell["grew"] == sandbox.settled()[-1].seq
    assert text_of(sandbox.settled()) == "before and after"


def test_an_old_supervisors_connection_ends_when_a_new_one_comes(host: Host) -> None:
    sandbox = host.agent(HELLO)
    old, sandbox._connection = sandbox.connection, None
    sandbox.connect()
    with pytest.raises(EOFError):
        old.next()
    old.close()
    assert text_of(sandbox.turn("you")) == "hello you"


def test_a_supervisor_that_dies_in_mid_command_changes_nothing(host: Host) -> None:
    sandbox = host.agent(HELLO)
    sandbox.connection.send(b'{"cmd": "turn", "re": 7, "turn"')
    sandbox.connect()
    assert text_of(sandbox.turn("you")) == "hello you"


# ---------------------------------------------------------------- asking to stop


@pytest.mark.parametrize("how", ["await session.interrupted.wait()", "await asyncio.sleep(1000)"])
def test_an_interrupted_turn_keeps_what_was_said_and_the_sandbox(host: Host, how: str) -> None:
    sandbox = host.agent(
        "import asyncio\n"
        f"async def turn(message, session):\n    yield 'so far'\n    if message.text == 'wait': {how}\n",
        kill_timeout_s=5.0,
    )
    sandbox.start_turn("wait", includePartialMessages=True)
    until(lambda: len(sandbox.records()) == 2, "the agent has begun")
    assert sandbox.interrupt()
    records = sandbox.settled()
    assert end_of(records) == {"outcome": "interrupted"}
    assert text_of(records) == "so far"
    assert end_of(sandbox.turn("again")) == {"outcome": "completed"}


def test_an_interrupt_without_a_turn_does_nothing(host: Host) -> None:
    assert not host.agent(HELLO).interrupt()


def test_a_turn_past_its_timeout_is_interrupted(host: Host) -> None:
    sandbox = host.agent("import asyncio\nasync def turn(message, session):\n    await session.interrupted.wait()\n")
    end = end_of(sandbox.turn("wait", timeout_s=0.1))
    assert (end["outcome"], end["code"]) == ("timeout", "turn.timeout")
    assert sandbox.connect().hello["life"] == "ready"


def test_an_agent_deaf_to_everything_is_killed_after_its_timeout(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    end = end_of(sandbox.turn(code, timeout_s=0.1))
    assert (end["outcome"], end["code"]) == ("timeout", "turn.timeout")
    assert cause_of(sandbox) == "timeout"
    assert "did not end in time" in sandbox.log_text()


def test_an_interrupt_that_is_ignored_ends_the_sandbox_within_the_kill_timeout(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    sandbox.start_turn("Path('begun').touch()\nwhile True: time.sleep(1)")
    until((sandbox.workspace / "begun").exists, "the agent has begun")
    sandbox.interrupt()
    assert end_of(sandbox.settled())["outcome"] == "interrupted"
    assert cause_of(sandbox) == "interrupted"


def test_ending_a_sandbox_in_mid_turn_settles_the_turn_as_interrupted(host: Host) -> None:
    sandbox = host.agent(
        "import asyncio\nasync def turn(message, session):\n    yield 'a'\n    await asyncio.sleep(99)\n"
    )
    sandbox.start_turn("wait", includePartialMessages=True)
    until(lambda: len(sandbox.records()) == 2, "the agent has begun")
    sandbox.end()
    assert end_of(sandbox.settled()) == {"outcome": "interrupted"}
    assert cause_of(sandbox) == "ended"


def test_a_warm_sandbox_ends_when_asked(host: Host) -> None:
    sandbox = host.sandbox()
    sandbox.wait_until_warm()
    sandbox.end()
    assert not sandbox.records()


# ---------------------------------------------------------------- ends of an agent's own making


@pytest.mark.parametrize(
    ("code", "cause", "error"),
    [
        ("os._exit(7)", "exited", "The agent's process exited with code 7."),
        ("os._exit(0)", "exited", "The agent's process exited with code 0."),
        ("ctypes.string_at(0)", "killed", "The sandbox was killed by SIGSEGV."),
    ],
)
def test_an_agent_that_ends_itself_fails_its_turn_and_names_the_cause(
    host: Host, code: str, cause: str, error: str
) -> None:
    sandbox = host.agent(OBEYS)
    end = end_of(sandbox.turn(code))
    assert (end["outcome"], end["error"]) == ("failed", error)
    assert cause_of(sandbox) == cause


def test_an_agent_killed_from_outside_fails_its_turn(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    sandbox.start_turn("Path('begun').touch(); time.sleep(99)")
    until((sandbox.workspace / "begun").exists, "the agent has begun")
    for pid in sandbox.processes():
        os.kill(pid, signal.SIGKILL)
    assert end_of(sandbox.settled())["error"] == "The sandbox was killed by SIGKILL."
    assert cause_of(sandbox) == "killed"


def test_an_agent_cannot_kill_its_bridge_by_signals_from_inside(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    if not sandbox.has_namespaces:
        pytest.skip("this host gives sandboxes no pid namespace")
    code = "subprocess.run(['sh', '-c', 'kill -9 1'])\nsaid.append('still here')"
    assert text_of(sandbox.turn(code)) == "still here"


@pytest.mark.parametrize("jailed", [True, False])
def test_a_daemon_does_not_outlive_its_sandbox(host: Host, *, jailed: bool) -> None:
    sandbox = host.agent(OBEYS, jailed=jailed)
    assert end_of(sandbox.turn(DAEMON))["outcome"] == "completed"
    until(lambda: len(sandbox.processes()) == 2, "the bridge and the daemon are left")
    sandbox.end()
    assert sandbox.processes() == set()


def test_a_daemon_that_holds_the_keepers_socket_does_not_keep_the_keeper(host: Host) -> None:
    sandbox = host.agent(OBEYS, jailed=False)
    flood = """
if os.fork() == 0:
    while not os.path.exists("go"):
        time.sleep(0.01)
    while True:
        try: os.write(3, b"M{}\\n" * 1000)
        except BlockingIOError: time.sleep(0.001)
"""
    sandbox.turn(flood)
    (sandbox.workspace / "go").touch()
    until(lambda: "malformed" in sandbox.log_text(), "the flood has begun")
    sandbox.end()
    assert sandbox.processes() == set()


def test_too_much_memory_is_an_oom(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=64 * MIB)
    if not sandbox.has_memory_limit:
        pytest.skip("no memory cgroup can be made here")
    end = end_of(sandbox.turn("hoard = [bytearray(1 << 20) for _ in range(200)]"))
    assert (end["outcome"], end["code"]) == ("oom", "sandbox.oom")
    assert cause_of(sandbox) == "oom"


def test_a_tool_killed_for_memory_leaves_the_session_and_explains_no_later_end(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=96 * MIB)
    if not sandbox.has_memory_limit:
        pytest.skip("no memory cgroup can be made here")
    tool = "subprocess.run([sys.executable, '-c', 'x = bytearray(200 << 20)']).returncode"
    assert text_of(sandbox.turn(f"said.append(str({tool}))")) == "-9"
    sandbox.turn("os._exit(3)")
    assert cause_of(sandbox) == "exited"


def test_without_a_cgroup_too_much_memory_is_an_ordinary_failure(host: Host) -> None:
    sandbox = host.agent(OBEYS, memory=256 * MIB, jailed=False)
    end = end_of(sandbox.turn("hoard = bytearray(400 << 20)"))
    assert end == {"outcome": "failed", "error": "MemoryError", "code": "agent.failed"}
    assert end_of(sandbox.turn("said.append('fine')"))["outcome"] == "completed"


def test_processes_are_limited(host: Host) -> None:
    sandbox = host.agent(OBEYS, processes=16)
    if not sandbox.has_process_limit:
        pytest.skip("this host lets us count neither a cgroup's processes nor a user's")
    code = """
started = []
try:
    for _ in range(64):
        started.append(subprocess.Popen(["sleep", "60"]))
except OSError as error:
    said.append(type(error).__name__)
for process in started:
    process.kill()
    process.wait()
"""
    assert text_of(sandbox.turn(code)) == "BlockingIOError"
    assert text_of(sandbox.turn("said.append('fine')")) == "fine"


# ---------------------------------------------------------------- the keeper's own end


def test_a_daemon_does_not_outlive_its_keeper_either(host: Host) -> None:
    sandbox = host.agent(OBEYS, jailed=False)
    assert end_of(sandbox.turn(DAEMON))["outcome"] == "completed"
    until(lambda: len(sandbox.processes()) == 2, "the bridge and the daemon are left")
    os.kill(sandbox.keeper, signal.SIGKILL)
    until(lambda: sandbox.processes() == set(), "the zygote has killed what was left")


def test_a_killed_keeper_takes_its_jail_along_and_its_ledger_can_be_closed(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    sandbox.start_turn("Path('begun').touch(); time.sleep(99)")
    until((sandbox.workspace / "begun").exists, "the agent has begun")
    inside = sandbox.processes()
    assert inside
    os.kill(sandbox.keeper, signal.SIGKILL)
    until(lambda: not any(map(is_running, inside)), "the jail has died with its keeper", within_s=1.0)
    _close_ledger(sandbox)
    assert [(record.seq, record.kind) for record in sandbox.saved()] == [
        (1, Kind.MESSAGE),
        (2, Kind.TIMELINE),
        (3, Kind.SETTLED),
        (4, Kind.CLOSED),
    ]
    again = reopen(sandbox.journal, segment_bytes=MIB, max_bytes=MIB)
    assert (again.turn, again.closed, again.writer.last) == ("", True, Position(4, 0))
    again.writer.close()


def test_a_torn_last_record_is_cut_off(host: Host) -> None:
    sandbox = host.agent(HELLO)
    whole = sandbox.turn("you")
    os.kill(sandbox.keeper, signal.SIGKILL)
    sandbox.wait_until_gone()
    segment = max(sandbox.journal.glob("*.seg"))
    os.truncate(segment, segment.stat().st_size - 3)
    _close_ledger(sandbox)
    records = sandbox.saved()
    assert records[: len(whole) - 1] == whole[:-1]
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.kind for record in records[-3:]] == [Kind.TIMELINE, Kind.SETTLED, Kind.CLOSED]


def _close_ledger(sandbox: Sandbox) -> None:
    book = reopen(sandbox.journal, segment_bytes=int(BOUNDS["segment_bytes"]), max_bytes=MIB)
    assert book.turn
    book.settle(Outcome("failed", "The sandbox's keeper died.", "keeper.died"))
    book.close("killed")
    book.writer.flush()
    book.writer.close()


def test_a_zygotes_death_leaves_its_sandboxes_alone() -> None:
    with Zygote() as zygote, Host(zygote) as host:
        sandbox = host.agent(HELLO)
        zygote.process.kill()
        zygote.process.wait()
        assert text_of(sandbox.turn("you")) == "hello you"


# ---------------------------------------------------------------- the jail


def test_an_agents_environment_is_an_allow_list_and_its_own(host: Host) -> None:
    sandbox = host.sandbox()
    source = "import json, os\nasync def turn(message, session):\n    yield json.dumps(dict(os.environ))\n"
    assert "ready" in sandbox.claim({"agent.py": source}, env={"COLOUR": "grün"})
    environment = json.loads(text_of(sandbox.turn("?")))
    assert environment.pop("PATH")
    folder = sandbox.inside
    assert environment == {"HOME": folder, "PWD": folder, "LANG": "C.UTF-8", "TMPDIR": "/tmp", "COLOUR": "grün"}


def test_an_agent_starts_with_no_descriptor_of_its_host(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = """
kinds = set()
for name in os.listdir("/proc/self/fd"):
    try:
        kinds.add(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
    except FileNotFoundError:
        continue  # the one the list was read with
said.append(" ".join(sorted(kinds)))
"""
    # Its outputs are pipes; the sockets are the keeper's and the event loop's own pair, with its epoll.
    assert text_of(sandbox.turn(code)) == "/dev/null anon_inode pipe socket"
    child = "said.append(subprocess.run(['ls', '/proc/self/fd'], stdout=subprocess.PIPE, text=True).stdout)"
    assert text_of(sandbox.turn(child)).split() == ["0", "1", "2", "3"]  # 3: ls's own, of the folder it lists


def test_a_sandbox_runs_as_a_user_and_in_namespaces_of_its_own(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    if not (sandbox.has_namespaces and sandbox.uid):
        pytest.skip(f"this host allows {sandbox.level}")
    (inside,) = sandbox.processes()
    assert status_of(inside, "Uid") == [str(sandbox.uid)] * 4
    assert status_of(inside, "Groups") == []
    assert int(status_of(inside, "CapEff")[0], 16) == 0
    for name in ("pid", "mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{inside}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
    assert text_of(sandbox.turn("said.append(str(os.getpid()))")) == "1"


def test_a_sandbox_can_gain_no_privileges(host: Host) -> None:
    sandbox = host.agent(HELLO)
    (inside,) = sandbox.processes()
    assert status_of(inside, "NoNewPrivs") == ["1"]


def test_a_sandbox_cannot_see_another_ones_files(host: Host) -> None:
    if host.zygote.level == "none":
        pytest.skip("without isolation, sandboxes are not kept apart")
    sandbox, other = host.agent(OBEYS), host.agent(HELLO)
    for path in (other.workspace / "agent.py", sandbox.folder / "session.json", other.folder / "logs"):
        code = (
            f"try: open({str(path)!r}); said.append('read')\nexcept OSError as error: said.append(type(error).__name__)"
        )
        assert text_of(sandbox.turn(code)) in ("PermissionError", "FileNotFoundError"), path


def test_a_sandbox_has_a_tmp_of_its_own(host: Host) -> None:
    sandbox, other = host.agent(OBEYS), host.agent(OBEYS)
    if not sandbox.has_namespaces:
        pytest.skip("this host gives sandboxes no mount namespace")
    path = f"/tmp/{sandbox.id}"
    sandbox.turn(f"Path({path!r}).write_text('secret')")
    assert text_of(other.turn(f"said.append(str(os.path.exists({path!r})))")) == "False"
    assert not os.path.exists(path)


def test_what_an_agent_starts_can_be_interrupted_by_signals(host: Host) -> None:
    sandbox = host.agent(OBEYS)
    code = "p = subprocess.Popen(['sleep', '60']); p.send_signal(signal.SIGINT); said.append(str(p.wait()))"
    assert text_of(sandbox.turn(code)) == "-2"
