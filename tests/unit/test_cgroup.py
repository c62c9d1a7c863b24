"""What is written where, on directories that stand for hierarchies of both versions; real ones: integration."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ashd.runner import cgroup

MIB = 1024 * 1024


class Tree:
    """A pretended /sys/fs/cgroup and /proc/self/cgroup; rmdir takes a group's files along, as the kernel does."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "cgroup"
        self.root.mkdir()
        self._own = root / "own"
        self.uid = 0
        self.busy: set[Path] = set()
        self.written: list[tuple[str, str]] = []
        really_write, really_mkdir = Path.write_text, Path.mkdir

        def write(path: Path, text: str, *_: Any) -> int:
            if path.name == "cgroup.subtree_control" and path.parent in self.busy:
                raise OSError(errno.EBUSY, "processes in an inner group")
            if path.name == "cgroup.procs":
                self._move(path, text)
                return len(text)
            self.written.append((str(path.relative_to(self.root)), text))
            return really_write(path, text)

        def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
            is_new = not path.exists()
            really_mkdir(path, *arguments, **options)
            if is_new and path.is_relative_to(self.root):
                for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
                    really_write(path / name, str(1 << 60))
                for name in ("cgroup.procs", "memory.swap.max", "memory.oom.group"):
                    really_write(path / name, "")

        really_rmdir = os.rmdir

        def rmdir(path: str) -> None:
            for file in Path(path).iterdir():
                if file.is_file():
                    file.unlink()
            really_rmdir(path)

        monkeypatch.setattr(cgroup, "ROOT", self.root)
        monkeypatch.setattr(cgroup, "OWN", self._own)
        monkeypatch.setattr(os, "geteuid", lambda: self.uid)
        monkeypatch.setattr(Path, "write_text", write)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(os, "rmdir", rmdir)

    def is_in(self, groups: str) -> None:
        """What /proc/self/cgroup says."""
        _put(self._own, groups)

    def _move(self, to: Path, pid: str) -> None:
        for procs in self.root.rglob("cgroup.procs"):
            rest = [line for line in procs.read_text().split() if line != pid]
            _put(procs, "\n".join(rest))
        _put(to, f"{to.read_text()}\n{pid}")
        self.busy = {group for group in self.busy if (group / "cgroup.procs").read_text().split()}

    def unified(self, controllers: str = "cpuset cpu io memory pids") -> None:
        """Version 2 alone."""
        for path in (self.root, *self.root.rglob("*")):
            if path.is_dir():
                _put(path / "cgroup.controllers", controllers)

    def holds(self, group: str, *pids: str) -> None:
        """Processes in a group, so that it may not hand controllers down."""
        path = self.root / group
        _put(path / "cgroup.procs", "\n".join(pids))
        self.busy.add(path)

    def of(self, group: str) -> dict[str, str]:
        """What was written last to each file of a group."""
        return {name.rpartition("/")[2]: text for name, text in self.written if name.rpartition("/")[0] == group}


