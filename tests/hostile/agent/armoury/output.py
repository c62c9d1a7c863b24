"""Attacks by what an agent says: too much, too deep, too long, in somebody else's name, or not at all.

A generator's items are said by the agent (text or message objects). What goes to descriptors directly goes to 3, the
bridge's end of the keeper's socket, or to 1 and 2, which as a command agent are its lines and its log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from .weapons import Facts, in_the_agent

KEEPER = 3
MIB = 1024 * 1024


def _said(text: str) -> dict[str, Any]:
    return {"type": "assistant", "message": {"role": "assistant", "content": [{"type": "text", "text": text}]}}


def _send(descriptor: int, data: bytes, patience_s: float = 10.0) -> int:
    """Writes as much of it as is taken in time; how much."""
    deadline, sent, was_blocking = time.monotonic() + patience_s, 0, os.get_blocking(descriptor)
    os.set_blocking(descriptor, False)
    try:
        while sent < len(data) and time.monotonic() < deadline:
            if select.select([], [descriptor], [], 0.1)[1]:
                sent += os.write(descriptor, data[sent : sent + 65536])
    finally:
        os.set_blocking(descriptor, was_blocking)
    return sent


def say_hello(facts: Facts) -> Iterator[Any]:
    """No attack: shows that a session still answers."""
    yield "hello "


def say_a_giant_event(facts: Facts) -> Iterator[Any]:
    yield _said("x" * (4 * facts.limits.frame))


def say_a_deep_event(facts: Facts) -> Iterator[Any]:
    deep: Any = "bottom"
    for _ in range(500):
        deep = [deep]
    yield {"type": "assistant", "deep": deep}


def say_an_event_of_many_values(facts: Facts) -> Iterator[Any]:
    yield {"type": "assistant", "many": [0] * 150_000}


def say_what_is_no_number(facts: Facts) -> Iterator[Any]:
    yield {"type": "assistant", "number": float("nan")}


def say_ten_thousand_events(facts: Facts) -> Iterator[Any]:
    """Saved ones, for two seconds: more than any rate that is allowed. Large, so that few hide in a pipe's buffer."""
    deadline = time.monotonic() + 2
    for number in range(10_000):
        if time.monotonic() > deadline:
            return
        yield _said(f"{number}" + "x" * 2000)


def say_a_hundred_thousand_pieces(facts: Facts) -> Iterator[Any]:
    deadline = time.monotonic() + 1
    for number in range(100_000):
        if number % 1000 == 0 and time.monotonic() > deadline:
            return
        yield "piece "


def say_what_ends_a_stream(facts: Facts) -> Iterator[Any]:
    """Frames of server-sent events inside text, and control characters for whoever prints it."""
    yield "\n\nevent: done\ndata: {}\n\nid: 9.9.9\nevent: error\ndata: {}\n\n\r\r\0\x1b[2J\x1b]0;gone\x07\ud800"
    yield _said("\n\nevent: done\ndata: {}\n\n")


def say_events_in_the_platforms_name(facts: Facts) -> Iterator[Any]:
    """Types that only the platform gives out; said by an agent they are an agent's message and nothing more."""
    for kind in ("done", "error", "session_start", "settled", "lifecycle", "closed", "turn_complete", "reset"):
        if kind != "done":  # as a command agent, that line ends its turn, which is its right
            yield {
                "type": kind,
                "sessionId": facts.neighbour.session,
                "outcome": "completed",
                "seq": 1,
                "action": "end",
            }


def say_something_for_the_neighbour(facts: Facts) -> Iterator[Any]:
    yield {**_said(facts.mark), "sessionId": facts.neighbour.session, "session_id": facts.neighbour.session}


def log_without_end(facts: Facts) -> Iterator[Any]:
    """Twenty times what is kept."""
    for _ in range(20):
        _send(2, b"log line of an attack\n" * (facts.limits.log // 22))
    yield "logged"


def log_what_looks_like_our_log(facts: Facts) -> Iterator[Any]:
    line = json.dumps({"level": "error", "msg": f"forged {facts.mark}"})
    _send(2, f"{line}\n\x1b[2J\x1b[31mroot@host# \r{'x' * 100_000}\n\0\0\xff\n".encode("latin-1"))
    yield "logged"


# ---------------------------------------------------------------- past the runtime: the keeper's socket


def _frames_of(facts: Facts) -> list[bytes]:
    turn = json.dumps({"turn": facts.neighbour.session, "error": None}).encode()
    return [
        b"E" + turn + b"\n",
        b'E{"turn": 1}\nE{"turn": null}\nE{}\nE[]\nE\n',
        b"J{}\nR{}\nX{}\nT{}\n?{}\n\0\n\n\n",
        b'M{"a": NaN}\nM{"a": 1e999}\nM' + b"[" * 100_000 + b"\n",
        b'M{"a": "\xff\xfe"}\nM{"a": "\xed\xa0\x80"}\n',
        b'{"cmd": "end"}\n{"cmd": "claim"}\n{"re": 1}\n{"grew": 99}\n',
    ]


@in_the_agent
def forge_frames(facts: Facts) -> str:
    for frame in _frames_of(facts):
        _send(KEEPER, frame)
    return ""


@in_the_agent
def send_an_endless_frame(facts: Facts) -> str:
    _send(KEEPER, b"M" + b"x" * (20 * facts.limits.frame) + b"\n")
    return ""


@in_the_agent
def send_descriptors_to_the_keeper(facts: Facts) -> str:
    """SCM_RIGHTS: a keeper that took them would run out of its own."""
    with socket.socket(fileno=os.dup(KEEPER)) as keeper:
        for _ in range(50):
            socket.send_fds(keeper, [b"\n"], [0] * 100)
    return ""


@in_the_agent
def forge_the_end_of_its_turn(facts: Facts) -> str:
    """Its own it may end, once. The second end belongs to nobody."""
    _send(KEEPER, b"".join(b'E{"turn": %d}\n' % number for number in range(200)))
    return ""


@in_the_agent
def hang_up_on_the_keeper(facts: Facts) -> str:
    with socket.socket(fileno=os.dup(KEEPER)) as keeper:
        keeper.shutdown(socket.SHUT_RDWR)
    return ""


# ---------------------------------------------------------------- as a command agent: its lines


@in_the_agent
def write_lines_that_are_no_json(facts: Facts) -> str:
    _send(1, b"\0\xff\xfe no JSON\n[1]\nnull\n" + b"[" * 100_000 + b"\n")
    return ""


@in_the_agent
def write_an_endless_line(facts: Facts) -> str:
    _send(1, b"x" * (20 * facts.limits.frame))
    return ""


@in_the_agent
def end_the_turn_a_hundred_times(facts: Facts) -> str:
    """The ends to spare are those of its next turns, and of nobody else's."""
    _send(1, b'{"type": "done"}\n' * 100)
    return ""


@in_the_agent
def close_its_output(facts: Facts) -> str:
    os.close(1)
    time.sleep(600)
    return ""


@in_the_agent
def never_read_its_input(facts: Facts) -> str:
    """The turn's timeout has to end this."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
    return ""


@in_the_agent
def stop_itself(facts: Facts) -> str:
    """A stopped process hears nothing but SIGKILL."""
    signal.raise_signal(signal.SIGSTOP)
    return ""


@in_the_agent
def spin_without_end(facts: Facts) -> str:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        sys.stdout.flush()
    return ""
