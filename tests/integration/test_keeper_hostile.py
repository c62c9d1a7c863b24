"""What comes from inside a jail never harms its keeper: the journal stays dense and the next turn works.

The agent of these tests runs the code it is sent, and holds what no agent should touch: descriptor 3, its bridge's end
of the keeper's socket.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from sandbox.journal import Position, Reader
from sandbox.protocol import MAX_JSON_VALUES, Kind, Record
from tests.integration.sandboxes import BOUNDS, KIB, MIB, Host, Sandbox, status_of, until

HOSTILE = '''
import fcntl, json, os, select, struct, termios, time

def send(data):
    """Writes to the keeper, whatever it is."""
    view = memoryview(data)
    while view:
        select.select([], [3], [])
        view = view[os.write(3, view):]

def drain():
    """Waits until the keeper has taken everything."""
    while struct.unpack("i", fcntl.ioctl(3, termios.TIOCOUTQ, bytes(4)))[0]:
        time.sleep(0)

def frame(text):
    """A message frame in plain UTF-8, as no honest bridge sends it."""
    message = {"type": "assistant", "message": {"role": "assistant", "content": [{"type": "text", "text": text}]}}
    return b"M" + json.dumps(message, ensure_ascii=False).encode() + b"\\n"

async def turn(message, session):
    said = []
    exec(message.text, globals() | {"session": session, "say": said.append})
    for item in said:
        yield item
'''


@pytest.fixture
def hostile(host: Host) -> Sandbox:
    return host.agent(HOSTILE)


def texts(records: list[Record]) -> list[str]:
    messages = [json.loads(record.payload) for record in records if record.type == "assistant"]
    return [block["text"] for message in messages for block in message["message"]["content"]]


def assert_unharmed(sandbox: Sandbox) -> None:
    """The journal is dense and readable JSON, and another turn works."""
    assert texts(sandbox.turn("say('still here')"))[-1] == "still here"
    saved = sandbox.saved()
    assert [record.seq for record in saved] == list(range(1, len(saved) + 1))
    for record in sandbox.records():
        assert record.payload.isascii()
        json.loads(record.payload, parse_constant=lambda name: pytest.fail(f"{name} in the journal"))


def memory_of(pid: int, field: str = "VmRSS") -> int:
    return int(status_of(pid, field)[0]) * KIB


# ---------------------------------------------------------------- malformed frames


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("send(b'\\n\\n\\n')", "no JSON object"),
        ("send(b'M\\n')", "no JSON object"),
        ("send(b'M{\"type\":\\n')", "malformed frame: not JSON"),
        ('send(b\'M{"a": "\\xff\\xfe"}\\n\')', "UnicodeDecodeError"),
        ('send(b\'M{"a": "\\xed\\xa0\\x80"}\\n\')', "UnicodeDecodeError"),
        ('send(b\'M{"a": "\\xf0\\x9f"}\\n\')', "UnicodeDecodeError"),
        ('send(b\'M{"a": "\\x00"}\\n\')', "JSONDecodeError"),
        ("send(b'M[1]\\n')", "no JSON object"),
        ("send(b'M\"text\"\\n')", "no JSON object"),
        ("send(b'M{\"a\": NaN}\\n')", "NaN is not JSON"),
        ("send(b'M{\"a\": -Infinity}\\n')", "-Infinity is not JSON"),
        ("send(b'M{\"a\": 1e999}\\n')", "a number too large"),
        ("send(b'M{\"a\": ' + b'9' * 5000 + b'}\\n')", "ValueError"),
        ("send(b'M{\"a\": ' + b'[' * 101 + b']' * 101 + b'}\\n')", "nested deeper"),
        ("send(b'M{\"a\": ' + b'[' * 500_000 + b'\\n')", "malformed frame"),
        ("send(b'M{\"a\": [' + b'[],' * 120_000 + b'0]}\\n')", f"more than {MAX_JSON_VALUES} values"),
        ("send('M{\"a\": \"'.encode() + 'é'.encode() * 300_000 + b'\"}\\n')", "bytes once written in ASCII"),
        ("send(b'?{}\\n')", "a frame b'?' that has no place now"),
        ("send(b'\\x00{}\\n')", "has no place now"),
        ("send(b'J{}\\nR{}\\nX{}\\nT{}\\n')", "a frame b'T' that has no place now"),
        ('send(b\'E{"turn": 99}\\nE{"turn": null}\\nE{}\\n\')', "a frame b'E' that has no place now"),
    ],
)
def test_a_malformed_frame_is_dropped_and_noted(hostile: Sandbox, code: str, complaint: str) -> None:
    assert texts(hostile.turn(f"{code}\nsay('after it')")) == ["after it"]
    assert complaint in hostile.log_text()
    assert_unharmed(hostile)


def test_a_line_of_100_mb_is_skipped_in_constant_memory(hostile: Sandbox) -> None:
    before = memory_of(hostile.keeper)
    code = "for _ in range(100): send(b'M' * 1_000_000)\nsend(b'\\n')\nsay('after it')"
    assert texts(hostile.turn(code)) == ["after it"]
    assert memory_of(hostile.keeper, "VmHWM") - before < 8 * MIB
    assert f"a frame of more than {BOUNDS['max_frame']} bytes" in hostile.log_text()
    assert_unharmed(hostile)


def test_messages_made_to_be_large_once_parsed_do_not_swell_the_keeper(hostile: Sandbox) -> None:
    before = memory_of(hostile.keeper)
    crowd = "send(b'M{\"a\": [' + b'{\"\":0},' * 140_000 + b'0]}\\n')"
    hostile.turn(f"for _ in range(5): {crowd}")
    assert memory_of(hostile.keeper, "VmHWM") - before < 32 * MIB
    assert_unharmed(hostile)


def test_half_a_line_spoils_no_more_than_the_agents_next_frame(hostile: Sandbox) -> None:
    code = "send(b'M{\"type\": \"assist')\nsay('lost'); say({'type': 'note'}); say('kept')"
    assert texts(hostile.turn(code)) == ["kept"]
    assert_unharmed(hostile)


def test_half_a_line_and_then_silence_costs_the_turn_alone(hostile: Sandbox) -> None:
    records = hostile.turn('send(b\'M{"type": "assist\')\ntime.sleep(99)', timeout_s=0.2)
    assert json.loads(records[-1].payload)["outcome"] == "timeout"
    hostile.wait_until_gone()
    saved = hostile.saved()
    assert [record.seq for record in saved] == list(range(1, len(saved) + 1))
    assert saved[-1].kind is Kind.CLOSED


def test_a_frame_may_be_cut_at_every_byte(hostile: Sandbox) -> None:
    code = "whole = frame('cut')\nfor i in range(len(whole)):\n    send(whole[i:i + 1]); drain()\n"
    assert texts(hostile.turn(code)) == ["cut"]
    assert_unharmed(hostile)


def test_utf8_of_every_width_may_be_cut_at_every_byte(hostile: Sandbox) -> None:
    code = (
        "whole = frame('aé€𝄞')\n"
        "for cut in range(1, len(whole)):\n"
        "    send(whole[:cut]); drain(); send(whole[cut:]); drain()\n"
        "say(str(len(whole) - 1))\n"
    )
    *cut, count = texts(hostile.turn(code))
    assert cut == ["aé€𝄞"] * int(count)
    assert_unharmed(hostile)


def test_lone_surrogates_and_nul_pass_as_escapes(hostile: Sandbox) -> None:
    records = hostile.turn(r"""send(rb'M{"type":"assistant","message":{"content":"\ud800 \u0000"}}' + b'\n')""")
    assert texts_of_strings(records) == ["\ud800 \0"]
    assert_unharmed(hostile)


def texts_of_strings(records: list[Record]) -> list[str]:
    return [json.loads(record.payload)["message"]["content"] for record in records if record.type == "assistant"]


def test_an_error_text_is_made_fit_for_a_database(hostile: Sandbox) -> None:
    code = r"""send(rb'E{"turn":1,"error":"bad \ud800\u0000' + b'x' * 20_000 + rb'","code":"a\u0000"}' + b'\n')"""
    records = hostile.turn(code)
    end = json.loads(records[-1].payload)
    assert end["error"].startswith("bad ?xxx")
    assert len(end["error"]) <= 10_000
    assert end["code"] == "agent.failed"
    assert_unharmed(hostile)


@pytest.mark.parametrize(
    "message",
    [
        '{"type": ["assistant"]}',
        '{"type": {"a": 1}, "message": 7}',
        '{"type": "assistant"}',
        '{"type": "assistant", "message": null}',
        '{"type": "assistant", "message": {"content": {"text": 1}}}',
        '{"type": "assistant", "message": {"content": [1, null, {"type": []}, {"type": "text"}]}}',
        '{"type": "assistant", "message": {"content": [{"type": "tool_use", "id": {}}]}}',
        '{"type": "user", "message": {"content": [{"type": "tool_result"}]}}',
        '{"type": "result", "usage": [1], "result": {"deep": [[]]}, "num_turns": "many"}',
        '{"type": "result", "usage": {"tokens": "none", "more": 1.5, "most": true}}',
        '{"type": "stream_event"}',
        "{}",
    ],
)
def test_a_message_of_any_shape_is_journaled(hostile: Sandbox, message: str) -> None:
    records = hostile.turn(f"send(b'M' + {message.encode()!r} + b'\\n')")
    assert message.encode() in [record.payload for record in records]
    assert_unharmed(hostile)


@pytest.mark.parametrize("seed", range(5))
def test_frames_damaged_at_random_are_survived(hostile: Sandbox, seed: int) -> None:
    code = f"""
