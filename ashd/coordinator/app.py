"""The HTTP application of one worker: which resource answers which path, and what surrounds them all."""

from __future__ import annotations

import json
import re
import time
import uuid
from typing import Any

from falcon import MEDIA_JSON
from falcon.asgi import App, Request, Response
from falcon.media import JSONHandler

from ashd import log
from ashd.coordinator import agents, docs, internal, messages, metrics, problems, service, sessions
from ashd.coordinator.auth import Authentication
from ashd.coordinator.services import Services

_log = log.get(__name__)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ALLOWED_HEADERS = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, Prefer, X-Request-Id"
_ALLOWED_METHODS = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
_PREFLIGHT_AGE_S = 600


def build_app(services: Services) -> App[Any, Any]:
    """The application; has no side effects, and needs services that are open only once a request comes."""
    # ORDER: the request id first, so that whatever refuses a request later can name it; CORS before authentication,
    # so that a browser may read the refusal.
    app: App[Any, Any] = App(
        middleware=[
            RequestId(),
            Cors(services.config.allowed_origins),
            Authentication(services.config, services.db),
        ]
    )
    app.req_options.strip_url_path_trailing_slash = True
    # ASCII-escaped, for what agents and clients put into free objects need not be valid UTF-8 (lone surrogates).
    app.resp_options.media_handlers[MEDIA_JSON] = JSONHandler(dumps=json.dumps)
    problems.install(app)
    for path, resource in _routes(services):
        app.add_route(path, resource)
    return app


def _routes(services: Services) -> list[tuple[str, object]]:
    totals = service.FleetTotals(services)
    deployments = agents.Deployments(services)
    return [
        ("/health", service.Health(services, totals)),
        ("/ready", service.Ready(services)),
        ("/metrics", service.Metrics(services, totals)),
        ("/openapi.json", docs.Document()),
        ("/docs", docs.Page()),
        ("/api/agents", agents.Agents(services, deployments)),
        ("/api/agents/{name}", agents.Agent(services)),
        ("/api/agents/{name}/bundle", agents.AgentBundle(services, deployments)),
        ("/api/sessions", sessions.Sessions(services)),
        ("/api/sessions/{session_id}", sessions.Session(services)),
        ("/api/sessions/{session_id}/stream", sessions.SessionStream(services)),
        ("/api/sessions/{session_id}/messages", messages.Messages(services)),
        ("/api/sessions/{session_id}/events", messages.SessionEvents(services)),
        ("/api/sessions/{session_id}/turns", messages.Turns(services)),
        ("/api/sessions/{session_id}/turns/{turn_id}", messages.Turn(services)),
        ("/api/internal/registry", internal.Registry(services)),
        ("/api/internal/runners", internal.Runners(services)),
        ("/api/internal/runners/register", internal.RunnerRegister(services)),
        ("/api/internal/runners/heartbeat", internal.RunnerHeartbeat(services)),
        ("/api/internal/runners/deregister", internal.RunnerDeregister(services)),
        ("/api/internal/runners/{runner_id}/sandboxes", internal.RunnerSandboxes(services)),
    ]


class RequestId:
    """Takes or mints X-Request-Id, echoes it, logs each request with it, and measures it."""

    async def process_request(self, req: Request, resp: Response) -> None:
        """Give the request its id."""
        given = req.get_header("X-Request-Id") or ""
        req.context.request_id = given if _SANE_REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        req.context.begun = time.monotonic()
        resp.set_header("X-Request-Id", req.context.request_id)

    async def process_resource(self, req: Request, resp: Response, resource: object, params: dict[str, Any]) -> None:
        """ORDER: before authentication, so that a refused key, too, says that nothing was started."""
        if req.method == getattr(resource, "starts_work_on", None):
            problems.starts_work(req)

    async def process_response(self, req: Request, resp: Response, resource: object, req_succeeded: bool) -> None:
        """Log and measure it; of a stream, this is its beginning."""
        if not hasattr(req.context, "begun"):
            return  # refused before any middleware: Falcon's pseudo-method WEBSOCKET
        took_s = time.monotonic() - req.context.begun
        metrics.answered(req.method, req.uri_template, resp.status_code, took_s)
        _log.debug(
            "request answered",
            request=problems.request_id(req),
            method=req.method,
            route=req.uri_template,
            status=resp.status_code,
            took_ms=round(took_s * 1000, 1),
        )


class Cors:
    """CORS for the configured origins, streams included (Fetch standard, CORS protocol).

    SECURITY: an origin is answered only when it is in the list, and Access-Control-Allow-Credentials is never sent:
    keys travel in a header, not in cookies.
    """

    def __init__(self, allowed_origins: tuple[str, ...]) -> None:
        self._allowed = frozenset(allowed_origins)

    async def process_request(self, req: Request, resp: Response) -> None:
        """Say who may read the answer, before anything can refuse."""
        if not self._allowed:
            return
        origin = req.get_header("Origin")
        resp.append_header("Vary", "Origin")
        if "*" in self._allowed:
            resp.set_header("Access-Control-Allow-Origin", "*")
        elif origin in self._allowed:
            resp.set_header("Access-Control-Allow-Origin", str(origin))
        else:
            return
        resp.set_header("Access-Control-Expose-Headers", "X-Request-Id, Retry-After")
        if req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method"):
            resp.set_header("Access-Control-Allow-Methods", _ALLOWED_METHODS)
            resp.set_header("Access-Control-Allow-Headers", _ALLOWED_HEADERS)
            resp.set_header("Access-Control-Max-Age", str(_PREFLIGHT_AGE_S))
