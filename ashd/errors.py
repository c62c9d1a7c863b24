"""The families of errors; the family decides HTTP status class, gRPC status, retry and log level, the leaf names the
fact.

Covers: what may be raised across rooms. Leaves out: how an error looks on the wire (coordinator/problems.py,
wire/status.py).
"""

from __future__ import annotations


class AshdError(Exception):
    """Base of every error ashd raises on purpose.

    `message` says what was wrong and what to do; `code` is stable and documented (docs/errors.md).
    """

    code = "fault"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class Rejected(AshdError):
    """The request is wrong or not possible now; nothing was changed. HTTP 4xx."""

    code = "request.invalid"
    status = 400

    def __init__(
        self, message: str, *, code: str | None = None, status: int | None = None, retryable: bool = False
    ) -> None:
        super().__init__(message, code=code)
        self.retryable = retryable
        if status is not None:
            self.status = status


class NotFound(Rejected):
    """What the request names does not exist (or belongs to another tenant, which looks the same)."""

    code = "not_found"
    status = 404


class Conflict(Rejected):
    """The request is well formed but what it names is in another state."""

    code = "conflict"
    status = 409


class Unavailable(AshdError):
    """Something ashd needs does not answer now; the same request may succeed later. HTTP 503 with Retry-After."""

    code = "unavailable"
    retryable = True

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class SandboxFailed(AshdError):
    """A sandbox could not be started or ended by itself; becomes an event of its session."""

    code = "sandbox.failed"


class Fault(AshdError):
    """A bug or a broken invariant of ours. HTTP 500."""


class ConfigError(AshdError):
    """The configuration can't be used; `problems` lists everything wrong with it, each with its origin."""

    code = "config.invalid"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
