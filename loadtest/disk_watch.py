"""What watching workspaces costs the runner: processor time of a quiet tick, of a look, of the largest look.

Run: python -m loadtest.disk_watch [sandboxes] [files of each]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from ashd.runner.disk import allowance
from ashd.runner.disk_watch import TICK_S, DiskWatch, Watched
from ashd.runner.quota import Usage
from ashd.runner.tree_usage import usage_of

NO_END = Usage(1 << 60, 1 << 60)
TICKS = 100


def _files(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / str(number)).touch()
    return folder


def main(sandboxes: int, files: int) -> None:
    top = Path(tempfile.mkdtemp(prefix="ashd-disk-watch-"))
    try:
        watch = DiskWatch(top)
        workspaces = [_files(top / str(number), files) for number in range(sandboxes)]
        for workspace in workspaces:
            watch.watch(Watched(workspace, None, allowance(2 << 30), list, bool, print, bool))
        began = time.process_time()
        for _ in range(TICKS):
            watch.due()
        tick_s = (time.process_time() - began) / TICKS
        print(f"quiet: {tick_s * 1000:.2f} ms a tick, {tick_s / TICK_S:.2%} of a core, for {sandboxes} sandboxes")
        began = time.process_time()
        for workspace in workspaces:
            usage_of(workspace, NO_END)
        print(f"look: {(time.process_time() - began) / sandboxes * 1000:.2f} ms at {files} files")
        most = allowance(2 << 30).inodes
        large = _files(top / "large", most)
        began = time.process_time()
        usage_of(large, NO_END)
        print(f"look: {(time.process_time() - began) * 1000:.0f} ms at {most} files, the most that 2 GiB may have")
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main(*(int(text) for text in [*sys.argv[1:], *("1000", "50")[len(sys.argv) - 1 :]]))
