"""Errors on the wire: which gRPC status a family of errors has, and back.

The stable code travels in the trailing metadata `ashd-code`, the text as the status' details.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import grpc

from ashd.errors import AshdError, Conflict, Fault, NotFound, Rejected, SandboxFailed, Unavailable

_CODE = "ashd-code"

FULL = "runner.full"
STALE = "lease.stale"
AHEAD = "cursor.ahead"
NOT_HERE = "session.not_here"


def status_of(error: AshdError) -> grpc.StatusCode:
    """The status of an error's family."""
    if error.code == FULL:
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    match error:
        case NotFound():
            return grpc.StatusCode.NOT_FOUND
        case Conflict():
            return grpc.StatusCode.ABORTED
        case Rejected():
            return grpc.StatusCode.FAILED_PRECONDITION
        case Unavailable() | SandboxFailed():  # this runner can't; another may
            return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INTERNAL


async def abort(context: grpc.aio.ServicerContext[object, object], error: AshdError) -> NoReturn:
    """Ends a call with `error`."""
    await context.abort(status_of(error), error.message, ((_CODE, error.code),))
    raise AssertionError("abort returned")


def error_of(failed: grpc.aio.AioRpcError, what: str) -> AshdError:
    """The error a failed call stands for; `what` names the callee for messages."""
    details = failed.details() or failed.code().name
    trailing: Iterable[tuple[str, str | bytes]] = failed.trailing_metadata() or ()  # type: ignore[assignment]
    code = next((str(value) for key, value in trailing if key == _CODE), None)
    match failed.code():
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(details, code=code)
        case grpc.StatusCode.ABORTED:
            return Conflict(details, code=code, retryable=True)
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.INVALID_ARGUMENT:
            return Rejected(details, code=code)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Unavailable(details, code=code or FULL)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            if code is not None:  # it has answered: it can't
                return Unavailable(details, code=code)
            return Unavailable(f"{what} does not answer: {details}", code="peer.unavailable")
        case grpc.StatusCode.UNAUTHENTICATED:
            return Fault(f"{what} refused our internal secret: ASH_INTERNAL_SECRET differs", code="secret.mismatch")
    return Fault(f"{what} failed: {details}", code=code)
