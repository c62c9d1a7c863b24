"""The command line: every help teaches, and every exit status says what it should."""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ashd.cli import main, parser
from ashd.commands.agents import bundle
from ashd.commands.exits import MEANINGS, Exit
from ashd.http_client import Client, Frame

UNREACHABLE = "http://127.0.0.1:1"
SESSION = {"id": "11111111-1111-4111-8111-111111111111", "status": "ended"}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ASH_SERVER_URL", "ASH_API_KEY", "ASH_INTERNAL_SECRET", "ASH_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ASH_DATA_DIR", str(tmp_path))


class Answers(BaseHTTPRequestHandler):
    """A server that gives each request line its next answer from `script` and remembers what it was asked."""

    script: dict[str, list[tuple[int, bytes]]]
    seen: list[tuple[str, str | None, bytes]]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((f"{self.command} {self.path}", self.headers.get("Authorization"), body))
        status, content = self.script[f"{self.command} {self.path}"].pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 (http.server's names)

    def log_message(self, *args: object) -> None:
        """Nothing: pytest shows what matters."""


@pytest.fixture
def server() -> Iterator[type[Answers]]:
    handler = type("Handler", (Answers,), {"script": {}, "seen": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}"
    yield handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def sse(*frames: tuple[str, object]) -> bytes:
    return b"".join(
        f"id: 1.{number}.0\nevent: {event}\ndata: {json.dumps(data)}\n\n".encode()
        for number, (event, data) in enumerate(frames)
    )


def every_command(
    at: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    groups = [action for action in at._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield path, at
    for group in groups:
        for name, command in group.choices.items():
            yield from every_command(command, (*path, name))


COMMANDS = dict(every_command(parser()))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_and_the_next_thing_to_do(path: tuple[str, ...]) -> None:
    text = COMMANDS[path].format_help()
    assert f"ashd {' '.join(path)}" in text.split("example:")[1]
    assert "next:" in text


def test_the_top_help_explains_every_exit_status() -> None:
    assert MEANINGS in parser().format_help()
    for status in Exit:
        assert f"\n  {status.value} " in MEANINGS


@pytest.mark.parametrize("arguments", [[], ["dance"], ["session"], ["deploy"], ["chat", "a", "--loud"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize(
    "arguments", [["agent", "list"], ["status"], ["health"], ["chat", "a", "b"], ["session", "end", "x"]]
)
def test_no_server_is_3_and_names_the_next_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--server", UNREACHABLE]) == Exit.UNREACHABLE
    assert "ashd up" in capsys.readouterr().err


def test_a_refused_key_is_4_and_says_where_keys_come_from(
    server: type[Answers], capsys: pytest.CaptureFixture[str]
) -> None:
    envelope = {"error": "Invalid API key", "statusCode": 401, "code": "auth.invalid"}
    server.script["GET /api/agents"] = [(401, json.dumps(envelope).encode())]
    assert main(["agent", "list", "--server", server.url]) == Exit.UNAUTHORISED
    printed = capsys.readouterr().err
    assert "Invalid API key  [auth.invalid]" in printed
    assert "ASH_API_KEY" in printed


def test_another_error_of_the_server_is_1(server: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    server.script["GET /api/agents/x"] = [(404, b'{"error": "Agent not found", "code": "agent.not_found"}')]
    assert main(["agent", "info", "x", "--server", server.url]) == Exit.FAILED
    assert "Agent not found  [agent.not_found]" in capsys.readouterr().err


def test_a_wrong_configuration_is_2_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runner.yaml").write_text("max_sandboxes: 0\n")
    assert main(["config", "check", str(tmp_path / "runner.yaml")]) == Exit.USAGE
    assert "runner.yaml:1: max_sandboxes" in capsys.readouterr().err


def test_config_show_names_origins_and_hides_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASH_INTERNAL_SECRET", "hunter2")
    assert main(["config", "show", "--origin", "--for", "runner"]) == Exit.OK
    printed = capsys.readouterr().out
    assert "hunter2" not in printed
    assert ["internal_secret", "***", "ASH_INTERNAL_SECRET"] in [line.split() for line in printed.splitlines()]


def test_the_key_in_data_dir_is_sent_to_this_machine_only(server: type[Answers], tmp_path: Path) -> None:
    (tmp_path / "initial-api-key").write_text("ash_local\n")
    server.script["GET /api/agents"] = [(200, b'{"agents": []}'), (200, b'{"agents": []}')]
    main(["agent", "list", "--server", server.url])
    main(["agent", "list", "--server", server.url, "--api-key", "ash_given"])
    assert [key for _, key, _ in server.seen] == ["Bearer ash_local", "Bearer ash_given"]

    from ashd.commands.connection import connect

    elsewhere = argparse.Namespace(server="https://ashd.example", api_key=None, data_dir=tmp_path)
    assert connect(elsewhere)._api_key is None


def test_tables_can_be_had_as_json(server: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    agents = [{"name": "a", "version": 1, "updatedAt": "2026-01-01T00:00:00.000Z"}]
    server.script["GET /api/agents"] = [(200, json.dumps({"agents": agents}).encode())] * 2
    assert main(["agent", "list", "--json", "--server", server.url]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == agents
    main(["agent", "list", "--server", server.url])
    assert capsys.readouterr().out.splitlines()[0].split() == ["name", "version", "updatedAt"]


def test_a_chat_prints_each_text_once_and_ends_its_session(
    server: type[Answers], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"type": "assistant", "message": {"content": [{"type": "text", "text": "hello world"}]}}
    more = {"type": "assistant", "message": {"content": "\nmore"}}
    answer = sse(
        ("session_start", {}),
        ("text_delta", {"delta": "hello "}),
        ("text_delta", {"delta": "\x1b[31mworld"}),
        ("message", whole),
        ("message", more),
        ("done", {"outcome": "completed"}),
    )
    server.script["POST /api/sessions"] = [(201, json.dumps({"session": SESSION}).encode())]
    server.script[f"POST /api/sessions/{SESSION['id']}/messages"] = [(200, answer)]
    server.script[f"DELETE /api/sessions/{SESSION['id']}"] = [(200, json.dumps({"session": SESSION}).encode())]
    assert main(["chat", "a", "hi", "--server", server.url]) == Exit.OK
    assert capsys.readouterr().out == "hello [31mworld\nmore\n"
    assert server.seen[-1][0].startswith("DELETE")


def test_a_turn_that_fails_is_1(server: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    answer = sse(("error", {"error": "out of memory"}), ("done", {"outcome": "oom"}))
    server.script["POST /api/sessions/s/messages"] = [(200, answer)]
    assert main(["session", "send", "s", "hi", "--server", server.url]) == Exit.FAILED
    assert "out of memory" in capsys.readouterr().err


def test_a_chat_says_what_was_killed(server: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    killed = {"action": "memory_kill", "victim": {"name": "cc1\x1b[31m"}, "limitBytes": 512}
    server.script["POST /api/sessions/s/messages"] = [
        (200, sse(("lifecycle", killed), ("done", {"outcome": "completed"})))
    ]
    assert main(["session", "send", "s", "hi", "--server", server.url]) == Exit.OK
    assert capsys.readouterr().err == '[memory_kill] {"victim": {"name": "cc1\\u001b[31m"}, "limitBytes": 512}\n'


def test_status_shows_the_fleet_and_the_sandboxes_of_one_runner(
    server: type[Answers], capsys: pytest.CaptureFixture[str]
) -> None:
    health = {"version": "1", "uptime": 5, "activeSessions": 1, "activeSandboxes": 2}
    runner = {
        "runnerId": "r:1",
        "host": "h",
        "port": 1,
        "isolation": "strict",
        "usage": {"pssMb": 7.5},
        "refusing": None,
    }
    sandbox = {"state": "running", "isolation": "strict", "memoryMb": 9.0, "cpuSeconds": 1.5, "descriptors": 12}
    small = {**sandbox, "sandboxId": "a" * 36, "sessionId": None, "limits": {}, "pssMb": 1, "processes": 1, "diskMb": 0}
    limits = {"memoryMb": 512, "maxProcesses": 256, "diskMb": 2048}
    large = {**small, "sandboxId": "b" * 36, "sessionId": "s1", "limits": limits, "pssMb": 7.5, "diskMb": 2.25}
    answer = json.dumps({"sandboxes": [small, large]}).encode()
    server.script["GET /health"] = [(200, json.dumps(health).encode())]
    server.script["GET /api/internal/runners"] = [(200, json.dumps({"runners": [runner]}).encode())]
    server.script["GET /api/internal/runners/r%3A1/sandboxes"] = [
        (200, answer),
        (200, answer),
        (200, b'{"sandboxes": []}'),
    ]
    assert main(["status", "--server", server.url]) == Exit.OK
    (told,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("r:1")]
    assert told[:2] == ["r:1", "h:1"] and told[-4:] == ["strict", "7.5", "-", "-"]
    of_one = ["status", "--runner", "r:1", "--server", server.url]
    assert main(of_one) == Exit.OK
    heading, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert dict(zip(heading, rows[0], strict=True)) == {
        "sandbox": "bbbbbbbb",
        "session": "s1",
        "state": "running",
        "isolation": "strict",
        "pssMb": "7.5/512",
        "memoryMb": "9.0",
        "cpuSeconds": "1.5",
        "processes": "1/256",
        "descriptors": "12",
        "diskMb": "2.25/2048",
    }
    assert rows[1][:2] + rows[1][4:5] == ["aaaaaaaa", "-", "1"]
    assert main([*of_one, "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == json.loads(answer)
    assert main(of_one) == Exit.OK
    assert capsys.readouterr().err == "No sandboxes on r:1.\n"


def test_a_broken_stream_is_taken_up_again_at_its_cursor(server: type[Answers]) -> None:
    server.script["POST /api/sessions/s/messages"] = [
        (200, sse(("text_delta", {"delta": "a"})) + b"id: 1.1.0\nevent: text_de")
    ]
    server.script["GET /api/sessions/s/stream"] = [(503, b"{}"), (200, sse(("done", {"outcome": "completed"})))]
    frames = list(Client(server.url, None).turn("s", "hi"))
    assert frames == [Frame("text_delta", {"delta": "a"}, "1.0.0"), Frame("done", {"outcome": "completed"}, "1.0.0")]
    assert [request for request, _, _ in server.seen] == ["POST /api/sessions/s/messages"] + [
        "GET /api/sessions/s/stream"
    ] * 2


def test_a_stream_that_breaks_before_its_first_frame_is_asked_for_again_under_the_same_key(
    server: type[Answers],
) -> None:
    path = f"POST /api/sessions/{SESSION['id']}/messages"
    server.script = {path: [(200, b""), (200, sse(("session_start", {}), ("done", {"outcome": "completed"})))]}
    frames = list(Client(server.url, None).turn(SESSION["id"], "hello"))
    assert [frame.event for frame in frames] == ["session_start", "done"]
    assert [asked for asked, _, _ in server.seen] == [path] * 2


def test_a_stream_that_is_not_ours_is_no_traceback(server: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    server.script = {"POST /api/sessions/a%20b%2Fc/messages": [(200, b"data: <html>\n\n")]}
    assert main(["session", "send", "a b/c", "hello", "--server", server.url]) == Exit.FAILED
    assert "does not answer like ashd" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://[::1", "http://x:99999", "ftp://x", "x", "http://:80"])
def test_a_server_that_is_none_is_wrong_usage(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--server", url]) == Exit.USAGE
    assert "is not a server" in capsys.readouterr().err


def test_a_key_that_can_be_none_is_wrong_usage(server: type[Answers]) -> None:
    assert main(["health", "--server", server.url, "--api-key", "ash_\n"]) == Exit.USAGE
    assert server.seen == []


def test_no_text_of_an_agent_reaches_the_terminal_raw(
    server: type[Answers], capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "a\x1b]0;evil\x07\x9b2Jb"
    server.script = {
        "GET /api/agents/x": [(400, json.dumps({"error": evil, "code": "c"}).encode())]
        + [(200, json.dumps({"agent": {"config": {"deep": evil}}}).encode())] * 2
    }
    main(["agent", "info", "x", "--server", server.url])
    main(["agent", "info", "x", "--server", server.url])
    main(["agent", "info", "x", "--server", server.url, "--json"])
    out, err = capsys.readouterr()
    assert (out + err).count("evil") == 3
    assert not {"\x1b", "\x07", "\x9b"} & set(out + err)
    assert json.loads(out[out.index("{\n") :])["config"]["deep"] == evil


def test_a_deployed_folder_is_the_same_bytes_each_time(server: type[Answers], tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("x")
    (folder / "agent.py").write_text("async def turn(message, session): yield 'hi'\n")
    with bundle(folder) as first, bundle(folder) as second:
        content = first.read()
        assert content == second.read()
    assert content[4:8] == bytes(4), "the time in the gzip header (RFC 1952) must not make a difference"
    server.script["PUT /api/agents/agent/bundle"] = [(201, b'{"agent": {"name": "agent", "version": 1}}')]
    assert main(["deploy", str(folder), "--server", server.url]) == Exit.OK


def test_a_deploy_of_what_can_not_be_read_names_it(server: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "/proc/self/task", "--name", "x", "--server", server.url]) == Exit.FAILED
    assert "can't be packed" in capsys.readouterr().err
    assert server.seen == []


def test_a_deploy_of_what_is_no_folder_says_what_an_agent_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", str(tmp_path / "absent"), "--server", UNREACHABLE]) == Exit.FAILED
    assert "agent.yaml" in capsys.readouterr().err


def test_client_commands_import_nothing_heavy() -> None:
    code = "import sys, ashd.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert not {"grpc", "falcon", "psycopg", "yaml", "asyncio", "uvloop"} & set(loaded.stdout.split())
