"""Landlock: what code in a sandbox may reach of the file system and of other processes, whatever its view of them.

Covers: one ruleset for a sandbox, by what this kernel's version of Landlock knows. Leaves out: what the rules are for
(jail.py).

A second wall behind namespaces and user ids; where there are none, the only one between sandboxes of one user.

Sources: landlock(7), Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from sandbox.syscalls import call

_VERSION_FLAG = 1
_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_IOCTL_DEV = 1 << 15
_ACCESSES_SINCE = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: _IOCTL_DEV}
_FILES = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | _IOCTL_DEV  # what a rule on a single file may hold
_SCOPES_SINCE_6 = 1 | 2  # abstract Unix sockets, signals

READ = EXECUTE | READ_FILE | READ_DIR
DEVICES = READ_FILE | READ_DIR | WRITE_FILE | _IOCTL_DEV
WRITE = ((1 << 15) - 1) & ~(_MAKE_CHAR | _MAKE_BLOCK)


def version() -> int:
    """Which version of Landlock this kernel has; 0 = none."""
    try:
        return call("landlock_create_ruleset", None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def restrict(rules: Iterable[tuple[str, int]]) -> None:
    """From now on this process and what it starts may do only what `rules` allow beneath each path; paths that don't
    exist are left out. Signals and abstract sockets reach only within, where the kernel knows how (version 6). Needs
    no_new_privs. Raises OSError.
    """
    here = version()
    handled = sum(bits for since, bits in _ACCESSES_SINCE.items() if here >= since)
    attributes = struct.pack("=QQQ", handled, 0, _SCOPES_SINCE_6 if here >= 6 else 0)
    size = 24 if here >= 6 else 8
    ruleset = call("landlock_create_ruleset", attributes, size, 0)
    try:
        for path, allowed in rules:
            _allow(ruleset, path, allowed & handled)
        call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, allowed: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            allowed &= _FILES
        call("landlock_add_rule", ruleset, _PATH_BENEATH, struct.pack("=Qi", allowed, beneath), 0)
    finally:
        os.close(beneath)
