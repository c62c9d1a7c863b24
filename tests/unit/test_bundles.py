"""Packing agents: canonical whatever they came as, and nothing unsafe comes through."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ashd.coordinator import agent_yaml, bundles
from ashd.errors import Rejected

LIMIT = 4 * 1024 * 1024
FILES = [("agent.py", b"async def turn(message, session):\n    yield 'hi'\n"), ("data/täble.csv", b"a,b\n1,2\n")]

Add = Callable[[tarfile.TarFile], None]


def packed(files: list[tuple[str, bytes]], tmp_path: Path) -> bundles.Bundle:
    return bundles.pack_files(files, tmp_path / "out", LIMIT)


def tar_gz(path: Path, *adds: Add, **kwargs: int) -> Path:
    with tarfile.open(path, "w:gz", **kwargs) as archive:  # type: ignore[call-overload]
        for add in adds:
            add(archive)
    return path


def member(name: str, content: bytes = b"", **fields: object) -> Add:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(content))

    return add


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Add:
    return member(name, type=kind, linkname=target)


AGENT = member("agent.py", FILES[0][1])


def names(bundle: bundles.Bundle) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(bundle.archive, "r:gz") as archive:
        return {info.name: info for info in archive}


def test_the_same_content_has_the_same_digest_however_it_came(tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    (folder / "data").mkdir(parents=True)
    for path, content in FILES:
        (folder / path).write_bytes(content)
    upload = tar_gz(
        tmp_path / "up.tar.gz",
        *(member(f"./{path}", content, mtime=99, uid=7, mode=0o640) for path, content in reversed(FILES)),
    )
    results = [
        bundles.pack_files(FILES, tmp_path / "1", LIMIT),
        bundles.pack_folder(folder, tmp_path / "2", LIMIT),
        bundles.pack_tar_gz(upload, tmp_path / "3", LIMIT),
    ]
    assert len({result.digest for result in results}) == 1
    assert len({result.archive.read_bytes() for result in results}) == 1


def test_a_bundle_is_sorted_ownerless_and_timeless(tmp_path: Path) -> None:
    upload = tar_gz(tmp_path / "up", member("run.sh", b"x", mode=0o4755, uid=5, mtime=9), AGENT, member("z/y", b"1"))
    found = names(bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT))
    assert list(found) == ["agent.py", "run.sh", "z", "z/y"]
    assert {(info.uid, info.gid, info.uname, info.mtime) for info in found.values()} == {(0, 0, "", 0)}
    assert [info.mode for info in found.values()] == [0o644, 0o755, 0o755, 0o644]


@pytest.mark.parametrize(
    ("adds", "named"),
    [
        ([member("/etc/passwd", b"x")], "/etc/passwd"),
        ([member("../up", b"x")], "../up"),
        ([member("a/../../up", b"x")], "a/../../up"),
        ([link("out", "/etc")], "out"),
        ([link("out", "../x")], "out"),
        ([link("d/out", "../../x")], "d/out"),
        ([link("deep/x/up", "../.."), link("esc", "deep/x/up/..")], "esc"),
        ([link("a", "b"), link("b", "a"), link("c", "a")], "a"),
        ([link("d", "e"), member("d/file", b"x")], "d/file"),
        ([member("f", b"x"), member("f/g", b"x")], "f/g"),
        ([link("hard", "/etc/passwd", tarfile.LNKTYPE)], "/etc/passwd"),
        ([link("hard", "missing", tarfile.LNKTYPE)], "hard"),
        ([member("dev", type=tarfile.CHRTYPE)], "dev"),
        ([member("pipe", type=tarfile.FIFOTYPE)], "pipe"),
        ([member("new\nline", b"x")], "new"),
        ([member("x" * 300, b"x")], "xxx"),
        ([member("a/" * 600 + "b", b"x")], "a/a/"),
    ],
)
def test_an_unsafe_member_is_refused_by_name(tmp_path: Path, adds: list[Add], named: str) -> None:
    upload = tar_gz(tmp_path / "up", AGENT, *adds)
    with pytest.raises(Rejected) as caught:
        bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)
    assert caught.value.code == "bundle.unsafe"
    assert caught.value.status == 400
    assert named in caught.value.message


def test_links_that_stay_inside_are_kept(tmp_path: Path) -> None:
    adds = [AGENT, member("lib/real.py", b"1"), link("lib/alias.py", "real.py"), link("top.py", "lib/../lib/alias.py")]
    upload = tar_gz(tmp_path / "up", *adds, link("hard.py", "lib/real.py", tarfile.LNKTYPE))
    found = names(bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT))
    assert found["top.py"].linkname == "lib/../lib/alias.py"
    assert found["hard.py"].isreg()


def test_a_zip_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    upload = tmp_path / "up"
    with gzip.open(upload, "wb") as file:
        for _ in range(300):
            file.write(bytes(1024 * 1024))
    assert upload.stat().st_size < 1024 * 1024
    with pytest.raises(Rejected) as caught:
        bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)
    assert caught.value.status == 413


def test_hard_links_do_not_multiply_a_file_beyond_the_limit(tmp_path: Path) -> None:
    links = [link(f"copy{n}", "big", tarfile.LNKTYPE) for n in range(10)]
    upload = tar_gz(tmp_path / "up", AGENT, member("big", bytes(1024 * 1024)), *links)
    with pytest.raises(Rejected) as caught:
        bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)
    assert caught.value.status == 413


def test_a_file_that_claims_to_be_sparse_and_huge_is_refused(tmp_path: Path) -> None:
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.size": str(2**40), "GNU.sparse.map": "0,1"}
    upload = tar_gz(tmp_path / "up", AGENT, member("huge", b"x", pax_headers=sparse), format=tarfile.PAX_FORMAT)
    with pytest.raises(Rejected):
        bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)


def test_an_enormous_tar_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    comment = {"comment": "x" * (bundles.MAX_EXTENSION_BYTES + 1)}
    upload = tar_gz(tmp_path / "up", member("agent.py", b"x", pax_headers=comment), format=tarfile.PAX_FORMAT)
    with pytest.raises(Rejected) as caught:
        bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)
    assert caught.value.code == "bundle.invalid"


@pytest.mark.parametrize("content", [b"", b"not gzip", gzip.compress(b"not tar" * 100), gzip.compress(b"x" * 9)[:-6]])
def test_what_is_no_tar_gz_is_refused(tmp_path: Path, content: bytes) -> None:
    upload = tmp_path / "up"
    upload.write_bytes(content)
    with pytest.raises(Rejected) as caught:
        bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)
    assert caught.value.code in ("bundle.invalid", "agent.no_entry")


def test_an_archive_cut_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    whole = tar_gz(tmp_path / "whole", AGENT, member("big", os.urandom(5000))).read_bytes()
    upload = tmp_path / "up"
    for cut in range(0, len(whole) - 1, 97):
        upload.write_bytes(whole[:cut])
        with pytest.raises(Rejected):
            bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_MEMBERS", 10)
    with pytest.raises(Rejected) as caught:
        packed([(f"f{n}", b"") for n in range(11)], tmp_path)
    assert caught.value.code == "bundle.too_many"


def test_a_path_given_twice_is_refused_in_files(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="twice"):
        packed([*FILES, ("./agent.py", b"")], tmp_path)


def test_a_folder_s_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "agent.py").write_bytes(FILES[0][1])
    (folder / "secret").symlink_to("/etc/passwd")
    with pytest.raises(Rejected, match="absolute"):
        bundles.pack_folder(folder, tmp_path / "out", LIMIT)
    (folder / "secret").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(Rejected, match="pipe"):
        bundles.pack_folder(folder, tmp_path / "out", LIMIT)


def test_nothing_is_left_beside_the_bundle(tmp_path: Path) -> None:
    upload = tar_gz(tmp_path / "up", AGENT)
    bundles.pack_tar_gz(upload, tmp_path / "out", LIMIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "up"]


# agent.yaml


def spec(text: str, *paths: str) -> agent_yaml.Spec:
    return agent_yaml.read(set(paths), text.encode())


def test_the_runtime_is_named_or_given_away_by_a_file() -> None:
    assert agent_yaml.read({"agent.py", "CLAUDE.md"}, None).as_json() == {"runtime": "python", "entry": ["agent:turn"]}
    assert agent_yaml.read({"CLAUDE.md"}, None).runtime == "claude"
    assert spec("runtime: echo").runtime == "echo"
    assert spec("runtime: claude", "agent.py", "CLAUDE.md").runtime == "claude"
    with pytest.raises(Rejected) as caught:
        agent_yaml.read({"README.md"}, None)
    assert caught.value.message == "Agent directory must contain CLAUDE.md"


def test_every_key_is_understood() -> None:
    found = spec(
        """
