"""Disk limits from one end to the other: an agent fills its workspace, through the API, on a runner that limits it."""

from __future__ import annotations

import json

import pytest

from tests.integration.fleet import Api, Fleet, Stream, eventually

MIB = 1024 * 1024
LIMIT = 16 * MIB
RUNNER = f"warm_sandboxes: 0\nlimits:\n  disk: {LIMIT}\n"

FILLER = {
    "agent.py": """
import errno, os, time

def fill():
    with open("filled", "ab", 0) as file:
        while True:
            file.write(b"x" * 65536)
            time.sleep(0.005)

def flood():
    number = 0
    while True:
        open(f"empty{number}", "w").close()
        number += 1

async def turn(message, session):
    try:
        if message.text == "fill":
            fill()
        elif message.text == "flood":
            flood()
        elif message.text == "delete":
            os.unlink("filled")
        else:
            with open("small", "wb", 0) as file:
                file.write(b"x" * 1000)
        yield "fine"
    except OSError as error:
        yield errno.errorcode[error.errno]
"""
}


@pytest.fixture
def api(fleet: Fleet) -> Api:
    api = fleet.add_coordinator()
    fleet.add_runner(RUNNER)
    api.deploy("filler", FILLER)
    return api


def ask(api: Api, session: str, text: str) -> Stream:
    return api.send(session, text, includePartialMessages=True)


def _log_texts(fleet: Fleet) -> list[str]:
    files = (fleet.folder / "runner-0" / "sandboxes").glob("*/logs")
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


def test_an_agent_that_fills_its_disk_gets_an_error_and_goes_on_when_it_has_deleted(api: Api, fleet: Fleet) -> None:
    greedy, neighbour = api.session("filler"), api.session("filler")
    assert ask(api, greedy, "fill").text in ("EFBIG", "EDQUOT", "ENOSPC")
    assert ask(api, neighbour, "write").text == "fine"
    watched = "disk-watch" in fleet.runners[0].log.read_text()
    if watched:
        assert any("writing fails" in text for text in _log_texts(fleet))
    assert ask(api, greedy, "delete").text == "fine"

    def writes_again() -> bool:
        return ask(api, greedy, "write").text == "fine"

    eventually(writes_again)
    assert api.get_session(greedy)["status"] == api.get_session(neighbour)["status"] == "active"


def test_an_agent_that_floods_its_disk_with_files_harms_only_itself(api: Api, fleet: Fleet) -> None:
    flood, neighbour = api.session("filler"), api.session("filler")
    stream: Stream = ask(api, flood, "flood")
    if "disk-quota" in fleet.runners[0].log.read_text():
        assert stream.text in ("EDQUOT", "ENOSPC")
        return
    assert stream.done["outcome"] == "failed"
    assert stream.named("error")[0].data["code"] == "sandbox.disk"
    eventually(lambda: api.get_session(flood)["status"] == "paused")
    assert ask(api, neighbour, "write").text == "fine"
