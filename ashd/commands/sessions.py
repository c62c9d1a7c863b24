"""`ashd session …` and `ashd chat`: talking to agents."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from urllib.parse import quote, urlencode

from ashd.commands import parsers
from ashd.commands.connection import connect
from ashd.commands.exits import Exit
from ashd.commands.output import print_json, print_table, printable
from ashd.http_client import Client, Frame


def register(commands: parsers.Commands[argparse.ArgumentParser]) -> None:
    group = parsers.add_group(commands, "session", summary="create, use, list or end sessions")
    create = parsers.add(
        group,
        "create",
        run_create,
        summary="start a session of an agent and print its id",
        example="ashd session create shell-agent",
        then='ashd session send ID "ls -la"',
    )
    create.add_argument("agent", metavar="AGENT")
    send = parsers.add(
        group,
        "send",
        run_send,
        summary="send a message to a session and print the answer as it comes",
        example='ashd session send 1b4e28ba-2fa1-41d2-883f-0016d3cca427 "ls -la"',
        then="ashd session end ID",
    )
    send.add_argument("id", metavar="ID")
    send.add_argument("message", metavar="MESSAGE")
    list_parser = parsers.add(
        group,
        "list",
        run_list,
        summary="list sessions, newest first",
        example="ashd session list --agent shell-agent",
        then="ashd session send ID MESSAGE, or ashd session end ID",
    )
    list_parser.add_argument("--agent", metavar="NAME", help="only those of this agent")
    list_parser.add_argument("--limit", type=int, default=50, metavar="N", help="at most this many (default: 50)")
    end = parsers.add(
        group,
        "end",
        run_end,
        summary="end a session; its messages stay readable",
        example="ashd session end 1b4e28ba-2fa1-41d2-883f-0016d3cca427",
        then="ashd session list",
    )
    end.add_argument("id", metavar="ID")
    chat = parsers.add(
        commands,
        "chat",
        run_chat,
        summary="talk to an agent: one message, or a conversation line by line",
        example='ashd chat shell-agent "ls -la"',
        then="ashd chat shell-agent (without a message) to go on talking; ctrl-d ends",
    )
    chat.add_argument("agent", metavar="AGENT")
    chat.add_argument("message", metavar="MESSAGE", nargs="?")
    chat.add_argument("--keep", action="store_true", help="leave the session open and print its id")
    for parser in (create, send, list_parser, end, chat):
        parsers.add_server_options(parser)
    for parser in (create, list_parser, end):
        parsers.add_json_option(parser)


def run_create(args: argparse.Namespace) -> int:
    session = connect(args).post("/api/sessions", {"agent": args.agent})["session"]
    if args.json:
        print_json(session)
    else:
        print(session["id"])
    return Exit.OK


def run_send(args: argparse.Namespace) -> int:
    return converse(connect(args), args.id, [args.message])


def run_list(args: argparse.Namespace) -> int:
    query = {"limit": args.limit} | ({"agent": args.agent} if args.agent else {})
    sessions = connect(args).get(f"/api/sessions?{urlencode(query)}")["sessions"]
    if args.json:
        print_json(sessions)
    else:
        columns = ["id", "agentName", "status", "runnerId", "lastActiveAt"]
        print_table(sessions, columns, empty="No sessions: ashd session create AGENT starts one.")
    return Exit.OK


def run_end(args: argparse.Namespace) -> int:
    session = connect(args).delete(f"/api/sessions/{quote(args.id, safe='')}")["session"]
    if args.json:
        print_json(session)
    else:
        print(f"{session['id']} is {session['status']}.")
    return Exit.OK


def run_chat(args: argparse.Namespace) -> int:
    """One message or a conversation; the session is ended on the way out, also by ctrl-c, unless it is to be kept."""
    client = connect(args)
    session_id = client.post("/api/sessions", {"agent": args.agent})["session"]["id"]
    try:
        return converse(client, session_id, [args.message] if args.message else _typed_lines())
    finally:
        if args.keep:
            print(f"session {session_id}", file=sys.stderr)
        else:
            client.delete(f"/api/sessions/{session_id}")


def converse(client: Client, session_id: str, messages: Iterable[str]) -> int:
    """Send each message and print its answer; FAILED when any turn did not complete."""
    status = Exit.OK
    for message in messages:
        if not print_answer(client.turn(session_id, message)):
            status = Exit.FAILED
    return status


def print_answer(frames: Iterable[Frame]) -> bool:
    """Print a turn's text as it comes, errors and tools on stderr; whether it completed."""
    streamed, column, outcome = False, 0, "lost"
    for frame in frames:
        text = ""
        if frame.event == "text_delta":
            text, streamed = frame.data["delta"], True
        elif frame.event == "message" and frame.data.get("type") == "assistant":
            # The full message repeats what its deltas said, so it is printed only when there were none.
            text, streamed = "" if streamed else _text_of(frame.data), False
        elif frame.event == "tool_use":
            print(f"[{printable(str(frame.data.get('name')))}]", file=sys.stderr)
        elif frame.event == "error":
            print(f"error: {printable(str(frame.data['error']))}", file=sys.stderr)
        elif frame.event == "lifecycle":
            told = json.dumps({name: value for name, value in frame.data.items() if name != "action"})
            print(printable(f"[{frame.data.get('action')}] {told}").replace("\n", " "), file=sys.stderr)
        elif frame.event == "done":
            outcome = frame.data["outcome"]
        if text:
            sys.stdout.write(printable(text))
            sys.stdout.flush()
            column = 0 if text.endswith("\n") else 1
    if column:
        print()
    if outcome != "completed":
        print(f"The turn ended: {outcome}.", file=sys.stderr)
    return bool(outcome == "completed")


def _text_of(message: dict[str, object]) -> str:
    body = message.get("message")
    blocks = body.get("content") if isinstance(body, dict) else None
    if isinstance(blocks, str):
        return blocks
    return "".join(str(block.get("text", "")) for block in blocks or [] if isinstance(block, dict))


def _typed_lines() -> Iterator[str]:
    """What is typed, line by line, up to ctrl-d; with a prompt on a terminal only, so that pipes work."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line
