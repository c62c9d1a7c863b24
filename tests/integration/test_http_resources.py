"""The HTTP resources on a real database; only runners are played by stand-ins."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import stat
import tarfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import falcon.testing
import pytest
from falcon.asgi import Request, Response

from ashd.config.schema import CoordinatorConfig
from ashd.coordinator.app import build_app
from ashd.coordinator.auth import ensure_initial_key
from ashd.coordinator.lifespan import Coordinator
from ashd.coordinator.services import Services
from ashd.errors import Unavailable
from ashd.store import bundles, events, keys, runners, sessions, turns
from ashd.store.events import MESSAGE, SETTLED, Batch, NewEvent
from ashd.store.pool import Database
from ashd.wire.v1 import runner_pb2
from tests.integration.conforms import complaints

KEY = "static-key"
SECRET = "internal"
AUTH = {"Authorization": f"Bearer {KEY}"}
INTERNAL = {"Authorization": f"Bearer {SECRET}"}
ASYNC = {**AUTH, "Prefer": "respond-async"}
ECHO = {"name": "echo", "files": [{"path": "agent.yaml", "content": base64.b64encode(b"runtime: echo").decode()}]}


class Runner:
    """A runner that always can, or never."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.refuses = False
        self.ended: list[str] = []
        self.sandboxes: list[runner_pb2.Sandbox] | None = []
        """None: it does not answer."""

    async def start_session(self, created: sessions.Created) -> sessions.Session:
        if created.replayed:
            return created.session
        if self.refuses:
            await sessions.fail_start(self._db, created.session.id, created.session.epoch, "refused")
            raise Unavailable("No runners available", code="fleet.no_runners")
        given = {"isolation": "strict", "effective_limits": '{"memoryMb": 64, "openFiles": 1024}'}
        lease = created.session.id, created.session.epoch
        started = await sessions.activate(self._db, *lease, str(uuid.uuid4()), **given)
        assert started is not None
        return started

    async def end_session(self, ended: sessions.Ended) -> None:
        if ended.before is not None:
            self.ended.append(ended.session.id)

    async def sandboxes_of(self, runner: runners.Runner) -> list[runner_pb2.Sandbox]:
        if self.sandboxes is None:
            raise Unavailable(f"runner {runner.id} does not answer", code="peer.unavailable")
        return self.sandboxes


@dataclass
class Readers:
    """Notes what would be streamed."""

    posted: list[turns.Admitted] = field(default_factory=list)
    launched: list[turns.Admitted] = field(default_factory=list)
    attached: list[str | None] = field(default_factory=list)

    async def post_message(self, req: Request, resp: Response, admitted: turns.Admitted) -> None:
        self.posted.append(admitted)
        resp.content_type = "text/event-stream"
        resp.text = "event: done\n\n"

    async def launch(self, admitted: turns.Admitted) -> None:
        self.launched.append(admitted)

    async def attach(self, req: Request, resp: Response, session: sessions.Session, cursor: str | None) -> None:
        self.attached.append(cursor)
        resp.text = ""


@dataclass
class House:
    """One worker's application, and what stands behind it."""

    http: falcon.testing.ASGIConductor
    db: Database
    runner: Runner
    readers: Readers

    async def ask(self, method: str, path: str, expect: int = 200, **kwargs: Any) -> Any:
        """The answer's JSON; fails unless its status is `expect`, and it is what the API's document says."""
        kwargs.setdefault("headers", AUTH)
        answer = await self.http.simulate_request(method, path, **kwargs)
        assert answer.status_code == expect, answer.text
        assert not complaints(method, path, expect, answer.json)
        if expect >= 400:
            assert set(answer.json) - {"admitted"} == {"error", "statusCode", "code", "retryable"}
        return answer.json

    async def with_runner(self, slots: int = 10) -> None:
        await runners.register(self.db, runners.Registration("r1", "h", 1, "unix:/r1", slots))

    async def session(self, **body: Any) -> dict[str, Any]:
        answer = await self.ask("POST", "/api/sessions", 201, json={"agent": "echo", **body})
        session: dict[str, Any] = answer["session"]
        return session


@asynccontextmanager
async def a_database(url: str) -> AsyncIterator[Database]:
    db = Database(url, 8, 5.0)
    await db.open()
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def a_house(url: str, folder: Path, **settings: Any) -> AsyncIterator[House]:
    values = {"api_key": KEY, "internal_secret": SECRET, "data_dir": folder, "max_upload": 1 << 20, **settings}
    config = CoordinatorConfig(database_url=url, **values)
    async with a_database(url) as db:
        runner, readers = Runner(db), Readers()
        services = Services(
            config=config,
            db=db,
            coordinator_id="host-1",
            started_at=time.monotonic(),
            dispatch=runner,
            streams=readers,
        )
        async with falcon.testing.ASGIConductor(build_app(services)) as http:
            yield House(http, db, runner, readers)


