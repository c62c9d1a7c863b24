"""Quotas on a real filesystem: an image on a loop device, made, mounted and taken away by the test.

Needs root and a kernel that can (ext4: CONFIG_QFMT_V2; XFS: CONFIG_XFS_QUOTA); skipped elsewhere. tests/vm runs it on a
kernel that has both. What sandboxes do is done by children with user ids of their own and no privileges, because
CAP_SYS_RESOURCE is above every quota.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import mmap
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ashd.runner import quota
from ashd.runner.disk import Disk, allowance
from ashd.runner.disk_watch import Watched
from ashd.runner.quota import Kind, Usage

KIB, MIB = 1024, 1024 * 1024
IMAGE_BYTES = 400 * MIB  # XFS wants 300
FIRST_UID = 1_500_000
LIMIT = 16 * MIB
DEADLINE_S = 60.0
OVER = (errno.EDQUOT, errno.ENOSPC)
_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-O", "quota,project", "-E", "quotatype=usrquota:prjquota"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}


@dataclass
class Place:
    """A mounted filesystem with a folder of sandboxes in it."""

    folder: Path
    kind: Kind | None

    def disk(self) -> Disk:
        disk = Disk(self.folder)
        disk.open(own_uids=True)
        return disk

    def sandbox(self, disk: Disk, number: int, most_bytes: int = LIMIT) -> Watched:
        """One that is made, and limited."""
        sandbox = self.watched(number)
        sandbox.workspace.parent.mkdir(exist_ok=True)
        sandbox.workspace.parent.chmod(0o711)
        sandbox.workspace.mkdir()
        assert sandbox.uid is not None
        os.chown(sandbox.workspace, sandbox.uid, sandbox.uid)
        disk.limit(sandbox, most_bytes)
        return sandbox

    def watched(self, number: int) -> Watched:
        workspace = self.folder / f"sandbox-{number}" / "workspace"
        return Watched(workspace, FIRST_UID + number, allowance(LIMIT), list, bool, print, bool)


def _mounted(filesystem: str, options: str, kind: Kind | None) -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: only root may mount")
    if shutil.which(_MAKE[filesystem][0]) is None:
        pytest.skip(f"NOT TESTED: {_MAKE[filesystem][0]} is not installed")
    base = Path(tempfile.mkdtemp(prefix="ashd-quota-"))
    base.chmod(0o711)
    image, top = base / "image", base / "mounted"
    top.mkdir()
    try:
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run([*_MAKE[filesystem], str(image)], check=True, timeout=60)
        command = ["mount", "-t", filesystem, "-o", f"loop,nosuid,nodev{options}", str(image), str(top)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            pytest.skip(f"NOT TESTED: this kernel mounts no {filesystem} with quotas ({done.stderr.strip()[:80]})")
        try:
            top.chmod(0o711)
            (top / "sandboxes").mkdir(mode=0o711)
            yield Place(top / "sandboxes", kind)
        finally:
            subprocess.run(["umount", str(top)], check=True, timeout=60)  # and with it goes the loop device
    finally:
        shutil.rmtree(base)


@pytest.fixture(params=["ext4-user", "ext4-project", "xfs-user", "xfs-project"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    filesystem, _, kind = request.param.partition("-")
    yield from _mounted(filesystem, *((",usrquota", Kind.USER) if kind == "user" else (",prjquota", Kind.PROJECT)))


@pytest.fixture(params=["ext4", "xfs"])
def projects(request: pytest.FixtureRequest) -> Iterator[Place]:
    yield from _mounted(request.param, ",prjquota", Kind.PROJECT)


@pytest.fixture
def uncounted() -> Iterator[Place]:
    """Quotas are kept in it, but it is mounted without enforcing them."""
    yield from _mounted("ext4", "", None)


@pytest.fixture
def disk(place: Place) -> Iterator[Disk]:
    disk = place.disk()
    yield disk
    disk.close()


def as_sandbox(sandbox: Watched, work: Callable[[], int]) -> int:
    """Runs `work` as a sandbox's process would, in its workspace; its answer (below 200), or minus a signal."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            uid = sandbox.uid
            assert uid is not None
            os.chdir(sandbox.workspace)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            code = work()
        except OSError as error:
            code = error.errno or 254
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def fill(name: str = "filled") -> int:
    """Writes until it can't; the errno."""
    with open(name, "wb", 0) as file:
        try:
            while True:
                if file.write(b"x" * 64 * KIB) == 0:
                    return 253
        except OSError as error:
            os.fsync(file.fileno())
            return error.errno or 254


def test_a_full_sandbox_is_stopped_at_its_limit_and_its_neighbour_writes_on(place: Place, disk: Disk) -> None:
    greedy, neighbour = place.sandbox(disk, 1), place.sandbox(disk, 2)
    assert disk.enforced == "disk-quota"
    assert as_sandbox(greedy, fill) in OVER
    assert LIMIT - MIB <= disk.usage_of(greedy.workspace, greedy.uid) <= LIMIT
    assert as_sandbox(neighbour, lambda: Path("fine").write_bytes(b"x" * 8 * MIB) != 8 * MIB) == 0
    assert 8 * MIB <= disk.usage_of(neighbour.workspace, neighbour.uid) < 9 * MIB


def test_inodes_end_too_and_what_is_deleted_may_be_made_again(place: Place, disk: Disk) -> None:
    sandbox = place.sandbox(disk, 1)
    most = allowance(LIMIT).inodes

    def make() -> int:
        for number in range(most + 10):
            Path(str(number)).touch()
        return 0

    def remove() -> int:
        for name in os.listdir():
            os.unlink(name)
        return 0

    assert as_sandbox(sandbox, make) in OVER
    assert len(os.listdir(sandbox.workspace)) <= most
    assert as_sandbox(sandbox, remove) == 0
    assert as_sandbox(sandbox, lambda: Path("again").write_bytes(b"x") - 1) == 0