import random
chance = random.Random({seed})
for _ in range(5000):
    line = bytearray(frame("aé€𝄞 " * chance.randrange(4))[:-1])
    for _ in range(chance.randrange(4)):
        line[chance.randrange(1, len(line))] = chance.randrange(256)
    line[:1] = chance.choice([b"M", b"M", b"J", b"R", b"X", b"T", b"", b"?"])
    send(bytes(line).replace(b"\\n", b"") + b"\\n")
say("survived")
"""
    assert texts_of_last(hostile.turn(code)) == "survived"
    assert_unharmed(hostile)


def texts_of_last(records: list[Record]) -> str:
    """The text of the last assistant message; those before it may have any shape."""
    return texts([record for record in records if record.type == "assistant"][-1:])[0]


def test_an_agent_that_forges_its_turns_end_gains_nothing(hostile: Sandbox) -> None:
    code = "send(b'E{\"turn\": 1}\\n'); drain(); send(frame('too late'))"
    assert texts(hostile.turn(code)) == []
    until(lambda: "has no place now" in hostile.log_text(), "the late frame is noted")
    assert_unharmed(hostile)


def test_an_agent_that_closes_its_keepers_socket_is_ended(hostile: Sandbox) -> None:
    records = hostile.turn("os.close(3)\nwhile True: time.sleep(1)")
    end = json.loads(records[-1].payload)
    assert (end["outcome"], end["code"]) == ("failed", "sandbox.killed")
    hostile.wait_until_gone()


def test_an_agent_can_send_its_supervisor_no_flood_of_timings(host: Host) -> None:
    sandbox = host.sandbox()
    assert "ready" in sandbox.claim({"agent.py": HOSTILE}, timing=True)
    flood = 'b\'T{"totalMs": 1.5, "sessionId": "other", "x": "\' + b\'x\' * 900_000 + b\'"}\\nT{}\\nT{}\\n\''
    sandbox.start_turn(f"send({flood})")
    timing = sandbox.connection.wait_for(lambda said: "timing" in said)["timing"]
    assert timing.pop("timestamp")
    assert timing == {"type": "timing", "source": "bridge", "totalMs": 1.5, "sessionId": sandbox.session}
    sandbox.settled()
    assert_unharmed(sandbox)


# ---------------------------------------------------------------- what is dropped


def test_what_a_keeper_drops_is_counted_and_told_once(host: Host) -> None:
    sandbox = host.agent(HOSTILE, max_log_bytes=4 * KIB)
    code = """
