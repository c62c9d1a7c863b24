"""The numbers of all workers as one: each writes its own to files of its own, and whichever is asked adds them up.

This is prometheus_client's multi-process mode, with files named after the worker's slot (0, 1, … as many as there are
workers at once) instead of its pid. So a new worker goes on with the counts of a dead one: counters never go back, and
there are no more files than workers, however often these die. What a worker only has while it lives (`live…` gauges)
goes with it.

Covers: the master's side, gunicorn's hooks. Leaves out: what is counted (metrics.py).
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from prometheus_client import multiprocess, values

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""By this prometheus_client finds the files; set in workers only."""


class Slots:
    """Gives each worker a slot, and keeps their files in one private folder."""

    def __init__(self, data_dir: Path | None, port: int) -> None:
        self._data_dir = data_dir
        self._port = port
        self._folder = Path()

    def when_ready(self, arbiter: Any) -> None:
        """Begins with an empty folder. ORDER: the port is ours by now, so what lies there belongs to nobody."""
        if self._data_dir is None:
            self._folder = Path(tempfile.mkdtemp(prefix="ashd-metrics-"))
        else:
            self._folder = self._data_dir / "run" / f"metrics-{self._port}"
            shutil.rmtree(self._folder, ignore_errors=True)

    def pre_fork(self, arbiter: Any, worker: Any) -> None:
        """Gives the worker to come the lowest slot that no live one has."""
        taken = {other.slot for other in arbiter.WORKERS.values()}
        worker.slot = next(slot for slot in itertools.count() if slot not in taken)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # again, should /tmp have been cleaned

    def post_fork(self, arbiter: Any, worker: Any) -> None:
        """In the worker, before it makes its first metric."""
        os.environ[FOLDER_VARIABLE] = str(self._folder)
        values.ValueClass = values.MultiProcessValue(lambda: worker.slot)

    def child_exit(self, arbiter: Any, worker: Any) -> None:
        """A worker is gone, and with it what it had open."""
        multiprocess.mark_process_dead(worker.slot, str(self._folder))

    def on_exit(self, arbiter: Any) -> None:
        """The last worker has ended."""
        shutil.rmtree(self._folder, ignore_errors=True)
