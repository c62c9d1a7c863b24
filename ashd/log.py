"""One way to write a log: a constant phrase and fields, as JSON lines or as an aligned console, always to stderr.

    log = get(__name__).bind(session=session_id)
    log.info("session started", runner=runner_id, took_ms=12)

Phrases never contain values, so they can be searched and counted. No user content, no secret (style: Logs).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from ashd.config.schema import LogConfig

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_PHRASE_WIDTH = 36


class Log:
    """A logger with context bound to it."""

    def __init__(self, logger: logging.Logger, fields: Mapping[str, Any]) -> None:
        self._logger = logger
        self._fields = fields

    def bind(self, **fields: Any) -> Log:
        """The same logger with more context, for everything it writes."""
        return Log(self._logger, {**self._fields, **fields})

    def debug(self, phrase: str, /, **fields: Any) -> None:
        self._write(logging.DEBUG, phrase, fields)

    def info(self, phrase: str, /, **fields: Any) -> None:
        self._write(logging.INFO, phrase, fields)

    def warning(self, phrase: str, /, **fields: Any) -> None:
        self._write(logging.WARNING, phrase, fields)

    def error(self, phrase: str, /, **fields: Any) -> None:
        self._write(logging.ERROR, phrase, fields)

    def exception(self, phrase: str, /, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._write(logging.ERROR, phrase, fields, exc_info=True)

    def _write(self, level: int, phrase: str, fields: Mapping[str, Any], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", phrase, exc_info=exc_info, extra={"fields": {**self._fields, **fields}})


def get(name: str) -> Log:
    """The log of a module; may be called at import, before setup()."""
    return Log(logging.getLogger(name), {})


def setup(config: LogConfig) -> None:
    """Send every record of this process, libraries' too, to stderr in the configured form. May be called again."""
    console = config.format == "console" or (config.format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Console() if console else _Json())
    logging.basicConfig(level=_LEVELS[config.level], handlers=[handler], force=True)
    logging.captureWarnings(True)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


class _Json(logging.Formatter):
    """One object a line: ts, level, log, pid, msg, the fields, and `exc` with a traceback.

    SECURITY: ASCII-escaped, so no value can begin a line of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": _timestamp(record, time.gmtime, "%Y-%m-%dT%H:%M:%S") + "Z",
            "level": record.levelname.lower(),
            "log": record.name,
            "pid": os.getpid(),
            "msg": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exc"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Console(logging.Formatter):
    """`12:30:01.123 info    runner.supervisor  session started    session=… took_ms=12`, tracebacks below."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_printable(value)}" for key, value in _fields(record).items())
        level, name = record.levelname.lower(), record.name.removeprefix("ashd.")
        phrase = _printable(record.getMessage(), quote=False)
        line = (
            f"{_timestamp(record, time.localtime, '%H:%M:%S')} {level:<7} {name:<20} {phrase:<{_PHRASE_WIDTH}} {fields}"
        )
        line = line.rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _timestamp(record: logging.LogRecord, clock: Any, form: str) -> str:
    return f"{time.strftime(form, clock(record.created))}.{int(record.msecs):03d}"


def _printable(value: Any, *, quote: bool = True) -> str:
    """SECURITY: control characters (line ends, terminal escapes) are shown as escapes, never sent to the terminal."""
    text = str(value)
    if text.isprintable() and not (quote and (" " in text or not text)):
        return text
    return json.dumps(text) if quote else text.encode("unicode_escape").decode("ascii")
