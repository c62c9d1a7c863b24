"""The limits of a sandbox as clients write them, and as the wire does.

Covers: their names and units, in both directions. Leaves out: how high they may be (a session's at most its agent's:
sessions.py; both at most the runner's: the runner), and enforcing them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ashd.wire.v1 import runner_pb2

MOST = 2**31 - 1

_MIB = 1024 * 1024
_ON_THE_WIRE = {
    "memoryMb": ("memory_bytes", _MIB),
    "cpuPercent": ("cpu_percent", 1),
    "diskMb": ("disk_bytes", _MIB),
    "maxProcesses": ("processes", 1),
    "openFiles": ("open_files", 1),
    "fileMb": ("file_size_bytes", _MIB),
}
"""Name in agent.yaml and the API: the field of the wire's Limits, and how many of its units one is."""

NAMES = tuple(_ON_THE_WIRE)


def to_wire(limits: Mapping[str, int]) -> runner_pb2.Limits:
    """What is absent stays 0: the runner's own."""
    asked = {field: limits.get(name, 0) * unit for name, (field, unit) in _ON_THE_WIRE.items()}
    return runner_pb2.Limits(**asked)


def from_wire(limits: runner_pb2.Limits) -> dict[str, float]:
    """Without those the runner does not tell. Whole numbers where they are whole."""
    told = {name: (getattr(limits, field), unit) for name, (field, unit) in _ON_THE_WIRE.items()}
    return {
        name: amount // unit if amount % unit == 0 else round(amount / unit, 3)
        for name, (amount, unit) in told.items()
        if amount
    }
