"""The ways of running an agent: what each accepts, and what its author is told when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from sandbox.protocol import Kind, Record
from tests.integration.sandboxes import BOUNDS, MIB, Host, Sandbox, text_of, until


def made(host: Host, files: Mapping[str, str], runtime: str, *entry: str, **fields: Any) -> Sandbox:
    sandbox = host.sandbox(kill_timeout_s=5.0)
    answer = sandbox.claim(files, runtime, entry=list(entry), **fields)
    assert answer.get("ready"), answer
    return sandbox


def objects(records: list[Record], type_: str) -> list[dict[str, Any]]:
    found = [json.loads(record.payload) for record in records if record.kind in (Kind.MESSAGE, Kind.DELTA)]
    return [message for message in found if message.get("type") == type_]


def deltas_of(records: list[Record]) -> list[str]:
    return [message["event"]["delta"]["text"] for message in objects(records, "stream_event")]


def end_of(records: list[Record]) -> tuple[str, str, str]:
    end = json.loads(records[-1].payload)
    return end["outcome"], end.get("code", ""), end.get("error", "")


COMPLETED = ("completed", "", "")

# ---------------------------------------------------------------- python


@pytest.mark.parametrize(
    "source",
    [
        "async def turn(message, session):\n    yield 'hello '\n    yield message.text\n",
        "async def turn(message, session):\n    return 'hello ' + message.text\n",
        "def turn(message, session):\n    yield 'hello '\n    yield message.text\n",
        "def turn(message, session):\n    return 'hello ' + message.text\n",
        "class Agent:\n    def __call__(self, message, _):\n        return f'hello {message.text}'\nturn = Agent()",
    ],
    ids=["async generator", "coroutine", "generator", "function", "callable object"],
)
def test_an_agent_may_be_any_kind_of_function(host: Host, source: str) -> None:
    records = host.agent(source).turn("you")
    assert text_of(records) == "hello you"
    assert end_of(records) == COMPLETED
    (result,) = objects(records, "result")
    assert (result["subtype"], result["result"], result["num_turns"]) == ("success", "hello you", 1)


def test_an_agent_may_say_nothing(host: Host) -> None:
    records = host.agent("def turn(message, session):\n    pass\n").turn("you")
    assert [record.type for record in records] == ["user", "turn_complete", "result", "lifecycle"]


def test_pieces_of_text_become_one_message_before_the_next_object(host: Host) -> None:
    sandbox = host.agent(
        "async def turn(message, session):\n"
        "    yield 'a'\n    yield 'b'\n    yield ''\n"
        "    yield {'type': 'user', 'message': {'role': 'user', 'content': [\n"
        "        {'type': 'tool_result', 'tool_use_id': 't', 'content': 'x', 'is_error': False}]}}\n"
        "    yield 'c'\n"
        "    yield {'type': 'result', 'result': 'own', 'num_turns': 3, 'usage': {'input_tokens': 5}}\n"
    )
    records = sandbox.turn("go", includePartialMessages=True)
    assert deltas_of(records) == ["a", "b", "c"]
    assert [record.type for record in records if record.kind is not Kind.DELTA] == [
        *["user", "text", "assistant", "tool_result", "tool", "text", "assistant"],
        *["turn_complete", "result", "lifecycle"],
    ]
    assert [result["result"] for result in objects(records, "result")] == ["own"]
    assert json.loads(records[-1].payload)["usage"] == {"input_tokens": 5}


def test_a_client_that_asks_for_no_partials_gets_none(host: Host) -> None:
    sandbox = host.agent("def turn(message, session):\n    yield 'a'\n    yield 'b'\n")
    assert deltas_of(sandbox.turn("go")) == []


def test_text_of_any_length_is_cut_into_messages_that_fit(host: Host) -> None:
    sandbox = host.agent("def turn(message, session):\n    yield '𝄞' * 200_000\n")
    records = sandbox.turn("go", includePartialMessages=True)
    assert end_of(records) == COMPLETED
    assert text_of(records) == "".join(deltas_of(records)) == "𝄞" * 200_000
    assert max(len(record.payload) for record in records) <= BOUNDS["max_frame"]


def test_memory_of_an_agent_lasts_from_turn_to_turn(host: Host) -> None:
    sandbox = host.agent(
        "count = 0\n"
        "async def turn(message, session):\n"
        "    global count\n"
        "    count += 1\n"
        "    session.state['seen'] = session.state.get('seen', '') + message.text\n"
        "    roles = ' '.join(entry['role'] for entry in session.history)\n"
        "    yield f'{count} {session.turn} {session.state[\"seen\"]} [{roles}]'\n"
    )
    assert text_of(sandbox.turn("a")) == "1 1 a []"
    assert text_of(sandbox.turn("b")) == "2 2 ab [user assistant]"
    assert text_of(sandbox.turn("c")) == "3 3 abc [user assistant user assistant]"


def test_an_agent_is_told_its_session(host: Host) -> None:
    source = (
        "import os\n"
        "async def turn(message, session):\n"
        "    here = session.workspace == __import__('pathlib').Path(os.getcwd())\n"
        "    yield f'{session.id} {session.turn} {here} {session.settings} {message.options} {message.content}'\n"
    )
    sandbox = made(host, {"agent.py": source}, "python", turns=4, settings={"model": "m"})
    blocks = [{"type": "text", "text": "hi"}]
    assert text_of(sandbox.turn(blocks, effort="high")) == (
        f"{sandbox.session} 5 True {{'model': 'm'}} {{'effort': 'high'}} {blocks}"
    )


def test_an_entry_may_name_another_module_and_function(host: Host) -> None:
    files = {"my/__init__.py": "", "my/agents.py": "async def answer(message, session):\n    yield 'mine'\n"}
    assert text_of(made(host, files, "python", "my.agents:answer").turn("?")) == "mine"


@pytest.mark.parametrize(
    ("source", "code", "error"),
    [
        ("import no_such_module", "agent.import_failed", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def turn(", "agent.import_failed", "SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "agent.import_failed", "SystemExit: 3"),
        ("x = 1", "agent.no_entry", "has no function turn(message, session)"),
        ("turn = 'text'", "agent.no_entry", "has no function turn(message, session)"),
    ],
)
def test_an_agent_that_cannot_be_loaded_fails_its_claim_and_says_why(
    host: Host, source: str, code: str, error: str
) -> None:
    sandbox = host.sandbox()
    answer = sandbox.claim({"agent.py": source})
    assert answer["code"] == code
    assert error in answer["error"]
    sandbox.wait_until_gone()
    if code == "agent.import_failed":
        assert "Traceback" in sandbox.log_text()


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("raise ValueError('no such luck')", "agent.failed", "ValueError: no such luck"),
        ("raise SystemExit('enough')", "agent.failed", "SystemExit: enough"),
        ("import asyncio; raise asyncio.CancelledError", "agent.failed", "the agent cancelled its own turn"),
        ("raise ValueError('x' * 2_000_000)", "agent.failed", "ValueError: xxx"),
        ("yield 7", "agent.bad_yield", "yielded a int; yield str for text or dict"),
        ("yield {'a': object()}", "agent.not_json", "not JSON: Object of type object is not JSON serializable"),
        ("yield {'a': float('nan')}", "agent.not_json", "not JSON"),
        ("yield {'a': 10 ** 5000}", "agent.not_json", "not JSON"),
        ("x = {}; x['x'] = x; yield x", "agent.not_json", "Circular reference"),
        ("x = []\n    for _ in range(200): x = [x]\n    yield {'x': x}", "agent.not_json", "nested deeper than 100"),
        ("yield {'x': [0] * 150_000}", "agent.not_json", "more than 100000 values"),
        ("yield {'x': 'y' * 2_000_000}", "agent.message_too_large", "Write large results to a file"),
    ],
)
def test_an_agent_that_fails_ends_its_turn_with_the_reason_and_may_go_on(
    host: Host, body: str, code: str, error: str
) -> None:
    sandbox = host.agent(
        f"async def turn(message, session):\n    yield 'first'\n    if message.text == 'fine': return\n    {body}\n"
    )
    outcome, said_code, said = end_of(sandbox.turn("fail"))
    assert (outcome, said_code) == ("failed", code)
    assert error in said
    assert len(said) <= 10_000
    assert end_of(sandbox.turn("fine")) == COMPLETED


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise ValueError('no luck')", "ValueError: no luck"),
        ("raise SystemExit", "the agent raised SystemExit"),
        ("yield 7", "the agent yielded a int; yield str for text or dict for a message object"),
    ],
)
def test_an_agent_in_a_thread_fails_like_any_other(host: Host, body: str, error: str) -> None:
    records = host.agent(f"def turn(message, session):\n    yield 'first'\n    {body}\n").turn("fail")
    assert end_of(records)[::2] == ("failed", error)


def test_prints_and_the_traceback_are_in_the_logs(host: Host) -> None:
    sandbox = host.agent("async def turn(message, session):\n    print('debug')\n    raise KeyError('k')\n    yield\n")
    sandbox.turn("fail")
    assert "debug" in sandbox.log_text()
    assert "KeyError: 'k'" in sandbox.log_text()


def test_an_interrupted_generator_in_a_thread_is_closed(host: Host) -> None:
    sandbox = host.agent(
        "import pathlib, time\n"
        "def turn(message, session):\n"
        "    try:\n"
        "        while True:\n"
        "            yield 'tick'\n"
        "            time.sleep(0.01)\n"
        "    finally:\n"
        "        pathlib.Path('closed').touch()\n",
        kill_timeout_s=5.0,
    )
    sandbox.start_turn("go", includePartialMessages=True)
    until(lambda: len(sandbox.records()) > 3, "the agent has begun")
    sandbox.interrupt()
    assert end_of(sandbox.settled())[0] == "interrupted"
    until((sandbox.workspace / "closed").exists, "the generator is closed")


def test_an_agent_that_never_waits_can_be_interrupted(host: Host) -> None:
    sandbox = host.agent("async def turn(message, session):\n    while True:\n        yield 'x'\n", kill_timeout_s=5.0)
    sandbox.start_turn("go")
    assert sandbox.interrupt()
    assert end_of(sandbox.settled())[0] == "interrupted"
    assert sandbox.connect().hello["life"] == "ready"


def test_an_interrupt_in_mid_frame_spoils_nothing(host: Host) -> None:
    """The keeper does not read while its journal is full, so the cancelled sender is in the middle of a frame."""
    sandbox = host.agent(
        "large = {'type': 'assistant', 'message': {'content': [{'type': 'text', 'text': 'x' * 700_000}]}}\n"
        "async def turn(message, session):\n"
        "    while message.text == 'flood':\n"
        "        yield large\n"
        "    yield 'fine'\n",
        kill_timeout_s=20.0,
    )
    sandbox.start_turn("flood")
    until(lambda: sum(file.stat().st_size for file in sandbox.journal.iterdir()) > 10 * MIB, "the journal is full")
    sandbox.interrupt()

    def settled() -> bool:
        sandbox.connection.tell("acked", seq=max(record.seq for record in sandbox.records()))
        return sandbox.records()[-1].kind is Kind.SETTLED

    until(settled, "the turn is settled")
    assert end_of(sandbox.records())[0] == "interrupted"
    assert "malformed" not in sandbox.log_text()
    assert text_of(sandbox.turn("fine")) == "fine"


# ---------------------------------------------------------------- command

SHELL_AGENT = """#!/bin/sh
while read -r line; do
  case "$line" in
    *'"turn"'*exit*)  echo 'dying' >&2; exit 7 ;;
    *'"turn"'*error*) echo '{"type":"done","error":"it went wrong"}' ;;
    *'"turn"'*wait*)  echo '{"type":"delta","text":"waiting"}' ;;
    *'"turn"'*chat*)  echo 'no JSON' ;;
    *'"turn"'*leave*) sleep 60 & exit 0 ;;
    *'"turn"'*close*) exec >&- ; sleep 60 ;;
    *'"interrupt"'*)  echo '{"type":"done"}' ;;
    *)                echo '{"type":"delta","text":"one "}'
                      echo '{"type":"delta","text":"two"}'
                      echo '{"type":"done"}' ;;
  esac
