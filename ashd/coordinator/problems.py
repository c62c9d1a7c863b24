"""Turning whatever went wrong into the one error envelope of the API (api.md §1).

Covers: ashd's families of errors, Falcon's own HTTP errors, and the unexpected. Leaves out: failures after a stream
has begun (stream.py), and gRPC (wire/status.py).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import falcon
from falcon.asgi import App, Request, Response

from ashd import log
from ashd.errors import AshdError, Rejected, Unavailable

_log = log.get(__name__)

# Falcon's own errors, by status: code and what to do about it.
_FALCON = {
    400: ("request.invalid", "The request is malformed"),
    404: ("route.not_found", "No such endpoint; see /docs"),
    405: ("method.not_allowed", "This endpoint doesn't know that method"),
    413: ("body.too_large", "The request body is too large"),
    415: ("body.media_type", "The request body has a media type this endpoint doesn't take"),
}


def install(app: App[Any, Any]) -> None:
    """Have `app` answer every error with the envelope."""
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _of_falcon)
    app.add_error_handler(AshdError, _of_ashd)


def starts_work(req: Request) -> None:
    """This request starts something (its resource has `starts_work_on`); its errors say whether it has. Until
    admitted() it has not.
    """
    req.context.admitted = "no"


def admitted(req: Request) -> None:
    """From here on an error leaves the outcome open."""
    req.context.admitted = "unknown"


async def _of_ashd(req: Request, resp: Response, error: AshdError, params: dict[str, Any]) -> None:
    if isinstance(error, Rejected):
        status = error.status
        if status == 401:
            resp.set_header("WWW-Authenticate", "Bearer")  # RFC 9110, 15.5.2
        if hasattr(req.context, "admitted"):
            req.context.admitted = "no"  # whatever was begun has been given up
    elif isinstance(error, Unavailable):
        status = 503
        resp.set_header("Retry-After", str(max(1, math.ceil(error.retry_after_s))))
    else:
        return await _unexpected(req, resp, error, params)
    if error.code == "database.outcome_unknown" and hasattr(req.context, "admitted"):
        admitted(req)
    _write(req, resp, status, error.message, error.code, retryable=error.retryable)
    return None


async def _of_falcon(req: Request, resp: Response, error: falcon.HTTPError, params: dict[str, Any]) -> None:
    status = error.status_code
    code, text = _FALCON.get(status, ("request.invalid" if status < 500 else "fault", error.title or "Error"))
    for name, value in dict(error.headers or {}).items():  # e.g. Allow
        resp.set_header(name, value)
    _write(req, resp, status, error.description or text, code, retryable=False)


async def _unexpected(req: Request, resp: Response, error: Exception, params: dict[str, Any]) -> None:
    """The door for bugs: the log has the traceback, the client the request id to find it by."""
    _log.exception("request failed", request=request_id(req), method=req.method, route=req.uri_template)
    if hasattr(req.context, "admitted"):
        admitted(req)
    text = f"Internal error; the coordinator's log has it under request {request_id(req)}"
    _write(req, resp, 500, text, "fault", retryable=False)


def unread(status: int, why: str) -> bytes:
    """The envelope for a request that the server has refused before there was anybody to ask."""
    code, text = ("fault", "Internal error") if status == 500 else ("request.invalid", f"Unreadable: {why:.200}")
    return json.dumps({"error": text, "statusCode": status, "code": code, "retryable": False}).encode("ascii")


def request_id(req: Request) -> str:
    """The id of the request, once the middleware has given it one."""
    return str(getattr(req.context, "request_id", "-"))


def _write(req: Request, resp: Response, status: int, text: str, code: str, *, retryable: bool) -> None:
    body: dict[str, Any] = {"error": text, "statusCode": status, "code": code, "retryable": retryable}
    if hasattr(req.context, "admitted"):
        body["admitted"] = req.context.admitted
    resp.status = status
    resp.content_type = falcon.MEDIA_JSON
    resp.stream = None
    resp.sse = None
    resp.data = None
    resp.media = None
    resp.text = json.dumps(body)


def too_large(limit_bytes: int, advice: str = "") -> NoReturn:
    """Refuse a body of more than `limit_bytes`."""
    text = f"The request body is larger than {limit_bytes} bytes" + (f"; {advice}" if advice else "")
    raise Rejected(text, code="body.too_large", status=413)