@pytest.fixture
def opened(database_url: str, tmp_path: Path) -> Any:
    """Opens the application on a fresh database."""
    return lambda **settings: a_house(database_url, tmp_path, **settings)


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# Conventions


async def test_keys_are_asked_for_and_checked(opened: Any) -> None:
    async with opened() as house:
        for headers, text in (
            ({}, "Missing Authorization header"),
            ({"Authorization": "Basic x"}, "Invalid Authorization header format"),
            ({"Authorization": "Bearer "}, "Invalid Authorization header format"),
            ({"Authorization": "Bearer wrong"}, "Invalid API key"),
            ({"Authorization": "Bearer \xff"}, "Invalid API key"),
        ):
            answer = await house.ask("GET", "/api/agents", 401, headers=headers)
            assert answer["error"] == text
        for path in ("/health", "/ready", "/metrics"):
            assert (await house.http.simulate_get(path)).status_code == 200


async def test_a_tenant_sees_nothing_of_another(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        session = await house.session()
        other = {"Authorization": f"Bearer {(await keys.create(house.db, 'other')).text}"}
        path = f"/api/sessions/{session['id']}"
        turn = str(uuid.uuid4())
        for method, url in (
            ("GET", "/api/agents/echo"),
            ("DELETE", "/api/agents/echo"),
            ("GET", path),
            ("DELETE", path),
            ("GET", f"{path}/messages"),
            ("GET", f"{path}/events"),
            ("GET", f"{path}/turns"),
            ("GET", f"{path}/turns/{turn}"),
            ("GET", f"{path}/stream"),
        ):
            await house.ask(method, url, 404, headers=other)
        await house.ask("POST", f"{path}/messages", 404, headers=other, json={"content": "x"})
        await house.ask("POST", "/api/sessions", 404, headers=other, json={"agent": "echo"})
        assert (await house.ask("GET", "/api/agents", headers=other))["agents"] == []
        assert (await house.ask("GET", "/api/sessions", headers=other))["sessions"] == []


async def test_internal_endpoints_take_the_internal_secret(opened: Any) -> None:
    async with opened() as house:
        await house.ask("GET", "/api/internal/runners", 401)
        await house.ask("GET", "/api/internal/runners", headers=INTERNAL)
        await house.ask("GET", "/api/agents", 401, headers=INTERNAL)
    async with opened(internal_secret="") as house:
        await house.ask("GET", "/api/internal/runners", headers={})
    async with opened(internal_secret="", host="0.0.0.0") as house:
        await house.ask("GET", "/api/internal/runners", 503, headers={})


async def test_request_ids_are_taken_when_sane_and_minted_otherwise(opened: Any) -> None:
    async with opened() as house:
        taken = await house.http.simulate_get("/health", headers={"X-Request-Id": "abc-1"})
        assert taken.headers["x-request-id"] == "abc-1"
        for bad in ("a b", "x" * 200):
            answer = await house.http.simulate_get("/api/agents", headers={"X-Request-Id": bad})
            assert uuid.UUID(answer.headers["x-request-id"])


async def test_cors_answers_listed_origins_only_and_never_with_credentials(opened: Any) -> None:
    async with opened(allowed_origins=("https://app.example",)) as house:
        preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        answer = await house.http.simulate_options("/api/sessions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "Idempotency-Key" in answer.headers["access-control-allow-headers"]
        refused = await house.http.simulate_get("/api/agents", headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        stranger = await house.http.simulate_get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
        assert "access-control-allow-credentials" not in answer.headers
    async with opened() as house:
        silent = await house.http.simulate_get("/health", headers={"Origin": "https://app.example"})
        assert "access-control-allow-origin" not in silent.headers


async def test_probes_may_ask_for_headers_only(opened: Any) -> None:
    async with opened() as house:
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            got, head = await house.http.simulate_get(path), await house.http.simulate_head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == got.headers["content-type"]
        refused = await house.http.simulate_head("/api/agents", headers=AUTH)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST, OPTIONS")


async def test_a_refused_key_is_challenged_and_nothing_was_started(opened: Any) -> None:
    async with opened() as house:
        for path in ("/api/sessions", f"/api/sessions/{uuid.uuid4()}/messages"):
            answer = await house.http.simulate_post(path, json={})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json["admitted"] == "no"
        assert "admitted" not in (await house.http.simulate_get("/api/sessions")).json


async def test_methods_and_protocols_that_are_not_ours_are_refused(opened: Any) -> None:
    async with opened() as house:
        for method in ("FETCH", "WEBSOCKET"):  # the second is Falcon's own name for something else
            assert (await house.http.simulate_request(method, "/health")).status_code == 400
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    await Coordinator(CoordinatorConfig())({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close"}]


async def test_workers_starting_at_once_mint_one_initial_key(database_url: str, tmp_path: Path) -> None:
    folders = [tmp_path / "host1", tmp_path / "host2"]
    configs = [CoordinatorConfig(database_url=database_url, data_dir=folders[n % 2]) for n in range(6)]
    async with a_database(database_url) as db:
        minted = await asyncio.gather(*(ensure_initial_key(db, config) for config in configs))
        paths = {path for path in minted if path is not None}
        assert len(paths) == 1
        (path,) = paths
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        digest = keys.hash_of(path.read_text().strip(), await keys.server_key(db))
        assert await keys.tenant_of(db, digest) == "default"
        assert await db.fetch_value("SELECT count(*) FROM api_keys") == 1
        assert [entry for folder in folders for entry in folder.iterdir()] == [path]
        assert await ensure_initial_key(db, configs[0]) is None


# Service


async def test_health_counts_the_fleet_and_answers_without_a_database(opened: Any, tmp_path: Path) -> None:
    async with opened() as house:
        await house.with_runner(7)
        await runners.heartbeat(house.db, "r1", runners.Report(warm=2, running=1, waiting=3, warm_hits=4))
        health = await house.ask("GET", "/health", headers={})
        assert (health["status"], health["activeSessions"], health["remoteRunners"]) == ("ok", 4, 1)
        assert health["pool"]["maxCapacity"] == 7
        assert health["pool"]["preWarmHits"] == 4
        assert health["coordinatorId"] == "host-1"
        text = (await house.http.simulate_get("/metrics")).text
        assert 'ash_up{coordinator="host-1"} 1.0\n' in text
        assert 'ash_pool_sandboxes{state="waiting"} 3.0\n' in text
        assert "ash_pool_max_capacity 7.0\n" in text
    async with a_house(f"postgresql://ashd@/x?host={tmp_path}", tmp_path) as house:
        assert (await house.ask("GET", "/health", headers={}))["remoteRunners"] == 0
        ready = await house.http.simulate_get("/ready")
        assert (ready.status_code, ready.json["code"]) == (503, "database.unavailable")
        assert "retry-after" in ready.headers


# Agents


async def test_an_agent_is_deployed_in_four_ways(opened: Any, tmp_path: Path) -> None:
    folder = tmp_path / "roots" / "shell"
    folder.mkdir(parents=True)
    (folder / "agent.py").write_text("async def turn(message, session):\n    yield 'x'\n")
    async with opened(agent_roots=(str(tmp_path / "roots"),)) as house:
        first = (await house.ask("POST", "/api/agents", 201, json={**ECHO, "env": {"KEY": "secret"}}))["agent"]
        assert (first["version"], first["env"], first["tenantId"]) == (1, {"KEY": "***"}, "default")
        assert first["createdAt"].endswith("Z")
        assert "config" not in first
        by_path = (await house.ask("POST", "/api/agents", 201, json={"name": "echo", "path": str(folder)}))["agent"]
        assert (by_path["id"], by_path["version"], by_path["path"]) == (first["id"], 2, str(folder))
        assert by_path["env"] == {"KEY": "***"}
        prompt = {"name": "claude", "systemPrompt": "You are kind.", "config": {"a": 1}}
        assert (await house.ask("POST", "/api/agents", 201, json=prompt))["agent"]["config"] == {"a": 1}
        body = tar_gz({"agent.py": (folder / "agent.py").read_bytes()})
        by_tar = (await house.ask("PUT", "/api/agents/tar/bundle", 201, body=body))["agent"]
        assert by_tar["digest"] == by_path["digest"]
        pieces = [piece async for piece in bundles.read(house.db, by_tar["digest"])]
        with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
            assert archive.getnames() == ["agent.py"]
        listed = (await house.ask("GET", "/api/agents"))["agents"]
        assert [agent["name"] for agent in listed] == ["claude", "echo", "tar"]
        assert (await house.ask("GET", "/api/agents/echo"))["agent"]["version"] == 2
        assert await house.ask("DELETE", "/api/agents/tar") == {"ok": True}
        await house.ask("GET", "/api/agents/tar", 404)
        assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "name is required"),
        ({"name": "a b", "systemPrompt": "x"}, "name must match"),
        ({"name": "a"}, "exactly one of files, path, systemPrompt"),
        ({**ECHO, "systemPrompt": "x"}, "exactly one of"),
        ({"name": "a", "files": [{"path": "x", "content": "!"}]}, "content of x is not base64"),
        ({"name": "a", "files": [{"content": ""}]}, "files[0].path is required"),
        ({"name": "a", "files": [{"path": "../x", "content": ""}]}, 'Path "../x" escapes agent directory'),
        ({"name": "a", "files": [{"path": "README", "content": ""}]}, "Agent directory must contain CLAUDE.md"),
        ({"name": "a", "path": "/etc"}, "Deploying by path is off"),
        ({**ECHO, "env": {"A": 1}}, "env.A must be a string"),
    ],
)
async def test_a_bad_deployment_changes_nothing(opened: Any, body: dict[str, Any], complaint: str) -> None:
    async with opened() as house:
        answer = await house.ask("POST", "/api/agents", 400, json=body)
        assert complaint in answer["error"]
        assert (await house.ask("GET", "/api/agents"))["agents"] == []


async def test_deploying_by_path_stays_below_the_roots(opened: Any, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "CLAUDE.md").write_text("x")
    (root / "link").symlink_to(outside)
    async with opened(agent_roots=(str(root),)) as house:
        for path in (str(outside), str(root / ".." / "outside"), str(root / "link"), "relative", str(root / "none")):
            await house.ask("POST", "/api/agents", 400, json={"name": "a", "path": path})


async def test_uploads_are_bounded(opened: Any) -> None:
    async with opened(max_upload=50_000) as house:
        await house.ask("PUT", "/api/agents/a/bundle", 413, body=bytes(50_001))
        bomb = tar_gz({"agent.py": b"x", "zeros": bytes(60_000)})
        assert len(bomb) < 5_000
        await house.ask("PUT", "/api/agents/a/bundle", 413, body=bomb)
        await house.ask("PUT", "/api/agents/a/bundle", 400, body=b"")
        await house.ask("PUT", "/api/agents/a%20b/bundle", 400, body=b"")
        await house.ask("POST", "/api/agents", 413, json={"name": "a", "systemPrompt": "x" * 60_000})
    async with opened(max_json_body=100) as house:
        await house.ask("POST", "/api/sessions", 413, json={"agent": "x" * 200})


async def test_deleting_an_agent_ends_its_sessions(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        made = [await house.session() for _ in range(3)]
        await house.ask("DELETE", "/api/agents/echo")
        assert sorted(house.runner.ended) == sorted(session["id"] for session in made)
        for session in made:
            shown = (await house.ask("GET", f"/api/sessions/{session['id']}"))["session"]
            assert shown["status"] == "ended"


# Sessions


async def test_a_session_is_created_shown_listed_and_ended(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        made = await house.session(model="m1", allowedTools=["Bash"], systemPrompt="secret", labels={"team": "x"})
        assert (made["status"], made["runnerId"], made["model"]) == ("active", "r1", "m1")
        assert made["config"] == {"allowedTools": ["Bash"]}
        assert (made["lastSeq"], made["openTurnId"], made["generation"], made["parentSessionId"]) == (
            0,
            None,
            None,
            None,
        )
        path = f"/api/sessions/{made['id']}"
        assert (await house.ask("GET", path))["session"]["id"] == made["id"]
        listed = await house.ask(
            "GET", "/api/sessions?includeTotal=true&limit=1&label=team%3Dx&status=active&agent=echo"
        )
        assert ([one["id"] for one in listed["sessions"]], listed["total"]) == ([made["id"]], 1)
        assert "total" not in await house.ask("GET", "/api/sessions")
        for _ in range(2):
            assert (await house.ask("DELETE", path))["session"]["status"] == "ended"
        assert house.runner.ended == [made["id"]]


async def test_a_session_shows_what_its_sandbox_really_has(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        spec = b"runtime: echo\nnetwork: none\nlimits: {memoryMb: 999999, cpuPercent: 50, diskMb: 9, openFiles: 2000}"
        agent = {"name": "echo", "files": [{"path": "agent.yaml", "content": base64.b64encode(spec).decode()}]}
        await house.ask("POST", "/api/agents", 201, json=agent)
        asked = {"memoryMb": 64, "cpuPercent": 50, "diskMb": 1, "maxProcesses": 5, "openFiles": 2000, "fileMb": 1}
        made = await house.session(limits=asked)
        assert (made["isolation"], made["limits"]) == ("strict", {"memoryMb": 64, "openFiles": 1024})
        await house.ask("DELETE", f"/api/sessions/{made['id']}")
        shown = (await house.ask("GET", f"/api/sessions/{made['id']}"))["session"]
        assert (shown["isolation"], shown["limits"]) == (made["isolation"], made["limits"])
        house.runner.refuses = True
        await house.ask("POST", "/api/sessions", 503, json={"agent": "echo"})
        failed = (await house.ask("GET", "/api/sessions?status=error"))["sessions"][0]
        assert (failed["isolation"], failed["limits"]) == (None, None)


async def test_a_session_whose_sandbox_ran_out_of_memory_says_so_and_can_be_ended(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        path = f"/api/sessions/{(await house.session())['id']}"
        turn = (await house.ask("POST", f"{path}/messages", 202, json={"content": "x"}, headers=ASYNC))["turn"]["id"]
        story = [
            NewEvent(MESSAGE, 1, turn, "user", '{"content":"x"}'),
            NewEvent(events.TIMELINE, 2, turn, "lifecycle", '{"action":"memory_warning","percent":90}'),
            NewEvent(events.TIMELINE, 3, turn, "lifecycle", '{"action":"memory_kill","victim":"python3"}'),
            NewEvent(SETTLED, 4, turn, "lifecycle", '{"action":"turn_settled","dropped":7}', outcome="oom"),
            NewEvent(events.CLOSED, 5, None, "lifecycle", '{"action":"sandbox_closed","cause":"oom"}', cause="oom"),
        ]
        await events.record(house.db, [Batch(path.rpartition("/")[2], 1, story)])
        shown = (await house.ask("GET", path))["session"]
        assert (shown["status"], shown["statusCause"], shown["openTurnId"]) == ("paused", "oom", None)
        assert (await house.ask("GET", f"{path}/turns/{turn}"))["turn"]["outcome"] == "oom"
        told = (await house.ask("GET", f"{path}/events?type=lifecycle"))["events"]
        actions = ["memory_warning", "memory_kill", "turn_settled", "sandbox_closed"]
        assert [json.loads(one["data"])["action"] for one in told] == actions
        assert json.loads(told[2]["data"])["dropped"] == 7
        refused = await house.ask("POST", f"{path}/messages", 400, json={"content": "x"})
        assert refused["error"] == "Session is paused"
        assert (await house.ask("DELETE", path))["session"]["status"] == "ended"
        assert await house.ask("GET", f"{path}/events?type=lifecycle") == {"events": told}


async def test_creating_again_with_the_same_key_is_the_same_session(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        headers = {**AUTH, "Idempotency-Key": "k1"}
        one = await house.ask("POST", "/api/sessions", 201, json={"agent": "echo", "model": "m"}, headers=headers)
        two = await house.ask("POST", "/api/sessions", 201, json={"model": "m", "agent": "echo"}, headers=headers)
        assert one["session"]["id"] == two["session"]["id"]
        other = await house.ask("POST", "/api/sessions", 409, json={"agent": "echo"}, headers=headers)
        assert (other["code"], other["admitted"]) == ("idempotency.mismatch", "no")


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "agent is required"),
        ({"agent": "echo", "model": "x" * 101}, "model must have at most 100"),
        ({"agent": "echo", "extraEnv": {"A": 1}}, "extraEnv.A must be a string"),
        ({"agent": "echo", "extraEnv": []}, "extraEnv must be an object"),
        ({"agent": "echo", "permissionMode": "all"}, "permissionMode must be one of"),
        ({"agent": "echo", "allowedTools": "Bash"}, "allowedTools must be an array"),
        ({"agent": "echo", "mcpServers": {"a": 1}}, "mcpServers.a must be an object"),
        ({"agent": "echo", "limits": {"memoryMb": -1}}, "limits.memoryMb must be"),
        ({"agent": "echo", "limits": {"cpuPercent": 0}}, "limits.cpuPercent must be"),
        ({"agent": "echo", "limits": {"diskMb": 2**31}}, "limits.diskMb must be"),
        ({"agent": "echo", "limits": {"openFiles": "many"}}, "limits.openFiles must be"),
        ({"agent": "echo", "limits": {"memoryMb": 99}}, "limits.memoryMb must be at most the agent's 64"),
        ({"agent": "echo", "labels": {"a": "b c"}}, "labels must map"),
        ({"agent": "echo", "credentialId": "x"}, "Invalid or inaccessible credential"),
    ],
)
async def test_a_bad_session_is_refused_by_field(opened: Any, body: dict[str, Any], complaint: str) -> None:
    async with opened() as house:
        await house.with_runner()
        spec = base64.b64encode(b"runtime: echo\nlimits: {memoryMb: 64}").decode()
        agent = {"name": "echo", "files": [{"path": "agent.yaml", "content": spec}]}
        await house.ask("POST", "/api/agents", 201, json=agent)
        answer = await house.ask("POST", "/api/sessions", 400, json=body)
        assert complaint in answer["error"]
        assert answer["admitted"] == "no"
        assert (await house.ask("GET", "/api/sessions"))["sessions"] == []


async def test_free_objects_come_back_as_they_were_or_are_refused(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        odd = {"a\u0000": "\ud800", "é": [1.5, None]}
        body = json.dumps({"agent": "echo", "subagents": odd}).encode()
        assert (await house.ask("POST", "/api/sessions", 201, body=body))["session"]["config"] == {"subagents": odd}
        body = json.dumps({"agent": "echo", "extraEnv": {"A": "\ud800"}}).encode()
        answer = await house.ask("POST", "/api/sessions", 400, body=body)
        assert answer["error"] == "extraEnv.A must be a string without NUL or lone surrogates"
        body = b'{"agent": "echo", "subagents": {"a": 1e999}}'  # Python reads it as infinity, which no JSON can hold
        answer = await house.ask("POST", "/api/sessions", 400, body=body)
        assert (answer["code"], answer["admitted"]) == ("body.invalid_json", "no")
        zipped = {**AUTH, "Content-Encoding": "gzip"}
        answer = await house.ask("POST", "/api/sessions", 415, body=gzip.compress(b"{}"), headers=zipped)
        assert "Content-Encoding" in answer["error"]


async def test_sessions_say_why_they_cannot_start(opened: Any) -> None:
    async with opened() as house:
        missing = await house.ask("POST", "/api/sessions", 404, json={"agent": "x"})
        assert missing["error"] == 'Agent "x" not found'
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        nobody = await house.ask("POST", "/api/sessions", 503, json={"agent": "echo"})
        assert "No runners available" in nobody["error"]
        assert (nobody["retryable"], nobody["admitted"]) == (True, "no")
        await house.with_runner(1)
        house.runner.refuses = True
        refused = await house.ask("POST", "/api/sessions", 503, json={"agent": "echo"})
        assert refused["admitted"] == "unknown"
        house.runner.refuses = False
        await house.session()
        full = await house.ask("POST", "/api/sessions", 503, json={"agent": "echo"})
        assert "capacity reached" in full["error"]


async def test_a_fleet_that_refuses_says_why_and_when_to_come_again(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        await runners.heartbeat(house.db, "r1", runners.Report(refusing="memory"))
        answer = await house.http.simulate_post("/api/sessions", json={"agent": "echo"}, headers=AUTH)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "capacity reached" in answer.json["error"] and "r1: memory" in answer.json["error"]
        assert (answer.json["code"], answer.json["retryable"], answer.json["admitted"]) == ("fleet.full", True, "no")


@pytest.mark.parametrize(
    "path",
    [
        "/api/sessions/not-a-uuid",
        "/api/sessions/not-a-uuid/messages",
        f"/api/sessions/{uuid.UUID(int=0).hex}",
        f"/api/sessions/urn:uuid:{uuid.UUID(int=0)}",
        "/api/sessions?limit=0",
        "/api/sessions?limit=1001",
        "/api/sessions?limit=x",
        "/api/sessions?offset=-1",
        "/api/sessions?offset=99999999999999999999",
        "/api/sessions?status=nice",
        "/api/sessions?agent=%00",
        "/api/sessions?label=x",
        f"/api/sessions/{uuid.UUID(int=0)}/messages?limit=0",
        f"/api/sessions/{uuid.UUID(int=0)}/events?type=x",
        f"/api/sessions/{uuid.UUID(int=0)}/turns/x",
    ],
)
async def test_malformed_paths_and_queries_are_refused(opened: Any, path: str) -> None:
    async with opened() as house:
        assert (await house.ask("GET", path, 400))["code"] == "request.invalid"


# Messages


async def test_a_message_is_admitted_and_handed_to_the_stream(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        session = await house.session()
        path = f"/api/sessions/{session['id']}"
        body = {"content": "héllo", "includePartialMessages": True, "unknown": 1}
        headers = {**AUTH, "Idempotency-Key": "k"}
        answer = await house.http.simulate_post(f"{path}/messages", json=body, headers=headers)
        assert answer.headers["content-type"] == "text/event-stream"
        (admitted,) = house.readers.posted
        assert admitted.request == ('{"content": "h\\u00e9llo", "options": {"includePartialMessages": true}}')
        busy = await house.ask("POST", f"{path}/messages", 409, json={"content": "more"})
        assert (busy["code"], busy["retryable"], busy["admitted"]) == ("turn.open", True, "no")
        await house.http.simulate_post(f"{path}/messages", json=body, headers=headers)
        assert (house.readers.posted[1].replayed, house.readers.posted[1].turn.id) == (True, admitted.turn.id)
        turn = (await house.ask("GET", f"{path}/turns/{admitted.turn.id}"))["turn"]
        assert (turn["state"], turn["outcome"], turn["usage"]) == ("accepted", None, None)
        assert (await house.ask("GET", f"{path}/turns"))["turns"] == [turn]
        await house.ask("GET", f"{path}/turns/{uuid.uuid4()}", 404)


async def test_a_message_may_be_left_alone(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        session = await house.session()
        headers = {**AUTH, "Prefer": "respond-async"}
        path = f"/api/sessions/{session['id']}/messages"
        turn = (await house.ask("POST", path, 202, json={"content": "x"}, headers=headers))["turn"]
        assert [admitted.turn.id for admitted in house.readers.launched] == [turn["id"]]


@pytest.mark.parametrize(
    ("prefer", "status"),
    [
        ("Respond-Async", 202),
        ("return=minimal, respond-async; x=1, wait=10", 202),
        ("return=minimal", 200),
        ("x=respond-async", 200),
        ("respond-async-never", 200),
    ],
)
async def test_preferences_are_read_as_http_says(opened: Any, prefer: str, status: int) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        path = f"/api/sessions/{(await house.session())['id']}/messages"
        answer = await house.http.simulate_post(path, json={"content": "x"}, headers={**AUTH, "Prefer": prefer})
        assert answer.status_code == status
        assert answer.headers.get("preference-applied") == ("respond-async" if status == 202 else None)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "content is required"),
        ({"content": ""}, "content must not be empty"),
        ({"content": 5}, "content must be an array"),
        ({"content": "x" * 500_001}, "content must have at most 500000"),
        ({"content": []}, "content must be an array of 1 to 20"),
        ({"content": [{"type": "text", "text": "x"}] * 21}, "content must be an array of 1 to 20"),
        ({"content": [{"type": "video"}]}, "content[0].type must be one of"),
        ({"content": [{}]}, "content[0].type is required"),
        ({"content": [{"type": "text"}]}, "content[0].text must be a string"),
        ({"content": [{"type": "image"}]}, "content[0].source is required"),
        ({"content": "x", "maxTurns": 0}, "maxTurns must be"),
        ({"content": "x", "includePartialMessages": "yes"}, "includePartialMessages must be true or false"),
        ({"content": "x", "thinking": 1}, "thinking must be an object"),
    ],
)
async def test_a_bad_message_opens_no_turn(opened: Any, body: dict[str, Any], complaint: str) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        session = await house.session()
        answer = await house.ask("POST", f"/api/sessions/{session['id']}/messages", 400, json=body)
        assert complaint in answer["error"]
        assert (await house.ask("GET", f"/api/sessions/{session['id']}/turns"))["turns"] == []


async def test_messages_of_a_session_that_is_not_active_are_refused(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        session = await house.session()
        await house.ask("DELETE", f"/api/sessions/{session['id']}")
        answer = await house.ask("POST", f"/api/sessions/{session['id']}/messages", 400, json={"content": "x"})
        assert (answer["error"], answer["code"]) == ("Session is ended", "session.not_active")


async def test_messages_and_events_are_read_back(opened: Any) -> None:
    async with opened() as house:
        await house.with_runner()
        await house.ask("POST", "/api/agents", 201, json=ECHO)
        session = await house.session()
        path = f"/api/sessions/{session['id']}"
        await house.http.simulate_post(f"{path}/messages", json={"content": "x"}, headers=AUTH)
        turn_id = house.readers.posted[0].turn.id
        story = [
            NewEvent(MESSAGE, 1, turn_id, "user", '{"content":"x"}'),
            NewEvent(events.TIMELINE, 2, turn_id, "text", '{"text":"y"}'),
            NewEvent(MESSAGE, 3, turn_id, "assistant", '{"a":"\\ud800\\u0000"}'),
            NewEvent(MESSAGE, 4, turn_id, "result", "{}"),
            NewEvent(SETTLED, 5, turn_id, "lifecycle", "{}", outcome="completed", usage='{"n":1}'),
        ]
        await events.record(house.db, [Batch(session["id"], 1, story)])
        messages = (await house.ask("GET", f"{path}/messages"))["messages"]
        assert [(one["sequence"], one["role"]) for one in messages] == [(1, "user"), (3, "assistant"), (4, "assistant")]
        assert messages[1]["content"] == story[2].data
        after = (await house.ask("GET", f"{path}/messages?after=1&limit=1"))["messages"]
        assert [one["sequence"] for one in after] == [3]
        timeline = (await house.ask("GET", f"{path}/events"))["events"]
        assert [(one["sequence"], one["type"]) for one in timeline] == [(2, "text"), (5, "lifecycle")]
        assert [one["sequence"] for one in (await house.ask("GET", f"{path}/events?type=text"))["events"]] == [2]
        turn = (await house.ask("GET", f"{path}/turns/{turn_id}"))["turn"]
        assert (turn["outcome"], turn["firstSeq"], turn["lastSeq"], turn["usage"]) == ("completed", 1, 5, {"n": 1})
        await house.http.simulate_get(f"{path}/stream", headers={**AUTH, "Last-Event-ID": "1.2.0"})
        await house.http.simulate_get(f"{path}/stream?after=0", headers=AUTH)
        await house.http.simulate_get(f"{path}/stream", headers=AUTH)
        assert house.readers.attached == ["1.2.0", "0", None]


# Fleet


async def test_runners_register_beat_and_leave_over_http(opened: Any) -> None:
    async with opened() as house:
        post = "/api/internal/runners"
        beat = {"runnerId": "r9", "stats": {"warm": 2, "running": 1}, "activeCount": 3}
        await house.ask("POST", f"{post}/heartbeat", 404, json=beat, headers=INTERNAL)
        body = {"runnerId": "r9", "host": "10.0.0.9", "port": 4200, "maxSandboxes": 20}
        for wrong in ({"port": 0}, {"runnerId": "a b"}, {"runnerId": "a\n"}):
            await house.ask("POST", f"{post}/register", 400, json={**body, **wrong}, headers=INTERNAL)
        assert await house.ask("POST", f"{post}/register", json=body, headers=INTERNAL) == {"ok": True}
        await house.ask("POST", f"{post}/heartbeat", json=beat, headers=INTERNAL)
        answer = await house.ask("GET", post, headers=INTERNAL)
        assert (answer["count"], answer["hasLocal"]) == (1, False)
        runner = answer["runners"][0]
        assert (runner["runnerId"], runner["active"], runner["max"], runner["healthy"]) == ("r9", 3, 20, True)
        assert runner["memory"] == {"totalMb": 0, "usedMb": 0, "perSandboxMb": 0.0}
        await house.ask("POST", f"{post}/deregister", json={"runnerId": "r9"}, headers=INTERNAL)
        assert (await house.ask("GET", post, headers=INTERNAL))["count"] == 0
        assert await house.ask("GET", "/api/internal/registry", headers=INTERNAL) == {"addresses": []}


async def test_what_runners_say_of_themselves_is_shown_and_measured(opened: Any) -> None:
    async with opened() as house:
        post = "/api/internal/runners"
        body = {"runnerId": "r9", "host": "10.0.0.9", "port": 4200, "maxSandboxes": 20}
        silent = {**body, "runnerId": "r8"}
        said = {"isolation": "standard", "enforced": ["cgroup-memory", "uid"]}
        await house.ask("POST", f"{post}/register", 400, json={**body, "isolation": "total"}, headers=INTERNAL)
        for one in (silent, {**body, **said}):
            await house.ask("POST", f"{post}/register", json=one, headers=INTERNAL)
        usage = {"pssMb": 12.5, "cpuSeconds": 3.25, "processes": 4, "descriptors": 40, "diskMb": 1.0}
        odd = {"Robert'); DROP": 1, "x" * 99: 1, "Ü": 2}
        beat = {"runnerId": "r9", "usage": usage, "refusing": "memory\n", "orphans": {"process": 2, **odd}}
        for wrong in ({"usage": {"pssMb": -1}}, {"kills": {"oom": "x"}}, {"orphans": []}, {"refusing": 1}):
            await house.ask("POST", f"{post}/heartbeat", 400, json={**beat, **wrong}, headers=INTERNAL)
        await house.ask("POST", f"{post}/heartbeat", json={**beat, "kills": {"oom": 1}}, headers=INTERNAL)
        quiet, runner = (await house.ask("GET", post, headers=INTERNAL))["runners"]
        assert (runner["isolation"], runner["enforced"], runner["refusing"]) == (*said.values(), "memory")
        assert (runner["usage"], runner["orphans"], runner["kills"]) == (usage, {"process": 2}, {"oom": 1})
        assert (quiet["isolation"], quiet["enforced"], quiet["refusing"], quiet["kills"]) == (None, [], None, {})
        lines = set((await house.http.simulate_get("/metrics")).text.splitlines())
        assert lines >= {
            'ash_runner_isolation{level="standard",runner="r9"} 1.0',
            'ash_runner_refusing{runner="r9"} 1.0',
            'ash_runner_refusing{runner="r8"} 0.0',
            'ash_runner_pss_bytes{runner="r9"} 1.31072e+07',
            'ash_runner_processes{runner="r9"} 4.0',
            'ash_runner_descriptors{runner="r9"} 40.0',
            'ash_runner_disk_bytes{runner="r9"} 1.048576e+06',
            'ash_runner_cpu_seconds_total{runner="r9"} 3.25',
            'ash_runner_orphans_total{kind="process",runner="r9"} 2.0',
            'ash_runner_kills_total{cause="oom",runner="r9"} 1.0',
        }


async def test_a_runners_sandboxes_are_listed_as_the_runner_tells_them(opened: Any) -> None:
    async with opened() as house:
        path = "/api/internal/runners/r1/sandboxes"
        await house.ask("GET", path, 401)
        assert (await house.ask("GET", path, 404, headers=INTERNAL))["code"] == "runner.not_found"
        await house.ask("GET", "/api/internal/runners/%00/sandboxes", 404, headers=INTERNAL)
        await house.with_runner()
        sandbox, session = str(uuid.uuid4()), str(uuid.uuid4())
        limits = runner_pb2.Limits(memory_bytes=512 << 20, cpu_percent=200, processes=256, file_size_bytes=1536 << 10)
        house.runner.sandboxes = [
            runner_pb2.Sandbox(sandbox_id=sandbox, state="warm"),
            runner_pb2.Sandbox(
                sandbox_id=sandbox, session_id=session, epoch=2, state="running", isolation="strict", limits=limits,
                pss_bytes=3 << 19, memory_bytes=2 << 20, cpu_seconds=1.234, processes=3, descriptors=9,
                disk_bytes=1 << 20,
            ),
        ]  # fmt: skip
        warm, taken = (await house.ask("GET", path, headers=INTERNAL))["sandboxes"]
        assert (warm["sessionId"], warm["isolation"], warm["limits"], warm["pssMb"]) == (None, None, {}, 0.0)
        assert taken == {
            "sandboxId": sandbox,
            "sessionId": session,
            "epoch": 2,
            "state": "running",
            "isolation": "strict",
            "limits": {"memoryMb": 512, "cpuPercent": 200, "maxProcesses": 256, "fileMb": 1.5},
            "pssMb": 1.5,
            "memoryMb": 2.0,
            "cpuSeconds": 1.23,
            "processes": 3,
            "descriptors": 9,
            "diskMb": 1.0,
        }
        house.runner.sandboxes = None
        assert (await house.ask("GET", path, 503, headers=INTERNAL))["code"] == "peer.unavailable"