runtime: command
entry: ["./agent", "--fast"]
limits: {memoryMb: 512, cpuPercent: 50, diskMb: 100, maxProcesses: 32, openFiles: 64, fileMb: 10}
network: none
preload: [pandas, numpy.linalg]
env: {LEVEL: "1"}
idle_timeout: 5m
turn_timeout: 90
"""
    )
    assert found.as_json() == {
        "runtime": "command",
        "entry": ["./agent", "--fast"],
        "limits": {
            "memoryMb": 512,
            "cpuPercent": 50,
            "diskMb": 100,
            "maxProcesses": 32,
            "openFiles": 64,
            "fileMb": 10,
        },
        "network": "none",
        "preload": ["pandas", "numpy.linalg"],
        "env": {"LEVEL": "1"},
        "idleTimeoutMs": 300_000,
        "turnTimeoutMs": 90_000,
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("runtime: echo\nentrypoint: x", "line 2: entrypoint is unknown"),
        ("runtime: ruby", "line 1: runtime must be one of"),
        ("\n\nlimits: {ram: 1}", "line 3: limits must be"),
        ("limits: {memoryMb: 0}", "memoryMb"),
        ("limits: {memoryMb: true}", "memoryMb"),
        ("runtime: echo\nturn_timeout: soon", "line 2: turn_timeout"),
        ("turn_timeout: 0", "turn_timeout must be"),
        ("env: {A: 1}", "put it in quotes"),
        ("env: {'A-B': x}", "names match"),
        ("network: some", "network must be one of"),
        ("network: {}", "network must be one of none, host"),
        ("limits: {cpuPercent: 0}", "cpuPercent that is not a whole number"),
        ("limits: {fileMb: 1.5}", "fileMb that is not a whole number"),
        ("runtime: command", "needs entry"),
        ("runtime: python\nentry: 'rm -rf'", "module:function"),
        ("runtime: python\nentry: 'main:run'", "no main.py"),
        ("runtime: claude", "must contain CLAUDE.md"),
        ("- a", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("a: &a [*a]", "unknown"),
        ("runtime: &a [*a]", "runtime must be one of"),
        ("entry: &a [*a]", "entry must be"),
        ("? [x]\n: y", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("runtime: !!python/object/apply:os.system [id]", "not valid YAML"),
    ],
)
def test_a_fault_in_agent_yaml_is_named_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(Rejected) as caught:
        spec(text, "agent.py")
    assert complaint in caught.value.message


def test_a_large_agent_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="larger than"):
        packed([("agent.yaml", b"#" * (agent_yaml.MAX_BYTES + 1))], tmp_path)
