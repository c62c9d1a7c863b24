"""What the exit status of a command says; printed by `ashd --help`."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses; scripts may rely on them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    UNAUTHORISED = 4
    NOT_BOOTED = 5
    INTERRUPTED = 130


MEANINGS = """\
exit status:
  0    done
  1    the request failed, the reason is on stderr; ashd doctor: the host falls short
  2    wrong usage or configuration
  3    no server answers
  4    the server does not accept the key
  5    ashd up: a part did not start
  130  interrupted
"""
