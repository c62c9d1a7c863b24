"""Where an installation keeps its state, and the small files in it that more than one command reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

API_KEY_FILE = "initial-api-key"
INTERNAL_SECRET_FILE = "internal-secret"  # noqa: S105 (a file's name)


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """ASH_DATA_DIR; without it /var/lib/ashd for root, and ashd in $XDG_DATA_HOME or ~/.local/share for others.

    For where no `data_dir` is configured. Source: XDG Base Directory Specification.
    """
    if given := environ.get("ASH_DATA_DIR"):
        return Path(given).expanduser()
    if os.geteuid() == 0:
        return Path("/var/lib/ashd")
    base = environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local/share") / "ashd"
