"""Attacks by what a tenant uploads: bundles with hostile members, file lists with hostile paths, hostile agent.yaml.

Each archive is refused with a 4xx that names the reason, or becomes an agent whose files are all inside its own
workspace; no file of the host changes either way, and nobody notices.
"""

from __future__ import annotations

import base64
import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.scene import MIB, UPLOAD, Scene
from tests.integration.fleet import Answer

AGENT = b"async def turn(message, session):\n    import os\n    yield ' '.join(sorted(os.listdir('.')))\n"

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def symlink(name: str, target: str) -> Member:
    return member(name, kind=tarfile.SYMTYPE, link=target)


def archive(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for info, content in [member("agent.py", AGENT), *members]:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def upload(scene: Scene, body: bytes) -> Answer:
    name = f"upload-{os.urandom(6).hex()}"
    answer = scene.api.call("PUT", f"/api/agents/{name}/bundle", raw=body, Content_Type="application/gzip")
    answer.headers.add_header("X-Name", name)
    return answer


def header_that_claims(size: int) -> bytes:
    """A member whose header claims more than follows."""
    info = tarfile.TarInfo("huge")
    info.size = size
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)


def long_name_header(size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"x" * MIB)


def outside(scene: Scene) -> str:
    return f"{scene.host.folder}/{scene.mark}"


