"""The name a process shows in ps.

setproctitle is the one import outside the standard library in this room: without it processes keep the zygote's name,
and everything else works.
"""

from __future__ import annotations

try:
    from setproctitle import setproctitle as set_title
except ImportError:  # pragma: no cover - ashd's own installation always has it

    def set_title(title: str) -> None:
        """Leaves the name as it is."""


__all__ = ["set_title"]
