"""What a workspace takes, where whoever made it wants it miscounted."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ashd.runner.quota import Usage
from ashd.runner.tree_usage import usage_of

KIB, MIB = 1024, 1024 * 1024
NO_END = Usage(1 << 60, 1 << 60)


@pytest.fixture
def tree() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ashd-tree-"))
    yield folder
    subprocess.run(["rm", "-rf", "--", str(folder)], check=True, timeout=60)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.write(b"x" * size)
        os.fsync(file.fileno())


def test_files_folders_and_what_is_below_are_counted(tree: Path) -> None:
    (tree / "a" / "b").mkdir(parents=True)
    _write(tree / "a" / "b" / "c", MIB)
    _write(tree / "d", MIB)
    used = usage_of(tree, NO_END)
    assert used.inodes == 5 and 2 * MIB <= used.bytes < 3 * MIB


def test_a_sparse_file_takes_what_is_written_of_it(tree: Path) -> None:
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x" * 64 * KIB)
    assert usage_of(tree, NO_END).bytes < MIB


def test_pages_written_by_a_mapping_are_counted(tree: Path) -> None:
    with (tree / "mapped").open("w+b") as file:
        file.truncate(4 * MIB)
        with mmap.mmap(file.fileno(), 4 * MIB) as area:
            area[:] = b"x" * (4 * MIB)
            area.flush()
    assert usage_of(tree, NO_END).bytes >= 4 * MIB


def test_a_file_of_several_names_counts_once(tree: Path) -> None:
    _write(tree / "a", MIB)
    (tree / "below").mkdir()
    for number in range(50):
        os.link(tree / "a", tree / "below" / str(number))
    used = usage_of(tree, NO_END)
    assert used.inodes == 3 and used.bytes < 2 * MIB


def test_links_are_not_followed(tree: Path) -> None:
    for target in ("/", "/usr", "..", "."):
        (tree / target.replace("/", "_").replace(".", "d")).symlink_to(target)
    assert usage_of(tree, NO_END).inodes == 5


def test_fifos_sockets_and_names_of_any_bytes_do_no_harm(tree: Path) -> None:
    os.mkfifo(tree / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
    for name in (b"\xff\xfe", b"a\nb", b" ", b"\x01" * 255):
        os.mkdir(os.fsencode(tree) + b"/" + name)
        (Path(os.fsdecode(os.fsencode(tree) + b"/" + name)) / "x").touch()
    assert usage_of(tree, NO_END).inodes == 1 + 2 + 4 + 4


def test_ten_thousand_levels_are_counted_with_few_descriptors(tree: Path) -> None:
    here = os.open(tree, os.O_RDONLY)
    for _ in range(10_000):
        os.mkdir("d", dir_fd=here)
        os.mkdir("e", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    with open(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=here), "wb") as file:
        file.write(b"x" * MIB)
    os.close(here)
    before = _descriptors()
    used = usage_of(tree, NO_END)
    assert used.inodes == 20_002 and used.bytes >= MIB
    assert _descriptors() == before


def test_counting_ends_where_more_makes_no_difference(tree: Path) -> None:
    for number in range(5_000):
        (tree / str(number)).touch()
    before = _descriptors()
    assert usage_of(tree, Usage(1 << 60, 1_000)).inodes == 1_001
    assert _descriptors() == before


def test_a_folder_closed_to_its_own_user_hides_nothing(tree: Path) -> None:
    hidden = tree / "hidden"
    (hidden / "more").mkdir(parents=True)
    _write(hidden / "more" / "x", MIB)
    (hidden / "more").chmod(0)
    hidden.chmod(0)
    user = 65534
    if os.geteuid() == 0:
        for path in (tree, hidden, hidden / "more", hidden / "more" / "x"):
            os.chown(path, user, user)
    count = f"""
import os, sys
if os.geteuid() == 0:
    os.setresgid({user}, {user}, {user}); os.setresuid({user}, {user}, {user})
from pathlib import Path
used = usage_of(Path({str(tree)!r}), Usage(1 << 60, 1 << 60))
print(used.bytes)
"""
    # ORDER: imported before the privileges go; the interpreter's folder may be root's alone.
    program = f"from ashd.runner.tree_usage import usage_of\nfrom ashd.runner.quota import Usage\n{count}"
    answer = subprocess.run(
        [shutil.which("python") or "python3", "-c", program], check=True, capture_output=True, timeout=60
    )
    assert int(answer.stdout) >= MIB


def test_a_deleted_file_that_is_still_open_is_counted(tree: Path) -> None:
    with (tree / "gone").open("wb") as file:
        file.write(b"x" * MIB)
        file.flush()
        (tree / "gone").unlink()
        assert usage_of(tree, NO_END).bytes < MIB
        assert usage_of(tree, NO_END, [os.getpid()]).bytes >= MIB


def test_a_tree_that_moves_while_it_is_counted_leads_nowhere_else(tree: Path) -> None:
    """Folders deeper than are held open are moved to and fro; whoever looks ends, stays inside, and leaks nothing."""
    here, place = tree, []
    for number in range(90):
        here = here / "d"
        here.mkdir()
        place.append(here)
        (here / f"file{number}").touch()
    (tree / "other").mkdir()
    mover = subprocess.Popen(
        ["sh", "-c", f"while :; do mv {place[70]} {tree}/other/x; mv {tree}/other/x {place[70]}; done"],
        stderr=subprocess.DEVNULL,
    )
    before = _descriptors()
    try:
        counts = [usage_of(tree, NO_END).inodes for _ in range(300)]
    finally:
        mover.kill()
        mover.wait()
    assert max(counts) <= 2 * 182 and min(counts) >= 2 * 64
    assert _descriptors() == before


def test_a_workspace_that_is_gone_or_a_link_takes_nothing(tree: Path) -> None:
    (tree / "link").symlink_to("/usr")
    assert usage_of(tree / "link", NO_END) == usage_of(tree / "none", NO_END) == Usage(0, 0)