done
"""

PYTHON_AGENT = """#!/usr/bin/env python3
import json, sys
for number, line in enumerate(sys.stdin, 1):
    asked = json.loads(line)
    print(json.dumps({"type": "assistant", "message": {"role": "assistant", "content": [
        {"type": "text", "text": f"{number} {asked['turn']} {asked['content']} {asked['session']['id']}"}]}}))
    print(json.dumps({"type": "done"}), flush=True)
"""


@pytest.fixture
def program(host: Host) -> Sandbox:
    return made(host, {"agent": SHELL_AGENT}, "command", "./agent")


def test_a_program_answers_in_deltas_and_messages(host: Host, program: Sandbox) -> None:
    records = program.turn("hello", includePartialMessages=True)
    assert (deltas_of(records), text_of(records), end_of(records)) == (["one ", "two"], "one two", COMPLETED)
    python = made(host, {"agent": PYTHON_AGENT}, "command", "./agent", turns=2)
    assert text_of(python.turn("é")) == f"1 3 é {python.session}"
    assert text_of(python.turn("b")) == f"2 4 b {python.session}"


@pytest.mark.parametrize(
    ("content", "code", "error"),
    [
        ("error", "agent.failed", "it went wrong"),
        ("exit", "agent.exited", "./agent exited with code 7 during the turn"),
        ("leave", "agent.exited", "./agent exited with code 0 during the turn"),
        ("close", "agent.exited", "./agent closed its stdout during the turn"),
        ("chat", "agent.not_json", "./agent wrote a line that is not a JSON object: no JSON"),
    ],
)
def test_a_program_that_fails_is_there_again_for_the_next_turn(
    program: Sandbox, content: str, code: str, error: str
) -> None:
    assert end_of(program.turn(content)) == ("failed", code, error)
    assert text_of(program.turn("hello")) == "one two"


def test_a_program_is_told_of_an_interrupt(program: Sandbox) -> None:
    program.start_turn("wait", includePartialMessages=True)
    until(lambda: len(program.records()) == 2, "the program has begun")
    (inside,) = program.processes() - {min(program.processes())}
    program.interrupt()
    records = program.settled()
    assert (end_of(records)[0], text_of(records)) == ("interrupted", "waiting")
    assert text_of(program.turn("hello")) == "one two"
    assert inside in program.processes()  # it answered in time, so it is still the same one


def test_a_program_deaf_to_interrupts_is_replaced(host: Host) -> None:
    sandbox = made(
        host,
        {"agent": '#!/bin/sh\nread -r line\necho \'{"type":"delta","text":"x"}\'\nsleep 99\n'},
        "command",
        "./agent",
    )
    sandbox.start_turn("wait", includePartialMessages=True)
    until(lambda: len(sandbox.records()) == 2, "the program has begun")
    before = sandbox.processes()
    sandbox.interrupt()
    assert end_of(sandbox.settled())[0] == "interrupted"
    until(lambda: len(sandbox.processes()) == 1, "the program and its sleep are killed")
    sandbox.start_turn("again", includePartialMessages=True)
    until(lambda: len(sandbox.processes()) > 1, "another is started")
    assert len(sandbox.processes() & before) == 1


def test_a_program_that_writes_an_endless_line_fails_its_turn(host: Host) -> None:
    sandbox = made(host, {"agent": "#!/bin/sh\nread -r line\ntr '\\0' x </dev/zero\n"}, "command", "./agent")
    assert end_of(sandbox.turn("go"))[:2] == ("failed", "agent.message_too_large")


def test_stderr_of_a_program_is_logged(program: Sandbox) -> None:
    program.turn("exit")
    assert [entry["level"] for entry in program.logs() if entry["text"] == "dying"] == ["stderr"]


def test_a_program_that_is_not_there_fails_the_claim(host: Host) -> None:
    answer = host.sandbox().claim({"README": ""}, "command", entry=["./agent"])
    assert (answer["code"], answer["error"]) == (
        "agent.not_started",
        "./agent could not be started: No such file or directory",
    )


# ---------------------------------------------------------------- echo, claude, startup.sh


def test_echo_gives_back_text_and_blocks(host: Host) -> None:
    sandbox = made(host, {}, "echo")
    assert text_of(sandbox.turn("say this")) == "say this"
    assert text_of(sandbox.turn([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])) == "ab"


def test_the_mock_of_claude_says_what_clients_of_old_expect(host: Host) -> None:
    sandbox = made(host, {"CLAUDE.md": "Be kind."}, "claude", real_sdk=False)
    first = sandbox.turn("one", includePartialMessages=True)
    assert text_of(first) == "".join(deltas_of(first)) == "[Mock] Turn 1 | History: one"
    assert text_of(sandbox.turn("two")) == "[Resumed session] [Mock] Turn 2 | History: one | two"
    assert objects(first, "result")[0]["subtype"] == "success"


@pytest.mark.parametrize(
    ("env", "code", "error"),
    [
        ({}, "claude.no_key", "set ANTHROPIC_API_KEY"),
        ({"ANTHROPIC_API_KEY": "k"}, "claude.not_available", "does not run the Claude Agent SDK yet"),
    ],
)
def test_claude_without_what_it_needs_says_so_at_the_first_turn(
    host: Host, env: dict[str, str], code: str, error: str
) -> None:
    outcome, said_code, said = end_of(made(host, {"CLAUDE.md": ""}, "claude", env=env).turn("hello"))
    assert (outcome, said_code) == ("failed", code)
    assert error in said


def test_startup_runs_before_the_agent_is_loaded(host: Host) -> None:
    files = {
        "startup.sh": "echo made > made.txt\n",
        "agent.py": "text = open('made.txt').read()\ndef turn(m, s): return text\n",
    }
    assert text_of(made(host, files, "python").turn("?")) == "made\n"


def test_a_startup_that_fails_fails_the_claim(host: Host) -> None:
    sandbox = host.sandbox()
    answer = sandbox.claim({"startup.sh": "echo no luck >&2\nexit 3\n", "agent.py": "def turn(m, s): pass\n"})
    assert (answer["code"], "startup.sh ended with code 3" in answer["error"]) == ("agent.startup", True)
    sandbox.wait_until_gone()
    assert "no luck" in sandbox.log_text()