for _ in range(7): send(b'?\\n')
for _ in range(2): send(b'M' * 1_100_000 + b'\\n')
for _ in range(200): print('x' * 99)
send(b'?\\n'); drain(); time.sleep(0.1)
"""
    records = sandbox.turn(code.replace("\\\\", "\\"))
    dropped = json.loads(records[-1].payload)["dropped"]
    assert (dropped["bad_frames"], dropped["oversized_frames"]) == (8, 2)
    assert dropped["log_lines"] > 100
    after = json.loads(sandbox.turn("pass")[-1].payload).get("dropped", {})
    assert not after.keys() & {"bad_frames", "oversized_frames"}


def test_the_sessions_log_says_what_was_dropped(hostile: Sandbox) -> None:
    hostile.turn("send(b'?\\n'); send(b'?\\n')")
    assert "dropped: 2 bad_frames" in hostile.log_text()


def test_deltas_for_which_there_was_no_room_are_counted(hostile: Sandbox) -> None:
    end = json.loads(hostile.turn(FLOOD)[-1].payload)
    assert end["dropped"]["deltas"] > 100


def test_an_agent_that_makes_events_too_fast_waits_and_loses_none(host: Host) -> None:
    sandbox = host.agent(HOSTILE, max_events_per_s=100)
    sandbox.start_turn("for i in range(750): send(frame(f'{i} ' + 'x' * 3000))")
    until(lambda: len(sandbox.saved()) > 1000, "it has made all the events that may come at once")
    assert len(sandbox.saved()) < 1500  # the rest is more than one read, and has to wait
    assert [int(text.split()[0]) for text in texts(sandbox.settled())] == list(range(750))


def test_an_agent_made_to_wait_is_heard_when_it_is_asked_to_stop(host: Host) -> None:
    sandbox = host.agent(
        "async def turn(message, session):\n"
        "    while not session.interrupted.is_set():\n"
        "        yield {'type': 'assistant', 'message': {'content': 'x' * 9000}}\n",
        max_events_per_s=1,
        kill_timeout_s=20.0,
    )
    sandbox.start_turn("go on")
    until(lambda: len(sandbox.saved()) > 10, "it has used up what it may make at once")
    sandbox.interrupt()
    assert json.loads(sandbox.settled()[-1].payload)["outcome"] == "interrupted"


# ---------------------------------------------------------------- floods


def test_a_flood_of_log_lines_is_bounded_and_said(hostile: Sandbox) -> None:
    hostile.turn("for i in range(50_000): os.write(1, b'line of a flood %d\\n' % i)")
    until(lambda: "the log is full" in hostile.log_text(), "the log is full")
    assert (hostile.folder / "logs").stat().st_size < BOUNDS["max_log_bytes"] + KIB
    assert_unharmed(hostile)


def test_a_flood_of_output_without_a_newline_is_cut_into_lines(hostile: Sandbox) -> None:
    before = memory_of(hostile.keeper)
    hostile.turn("for _ in range(500): os.write(2, b'x' * 100_000)")
    until(lambda: "the log is full" in hostile.log_text(), "the log is full")
    assert memory_of(hostile.keeper, "VmHWM") - before < 8 * MIB
    assert_unharmed(hostile)


def test_what_is_printed_last_is_logged_even_without_a_newline(hostile: Sandbox) -> None:
    hostile.turn("os.write(2, b'famous last words'); os._exit(1)")
    hostile.wait_until_gone()
    assert "famous last words" in hostile.log_text()


def test_complaints_about_an_agent_are_bounded(hostile: Sandbox) -> None:
    hostile.turn("for _ in range(1000): send(b'?\\n' * 50)")
    assert sum("malformed" in entry["text"] for entry in hostile.logs()) == 100
    assert_unharmed(hostile)


FLOOD = """
delta = b'M{"type":"stream_event","event":{"text":"' + b'x' * 50_000 + b'"}}\\n'
for i in range(2000):
    send(delta)
    if i % 500 == 0:
        send(frame(f'event {i}'))
