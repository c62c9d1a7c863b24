"""Taking requests apart: bodies within their limits, and fields that name themselves when they are wrong.

Unknown fields are ignored (api.md §1). Everything that reaches the database as plain text is free of NUL and lone
surrogates here, for Postgres refuses them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from falcon.asgi import Request

from ashd.coordinator import problems
from ashd.errors import Rejected

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


async def json_object(req: Request, limit_bytes: int, *, optional: bool = False, advice: str = "") -> Fields:
    """The body as a JSON object; an empty one counts as {} where the body is `optional`."""
    raw = await _read(req, limit_bytes, advice)
    if not raw and optional:
        return Fields({})
    if not raw:
        raise Rejected("The request needs a JSON body", code="body.missing")
    media_type = (req.content_type or "application/json").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise Rejected(f'The body must be application/json, not "{media_type}"', code="body.media_type", status=415)
    if (req.get_header("Content-Encoding") or "identity").lower() != "identity":
        raise Rejected("The body must not have a Content-Encoding", code="body.media_type", status=415)
    try:
        value = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"The body is not valid JSON: {error}", code="body.invalid_json") from error
    if not isinstance(value, dict):
        raise Rejected("The body must be a JSON object", code="body.invalid_json")
    return Fields(value)


async def save_body(req: Request, target: Path, limit_bytes: int) -> None:
    """Write the body to `target`, piece by piece."""
    _check_length(req, limit_bytes, "")
    received = 0
    # Opened and written on this thread: pieces are small and go to the page cache, a thread hop costs more.
    with target.open("wb") as file:
        async for piece in req.stream:
            received += len(piece)
            if received > limit_bytes:
                problems.too_large(limit_bytes)
            file.write(piece)
    _check_complete(req, received)


async def _read(req: Request, limit_bytes: int, advice: str) -> bytes:
    _check_length(req, limit_bytes, advice)
    body = bytearray()
    async for piece in req.stream:
        body += piece
        if len(body) > limit_bytes:
            problems.too_large(limit_bytes, advice)
    _check_complete(req, len(body))
    return bytes(body)


def _check_length(req: Request, limit_bytes: int, advice: str) -> None:
    if req.content_length is not None and req.content_length > limit_bytes:
        problems.too_large(limit_bytes, advice)


def _check_complete(req: Request, received: int) -> None:
    if req.content_length is not None and received < req.content_length:
        raise Rejected("The body ended before its Content-Length", code="body.incomplete")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:32]} is too large a number")  # as Infinity it could not be written back
    return value


class Fields:
    """A JSON object being taken apart. Each method raises Rejected naming the field and the rule; null = absent."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self.values = values
        self._where = where

    def text(self, name: str, *, most: int, pattern: re.Pattern[str] | None = None) -> str | None:
        """A string of at most `most` characters."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.refuse(name, "must be a string")
        if len(value) > most:
            self.refuse(name, f"must have at most {most} characters, has {len(value)}")
        if pattern is not None and not pattern.fullmatch(value):
            self.refuse(name, f"must match ^{pattern.pattern}$")
        if _UNSTORABLE.search(value):
            self.refuse(name, "must not contain NUL or lone surrogates")
        return value

    def required_text(self, name: str, *, most: int, pattern: re.Pattern[str] | None = None) -> str:
        """A string that has to be there and not empty."""
        value = self.text(name, most=most, pattern=pattern)
        if not value:
            self.refuse(name, "is required")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        """One of a few words."""
        value = self.values.get(name)
        if value is not None and value not in choices:
            self.refuse(name, f"must be one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool:
        """true or false; false when absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return bool(value)

    def integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number between `least` and `most`."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(name, f"must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number between `least` and `most`."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            self.refuse(name, f"must be a number from {least:g} to {most:g}")
        return value

    def texts(self, name: str, *, most: int = 1000) -> list[str] | None:
        """An array of strings."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value) or len(value) > most:
            self.refuse(name, f"must be an array of at most {most} strings")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "must be an object")
        return value

    def env(self, name: str) -> dict[str, str] | None:
        """An object of environment variables."""
        value = self.mapping(name)
        for key, text in (value or {}).items():
            if not _ENV_NAME.fullmatch(key):
                self.refuse(name, f"has the name {json.dumps(key)[:80]}; names match ^{_ENV_NAME.pattern}$")
            if not isinstance(text, str) or _UNSTORABLE.search(text):
                self.refuse(f"{name}.{key}", "must be a string without NUL or lone surrogates")
        return value

    def objects(self, name: str, *, least: int = 1, most: int) -> list[Fields] | None:
        """An array of objects, each to be taken apart in its turn."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not least <= len(value) <= most:
            self.refuse(name, f"must be an array of {least} to {most} objects")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                self.refuse(f"{name}[{index}]", "must be an object")
        return [Fields(item, f"{self._where}{name}[{index}].") for index, item in enumerate(value)]

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raise the error for a field."""
        raise Rejected(f"{self._where}{name} {rule}", code="request.invalid")


def path_id(value: str, name: str) -> str:
    """A uuid in a path, in its canonical form (RFC 9562: small letters)."""
    if not UUID.fullmatch(value):
        raise Rejected(f"{name} in the path must be a uuid", code="request.invalid")
    return value.lower()


def query_text(req: Request, name: str, *, most: int = 255) -> str | None:
    """A string in the query."""
    return Fields({name: req.get_param(name)}).text(name, most=most)


def query_choice(req: Request, name: str, choices: tuple[str, ...]) -> str | None:
    """One of a few words in the query."""
    return Fields({name: req.get_param(name)}).choice(name, choices)


def query_integer(req: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number in the query."""
    raw = req.get_param(name)
    if raw is None:
        return default
    value = int(raw) if re.fullmatch(r"-?[0-9]{1,19}", raw) else None
    if value is None or not least <= value <= most:
        Fields({}).refuse(name, f"must be a whole number from {least} to {most}")
    return value


def prefers(req: Request, preference: str) -> bool:
    """Whether the header Prefer names `preference`, as a token without a value (RFC 7240)."""
    given = (req.get_header("Prefer") or "").split(",")
    return preference in (one.partition(";")[0].strip().lower() for one in given)


def idempotency_key(req: Request) -> str | None:
    """The Idempotency-Key header, if any."""
    key = req.get_header("Idempotency-Key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Rejected("Idempotency-Key must have 1 to 255 printable ASCII characters", code="request.invalid")
    return key


def fingerprint(fields: Fields) -> str:
    """What tells whether two requests with one Idempotency-Key are the same."""
    canonical = json.dumps(fields.values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
