"""A log line is one line, with its fields, whatever the fields hold."""

import json
import logging
from collections.abc import Iterator

import pytest

from ashd import log
from ashd.config.schema import LogConfig

HOSTILE = 'a b\n{"forged": 1}\x1b[31m'


@pytest.fixture(autouse=True)
def root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


def test_json_is_one_object_a_line_with_bound_and_own_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(LogConfig(format="json"))
    log.get("ashd.runner.x").bind(session="s1").info("session started", took_ms=12, text=HOSTILE)
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert {
        "session": "s1",
        "took_ms": 12,
        "text": HOSTILE,
        "msg": "session started",
        "level": "info",
    }.items() <= record.items()


def test_the_console_shows_control_characters_and_never_sends_them(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(LogConfig(format="console"))
    log.get("ashd.runner.x").warning("odd agent", text=HOSTILE)
    logging.getLogger("library").warning(HOSTILE)
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 2
    assert "\x1b" not in printed


def test_below_the_configured_level_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(LogConfig(format="json", level="warning"))
    log.get("ashd.x").info("quiet")
    assert capsys.readouterr().err == ""


def test_an_exception_carries_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(LogConfig(format="json"))
    try:
        raise KeyError("lost")
    except KeyError:
        log.get("ashd.x").exception("failed", part="x")
    assert "KeyError: 'lost'" in json.loads(capsys.readouterr().err)["exc"]
