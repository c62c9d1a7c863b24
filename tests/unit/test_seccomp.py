"""The filter of system calls, run by an interpreter of ours for both architectures."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from sandbox import seccomp

ALLOWED = 0x7FFF0000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def answer(architecture: str, number: int, *arguments: int, arch: int | None = None, internet: bool = True) -> int:
    """What the filter says of a call: 0 = allowed, else the errno it fails with."""
    code = seccomp.program(architecture, internet=internet)
    data = struct.pack("=iIQ6Q", number, arch or ARCHITECTURES[architecture], 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    accumulator, at = 0, 0
    while True:
        operation, if_true, if_false, value = struct.unpack_from("=HBBI", code, at * 8)
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x06:
            return 0 if value == ALLOWED else value & 0xFFFF
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_numbers_are_the_kernels(architecture: str) -> None:
    header = HEADERS[architecture]
    if not header.exists():
        pytest.skip("the kernel's headers are not installed (linux-libc-dev)")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    column = list(ARCHITECTURES).index(architecture)
    for name, numbers in (seccomp._REFUSED | seccomp._ABSENT).items():
        if name in known:
            assert numbers[column] == int(known[name]), name


@pytest.mark.parametrize(("architecture", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_refused_calls_are_refused_and_their_neighbours_are_not(architecture: str, column: int) -> None:
    looked_at = {pair[column] for pair in (seccomp._CLONE, seccomp._UNSHARE, seccomp._IOCTL, seccomp._SOCKET)}
    looked_at.add(seccomp._PERSONALITY[column])
    refused = {numbers[column] for numbers in seccomp._REFUSED.values()}
    absent = {numbers[column] for numbers in seccomp._ABSENT.values()}
    for number in set(range(seccomp._NEWEST + 1)) - looked_at:
        expected = errno.EPERM if number in refused else errno.ENOSYS if number in absent else 0
        assert answer(architecture, number) == expected, number


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calls_newer_than_the_list_and_of_other_architectures_do_not_exist(architecture: str) -> None:
    assert answer(architecture, seccomp._NEWEST + 1) == errno.ENOSYS
    assert answer(architecture, 0x40000000) == errno.ENOSYS  # x32
    assert answer(architecture, 1, arch=0x40000003) == errno.ENOSYS  # i386


@pytest.mark.parametrize(("architecture", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_processes_may_be_made_but_no_namespaces(architecture: str, column: int) -> None:
    for call in (seccomp._CLONE, seccomp._UNSHARE):
        assert answer(architecture, call[column], 0x00000400) == 0  # CLONE_FILES
        for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
            assert answer(architecture, call[column], flag | 0x11) == errno.EPERM, hex(flag)
    assert answer(architecture, seccomp._UNSHARE[column], 0x80) == errno.EPERM
    assert answer(architecture, seccomp._CLONE[column], 0x80) == 0  # there it is part of a signal's number


@pytest.mark.parametrize("internet", [True, False])
def test_sockets_are_the_hosts_own_and_the_internets(*, internet: bool) -> None:
    def may(family: int, protocol: int = 0) -> bool:
        return answer("x86_64", 41, family, 1, protocol, internet=internet) == 0

    assert may(1)
    assert may(2) is may(10) is internet
    assert may(16)
    assert not may(16, 9)  # NETLINK_AUDIT
    assert not any(may(family) for family in (3, 17, 21, 29, 30, 31, 38, 40, 44))


def test_nobody_types_into_a_terminal_of_somebody_else() -> None:
    assert answer("x86_64", 16, 0, 0x5412) == errno.EPERM
    assert answer("x86_64", 16, 0, 0x5412 | 1 << 32) == errno.EPERM  # the kernel looks at 32 bits only
    assert answer("x86_64", 16, 0, 0x5413) == 0