REFUSED: dict[str, Callable[[Scene], bytes]] = {
    "an absolute path": lambda scene: archive(member(outside(scene), b"x")),
    "a path with dots": lambda scene: archive(member("../" * 12 + outside(scene).lstrip("/"), b"x")),
    "dots in the middle": lambda scene: archive(member(f"a/b/../../../../{scene.mark}", b"x")),
    "an absolute path in an extended header": lambda scene: archive(
        member("harmless", b"x", pax_headers={"path": outside(scene)})
    ),
    "a link target in an extended header": lambda scene: archive(
        member("harmless", kind=tarfile.SYMTYPE, link="agent.py", pax_headers={"linkpath": "/etc"})
    ),
    "a symlink to an absolute path": lambda scene: archive(symlink("out", str(scene.host.folder))),
    "a symlink out of the folder": lambda scene: archive(symlink("out", "../../../../../../etc/passwd")),
    "a symlink out by another symlink": lambda scene: archive(
        symlink("deep/up", ".."), symlink("out", "deep/up/../../..")
    ),
    "a file written through a symlink": lambda scene: archive(
        symlink("door", str(scene.host.folder)), member(f"door/{scene.mark}", b"x")
    ),
    "a file written through a symlink that stays inside": lambda scene: archive(
        member("folder/", kind=tarfile.DIRTYPE), symlink("door", "folder"), member("door/file", b"x")
    ),
    "a symlink that goes round": lambda scene: archive(symlink("a", "b"), symlink("b", "a")),
    "a hard link to a file of the host": lambda scene: archive(
        member("hard", kind=tarfile.LNKTYPE, link="/etc/passwd")
    ),
    "a hard link by dots": lambda scene: archive(member("hard", kind=tarfile.LNKTYPE, link="../../../etc/passwd")),
    "a hard link to a symlink": lambda scene: archive(
        symlink("soft", "agent.py"), member("hard", kind=tarfile.LNKTYPE, link="soft")
    ),
    "a character device": lambda scene: archive(member("device", kind=tarfile.CHRTYPE, devmajor=1, devminor=1)),
    "a block device": lambda scene: archive(member("disk", kind=tarfile.BLKTYPE, devmajor=8, devminor=0)),
    "a fifo": lambda scene: archive(member("pipe", kind=tarfile.FIFOTYPE)),
    "a kind of member nobody knows": lambda scene: archive(member("what", kind=b"Z")),
    "a name with a line end": lambda scene: archive(member("new\nline", b"x")),
    "a name with terminal escapes": lambda scene: archive(member("\x1b[2J", b"x")),
    "a name that is too long": lambda scene: archive(member("x" * 300, b"x")),
    "a path that is too deep": lambda scene: archive(member("a/" * 600 + "b", b"x")),
    "a bomb of zeros": lambda scene: gzip.compress(bytes(3 * UPLOAD), 1),
    "a size that isn't there": lambda scene: header_that_claims(8 * 1024**3),
    "a name of a gigabyte": lambda scene: long_name_header(1024**3),
    "twenty thousand members": lambda scene: archive(*(member(f"many/{number}") for number in range(20_100))),
    "no tar": lambda scene: gzip.compress(b"#!/bin/sh\nreboot\n" * 1000),
    "no gzip": lambda scene: b"PK\3\4" + bytes(1000),
    "a gzip that breaks off": lambda scene: archive(member("x", os.urandom(MIB)))[:-50_000],
    "an agent.yaml that is a symlink": lambda scene: archive(symlink("agent.yaml", "/etc/passwd")),
    "an agent.yaml of a billion laughs": lambda scene: archive(
        member(
            "agent.yaml",
            b"a: &a [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 108)),
        )
    ),
    "an agent.yaml with a tag of Python's": lambda scene: archive(
        member("agent.yaml", b"runtime: !!python/object/apply:os.system ['touch /tmp/%s']\n" % scene.mark.encode())
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bundle_is_refused_that_has(scene: Scene, what: str) -> None:
    answer = upload(scene, REFUSED[what](scene))
    assert answer.status in (400, 413), answer
    assert answer.body["code"].partition(".")[0] in ("bundle", "agent", "body"), answer
    scene.assert_nobody_noticed()


ACCEPTED: dict[str, Callable[[Scene], tuple[bytes, set[str]]]] = {
    "setuid bits and a foreign owner": lambda scene: (
        archive(member("tool", b"x", mode=0o6755, uid=0, gid=0, uname="root")),
        {"agent.py", "tool"},
    ),
    "a name twice": lambda scene: (archive(member("same", b"1"), member("same", b"2")), {"agent.py", "same"}),
    "a file in the place of a symlink": lambda scene: (
        archive(symlink("same", "agent.py"), member("same", b"2")),
        {"agent.py", "same"},
    ),
    "names that differ in case only": lambda scene: (
        archive(member("Agent.py", b"raise SystemExit"), member("AGENT.PY", b"x")),
        {"AGENT.PY", "Agent.py", "agent.py"},
    ),
    "names that options look like": lambda scene: (
        archive(member("-rf", b"x"), member("--help", b"x"), member("~", b"x"), member("$(touch x)", b"x")),
        {"agent.py", "-rf", "--help", "~", "$(touch", "x)"},
    ),
    "a symlink that stays inside": lambda scene: (archive(symlink("same", "agent.py")), {"agent.py", "same"}),
    "attributes in extended headers": lambda scene: (
        archive(
            member("noted", b"x", pax_headers={"SCHILY.xattr.security.capability": "x", "uid": "0", "mtime": "1e99"})
        ),
        {"agent.py", "noted"},
    ),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_a_bundle_stays_in_its_workspace_that_has(scene: Scene, what: str) -> None:
    body, names = ACCEPTED[what](scene)
    answer = upload(scene, body)
    assert answer.status in (201, 400), answer
    if answer.status == 201:
        session = scene.api.session(answer.headers["X-Name"])
        workspace = Path(scene.fleet.keeper_of(session).cwd(), "workspace")
        stream = scene.api.send(session, "list")
        text = next(f.data["message"]["content"][0]["text"] for f in stream.named("message") if "message" in f.data)
        assert set(text.split()) - {"__pycache__"} == names
        owner = workspace.stat().st_uid
        for path in workspace.rglob("*"):
            assert path.lstat().st_uid == owner and not path.lstat().st_mode & 0o6000
        scene.end(session)
    scene.assert_nobody_noticed()


PATHS = [
    "/etc/{mark}",
    "../{mark}",
    "a/../../{mark}",
    "",
    ".",
    "..",
    "a\0b",
    "new\nline",
    "x" * 2000,
    "a//../..//{mark}",
]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_list_of_files_is_refused_that_has_the_path(scene: Scene, path: str) -> None:
    """POST /api/agents, the door beside the archives."""
    content = base64.b64encode(b"x").decode()
    files = [{"path": "agent.py", "content": base64.b64encode(AGENT).decode()}]
    files.append({"path": path.format(mark=scene.mark), "content": content})
    answer = scene.api.call("POST", "/api/agents", {"name": "listed", "files": files})
    assert answer.status == 400 or (path == "." and answer.status == 201), answer
    scene.assert_nobody_noticed()


@pytest.mark.parametrize("name", ["../neighbour", "a/b", "neighbour%2f..", "", "x" * 300, "a b", "ü"])
def test_an_agents_name_leads_nowhere(scene: Scene, name: str) -> None:
    files = [{"path": "agent.py", "content": base64.b64encode(AGENT).decode()}]
    assert scene.api.call("POST", "/api/agents", {"name": name, "files": files}).status == 400
    scene.assert_nobody_noticed()