def _put(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


def test_version_2_gets_every_limit_and_children_for_agent_and_tools(tree: Tree) -> None:
    tree.unified()
    tree.is_in("0::/system.slice/shell.service\n")
    (found,) = cgroup.find("ashd/runner")
    assert found == cgroup.Hierarchy(tree.root / "ashd" / "runner", 2, ("memory", "pids", "cpu"))
    for group in ("", "ashd", "ashd/runner"):
        handed_down = [text for name, text in tree.written if name == f"{group}/cgroup.subtree_control".lstrip("/")]
        assert handed_down == ["+memory", "+pids", "+cpu"], group
    assert cgroup.create([found], "one", 512 * MIB, 64, 150) == [tree.root / "ashd/runner/one/agent"]
    assert tree.of("ashd/runner/one") == {
        "memory.high": str(496 * MIB),
        "memory.max": str(512 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "0",
        "cgroup.subtree_control": "+memory",
        "pids.max": "64",
        "cpu.max": "150000 100000",
    }
    assert tree.of("ashd/runner/one/tools") == {
        "memory.high": str(448 * MIB - 14 * MIB),
        "memory.max": str(448 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "0",
    }
    assert cgroup.memory_group([found], "one") == {"version": 2, "folder": str(tree.root / "ashd/runner/one")}
    assert cgroup.controllers([found]) == ["cgroup-memory", "cgroup-pids", "cgroup-cpu"]
    assert cgroup.leftovers([found], set()) >= {"one"}


def test_version_1_has_a_hierarchy_for_each_controller_also_beside_a_bare_version_2(tree: Tree) -> None:
    for name in ("memory", "pids", "cpu", "unified"):
        (tree.root / name).mkdir()
    tree.is_in("4:memory:/\n0::/\n")
    found = cgroup.find("ashd/runner")
    assert [(made.version, made.controllers) for made in found] == [(1, ("memory",)), (1, ("pids",)), (1, ("cpu",))]
    joined = cgroup.create(found, "one", 96 * MIB, 64, 50)
    assert joined == [
        tree.root / "memory/ashd/runner/one/agent",
        tree.root / "pids/ashd/runner/one",
        tree.root / "cpu/ashd/runner/one",
    ]
    both = {"memory.limit_in_bytes", "memory.memsw.limit_in_bytes"}
    assert tree.of("memory/ashd/runner/one") == dict.fromkeys(both, str(96 * MIB))
    assert tree.of("memory/ashd/runner/one/tools") == dict.fromkeys(both, str(84 * MIB))
    assert tree.of("pids/ashd/runner/one") == {"pids.max": "64"}
    assert tree.of("cpu/ashd/runner/one") == {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}


def test_limits_without_swap_are_lowered_first_and_raised_last(tree: Tree) -> None:
    (tree.root / "memory").mkdir()
    found = cgroup.find("ashd/runner")
    cgroup.create(found, "one", 64 * MIB, 64, 100)
    tree.written.clear()
    cgroup.create(found, "one", 128 * MIB, 64, 100)
    cgroup.create(found, "one", 32 * MIB, 64, 100)
    order = [name.rpartition("/")[2] for name, _ in tree.written if name.startswith("memory/ashd/runner/one/memory")]
    swap, limit = "memory.memsw.limit_in_bytes", "memory.limit_in_bytes"
    assert order == [swap, limit, limit, swap]


def test_an_ordinary_user_makes_groups_in_the_one_it_was_given(tree: Tree) -> None:
    own = "user.slice/user-1000.slice/user@1000.service/app.slice/ashd.service"
    (tree.root / own).mkdir(parents=True)
    tree.unified("memory pids")
    tree.is_in(f"0::/{own}\n")
    tree.uid = 1000
    tree.holds(own, "17", "18")
    (found,) = cgroup.find("ashd/runner")
    assert (found.parent, found.controllers) == (tree.root / own / "ashd/runner", ("memory", "pids"))
    assert (tree.root / own / "supervisor/cgroup.procs").read_text().split() == ["17", "18"]
    assert (tree.root / own / "cgroup.procs").read_text() == ""
    assert not any(name.startswith("cgroup.subtree") for name, _ in tree.written)  # the root is not ours


def test_a_runner_started_again_in_its_leaf_finds_the_same_place(tree: Tree) -> None:
    own = "system.slice/ashd.service"
    (tree.root / own / "supervisor").mkdir(parents=True)
    tree.unified()
    tree.is_in(f"0::/{own}/supervisor\n")
    tree.uid = 1000
    assert [made.parent for made in cgroup.find("ashd/runner")] == [tree.root / own / "ashd/runner"]


def test_root_uses_what_systemd_has_delegated(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "system.slice/ashd.service"
    (tree.root / own).mkdir(parents=True)
    tree.unified()
    tree.is_in(f"0::/{own}\n")
    monkeypatch.setattr(os, "getxattr", lambda path, _: b"1" if path == tree.root / own else b"")
    assert [made.parent for made in cgroup.find("ashd/runner")] == [tree.root / own / "ashd/runner"]


def test_a_user_of_version_1_makes_groups_in_its_own(tree: Tree) -> None:
    (tree.root / "memory/users/me").mkdir(parents=True)
    tree.is_in("5:cpu,cpuacct:/\n4:memory:/users/me\n0::/\n")
    tree.uid = 1000
    found = cgroup.find("ashd/runner")
    assert found[0].parent == tree.root / "memory/users/me/ashd/runner"


def test_a_controller_the_kernel_refuses_is_done_without(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.unified()
    tree.is_in("0::/\n")
    write = Path.write_text

    def refuse_cpu(path: Path, text: str, *rest: Any) -> int:
        if text == "+cpu":  # as with realtime processes about
            raise OSError(errno.EINVAL, "no")
        return write(path, text, *rest)

    monkeypatch.setattr(Path, "write_text", refuse_cpu)
    (found,) = cgroup.find("ashd/runner")
    assert found.controllers == ("memory", "pids")
    cgroup.create([found], "one", 64 * MIB, 8, 100)
    assert "cpu.max" not in tree.of("ashd/runner/one")


def test_a_host_without_cgroups_has_none(tree: Tree) -> None:
    tree.is_in("")
    tree.uid = 1000
    assert cgroup.find("ashd/runner") == []
    assert cgroup.memory_group([], "one") is None


def test_all_of_a_group_is_killed_at_once_where_the_kernel_can(tree: Tree) -> None:
    tree.unified()
    tree.is_in("0::/\n")
    found = cgroup.find("ashd/runner")
    cgroup.create(found, "one", 64 * MIB, 8, 100)
    (tree.root / "ashd/runner/one/cgroup.kill").touch()
    assert asyncio.run(cgroup.remove(found, "one"))
    assert tree.of("ashd/runner/one")["cgroup.kill"] == "1"
    assert not (tree.root / "ashd/runner/one").exists()


@pytest.mark.parametrize(("limit", "tools"), [(512, 448), (96, 84), (64, 56), (32, 24), (16, 8), (8, 4)])
def test_the_agent_has_head_room_above_its_tools(limit: int, tools: int) -> None:
    assert cgroup.tools_limit(limit * MIB) == tools * MIB