"""


def test_a_flood_of_deltas_costs_deltas_but_no_event_and_no_memory(hostile: Sandbox) -> None:
    before = memory_of(hostile.keeper)
    records = hostile.turn(FLOOD)
    assert texts(records) == [f"event {i}" for i in (0, 500, 1000, 1500)]
    assert sum(path.stat().st_size for path in hostile.journal.iterdir()) < 1.25 * BOUNDS["max_journal_bytes"]
    assert memory_of(hostile.keeper, "VmHWM") - before < 8 * MIB
    assert_unharmed(hostile)


def test_a_supervisor_that_does_not_read_costs_nothing(hostile: Sandbox) -> None:
    hostile.start_turn(FLOOD)
    before = memory_of(hostile.keeper)
    hostile.connect()  # and from here on it reads nothing
    hostile.settled()
    assert memory_of(hostile.keeper, "VmHWM") - before < 8 * MIB
    hostile.connect()
    assert_unharmed(hostile)


def test_a_supervisor_that_asks_without_reading_is_cut_off(hostile: Sandbox) -> None:
    questions = b'{"cmd": "interrupt", "re": 1, "turn": ""}\n' * 100_000
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        hostile.connection.send(questions)
    hostile.connect()
    assert_unharmed(hostile)


def test_unacknowledged_events_stop_the_agent_until_they_are_acknowledged(hostile: Sandbox) -> None:
    before = memory_of(hostile.keeper)
    hostile.start_turn("for i in range(400): send(frame(f'{i} ' + 'x' * 50_000))")
    most = 1.25 * BOUNDS["max_journal_bytes"]
    until(lambda: journal_size(hostile) >= most, "the journal is full")
    time.sleep(0.2)  # that it grows no further takes a while to see
    assert journal_size(hostile) < most + MIB
    assert len(texts(hostile.records())) < 400
    reader, records = Reader(hostile.journal, Position(0, 0)), list[Record]()
    while not records or records[-1].kind is not Kind.SETTLED:
        records += until(reader.read, "the agent goes on")
        hostile.connection.tell("acked", seq=records[-1].seq)
    reader.close()
    assert [record.seq for record in records] == list(range(1, records[-1].seq + 1))
    assert [int(text.split()[0]) for text in texts(records)] == list(range(400))
    assert memory_of(hostile.keeper, "VmHWM") - before < 8 * MIB


def journal_size(sandbox: Sandbox) -> int:
    return sum(path.stat().st_size for path in sandbox.journal.iterdir())


def test_a_full_disk_makes_the_agent_wait_and_loses_nothing(host: Host) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small filesystem to fill")
    sandbox = host.sandbox()
    sandbox.journal.mkdir()
    in_keepers_view = ["nsenter", f"--mount=/proc/{sandbox.keeper}/ns/mnt", "mount"]
    mount = [*in_keepers_view, "-t", "tmpfs", "-o", "size=512k", "none", str(sandbox.journal)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    sandbox.journal = Path(f"/proc/{sandbox.keeper}/root{sandbox.journal}")
    assert "ready" in sandbox.claim({"agent.py": HOSTILE})
    sandbox.start_turn("for i in range(40): send(frame(f'{i} ' + 'x' * 50_000))")
    until(lambda: "the agent waits" in sandbox.log_text(), "the disk is full")
    subprocess.run([*in_keepers_view, "-o", "remount,size=64m", str(sandbox.folder / "journal")], check=True)
    records = sandbox.settled()
    assert [int(text.split()[0]) for text in texts(records)] == list(range(40))
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    sandbox.end()
