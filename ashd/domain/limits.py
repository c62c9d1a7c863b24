"""What one sandbox may use: what was asked for, and what holds."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes in bytes; 0 = nothing said."""

    memory_bytes: int = 0
    processes: int = 0
    open_files: int = 0
    file_size_bytes: int = 0
    cpu_percent: int = 0
    disk_bytes: int = 0

    def capped(self, most: Limits) -> Limits:
        """Each the smaller of the two; where one says nothing, the other's."""
        own, cap = vars(self), vars(most)
        return Limits(**{f.name: min(own[f.name] or cap[f.name], cap[f.name] or own[f.name]) for f in fields(self)})