def test_deleted_but_open_and_mapped_and_sparse_files_are_no_way_out(place: Place, disk: Disk) -> None:
    sandbox = place.sandbox(disk, 1)

    def hold_deleted() -> int:
        with open("deleted", "wb", 0) as held:
            os.unlink("deleted")
            for _ in range(12):
                held.write(b"x" * MIB)
            return fill()

    def map_a_hole() -> int:
        faulthandler.disable()
        with open("mapped", "w+b") as file:
            file.truncate(4 * LIMIT)
            with mmap.mmap(file.fileno(), 4 * LIMIT) as area:
                for start in range(0, 4 * LIMIT, 4 * KIB):
                    area[start] = 1
        return 0

    assert as_sandbox(sandbox, hold_deleted) in OVER
    filled = sandbox.workspace / "filled"  # XFS may have reserved so much for the other that it isn't even there
    assert not filled.exists() or filled.stat().st_size <= 5 * MIB
    filled.unlink(missing_ok=True)
    assert as_sandbox(sandbox, map_a_hole) == -signal.SIGBUS
    assert disk.usage_of(sandbox.workspace, sandbox.uid) <= LIMIT


def test_a_lower_limit_holds_at_once(place: Place, disk: Disk) -> None:
    sandbox = place.sandbox(disk, 1)
    disk.limit(sandbox, 4 * MIB)
    assert as_sandbox(sandbox, fill) in OVER
    assert disk.usage_of(sandbox.workspace, sandbox.uid) <= 4 * MIB


def test_the_next_supervisor_finds_limits_and_use_as_they_were(place: Place, disk: Disk) -> None:
    sandbox = place.sandbox(disk, 1, 4 * MIB)
    as_sandbox(sandbox, fill)
    after = place.disk()
    try:
        after.adopt(place.watched(1))
        assert 3 * MIB < after.usage_of(sandbox.workspace, sandbox.uid) <= 4 * MIB
        assert as_sandbox(sandbox, lambda: fill("more")) in OVER
        assert as_sandbox(place.sandbox(after, 2), lambda: Path("fine").write_bytes(b"x" * MIB) != MIB) == 0
    finally:
        after.close()


def test_ids_of_sandboxes_that_are_gone_are_free_and_unlimited(place: Place, disk: Disk) -> None:
    for _ in range(3):
        sandbox = place.sandbox(disk, 1)
        assert as_sandbox(sandbox, fill) in OVER
        owner = quota.project_of(sandbox.workspace) if place.kind is Kind.PROJECT else sandbox.uid
        shutil.rmtree(sandbox.workspace.parent)
        disk.forget(sandbox.workspace, sandbox.uid)
        handle = os.open(place.folder, os.O_RDONLY)
        try:
            assert place.kind is not None and owner
            deadline = time.monotonic() + DEADLINE_S  # XFS frees what was removed in the background
            while not _unused_and_unlimited(handle, place.kind, owner):
                assert time.monotonic() < deadline, "the id's use or limit is still there"
                time.sleep(0.01)
        finally:
            os.close(handle)


def _unused_and_unlimited(handle: int, kind: Kind, owner: int) -> bool:
    try:
        return quota._get(handle, kind, owner) == (Usage(0, 0), Usage(0, 0))
    except (FileNotFoundError, ProcessLookupError):
        return True  # XFS has forgotten it altogether


def test_an_id_that_somebody_elses_files_have_is_passed_by(projects: Place) -> None:
    first, second = projects.disk(), projects.disk()  # two runners that happen to have the same range
    try:
        a, b = projects.sandbox(first, 1), projects.sandbox(second, 2)
        assert quota.project_of(a.workspace) != quota.project_of(b.workspace)
    finally:
        first.close()
        second.close()


def test_nothing_can_be_moved_or_linked_into_a_neighbours_project(projects: Place) -> None:
    disk = projects.disk()
    try:
        a, b = projects.sandbox(disk, 1), projects.sandbox(disk, 2)
        (a.workspace / "file").write_bytes(b"x" * MIB)
        for move in (os.link, os.rename):
            with pytest.raises(OSError, match="ross-device"):
                move(a.workspace / "file", b.workspace / "file")
    finally:
        disk.close()


def test_an_owner_may_take_files_out_of_its_project_which_is_why_the_jail_denies_it(projects: Place) -> None:
    """What seccomp has to deny: without it, project quotas hold nobody who means ill. User quotas need no such help."""
    disk = projects.disk()
    try:
        sandbox = projects.sandbox(disk, 1)

        def leave() -> int:
            with open("file", "wb") as file:
                fcntl.ioctl(file, quota._FS_IOC_FSSETXATTR, struct.pack("<5I8x", 0, 0, 0, 0, 0))
            return 0

        assert as_sandbox(sandbox, leave) == 0
    finally:
        disk.close()


def test_user_quotas_are_preferred_because_nobody_can_give_files_away(place: Place, disk: Disk) -> None:
    sandbox = place.sandbox(disk, 1)
    assert disk.enforced == "disk-quota"
    assert (quota.project_of(sandbox.workspace) == 0) == (place.kind is Kind.USER)


def test_a_filesystem_that_counts_without_enforcing_is_not_believed(uncounted: Place) -> None:
    disk = uncounted.disk()
    assert disk.enforced == "disk-watch"
    disk.close()
