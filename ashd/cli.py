"""`ashd`: reads the command line, runs one command, and turns what it raises into a sentence and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ashd import __version__
from ashd.commands import agents, config, doctor, fleet, serve, sessions
from ashd.commands.exits import MEANINGS, Exit
from ashd.commands.output import printable
from ashd.errors import AshdError, ConfigError
from ashd.http_client import ServerRefused, ServerUnreachable

_EPILOG = f"""\
example:
  ashd up
  ashd chat shell-agent "ls -la"

next:
  ashd COMMAND --help shows an example of each command

{MEANINGS}"""

_HINTS = {
    401: "Give the server's key by --api-key or ASH_API_KEY; `ashd up` writes its own to <data_dir>/initial-api-key.",
    403: "This key may not do that.",
    404: "`ashd agent list` and `ashd session list` show what there is.",
    503: "The server can't do it now; the same command may work in a moment. `ashd status` shows the fleet.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status (commands/exits.py)."""
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        return _fail(Exit.USAGE, "The configuration can't be used:", *(f"  {problem}" for problem in error.problems))
    except ServerUnreachable as error:
        return _fail(Exit.UNREACHABLE, error.message, "Is it running? `ashd up` starts one; --server names another.")
    except ServerRefused as error:
        status = Exit.UNAUTHORISED if error.status in (401, 403) else Exit.FAILED
        return _fail(status, f"{error.message}  [{error.code or error.status}]", _HINTS.get(error.status, ""))
    except AshdError as error:
        return _fail(Exit.USAGE if error.code == "usage" else Exit.FAILED, error.message)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`ashd … | head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="ashd",
        description="Runs AI-agent sessions in sandboxes, on one machine or a fleet.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"ashd {__version__}")
    commands = top.add_subparsers(metavar="command", required=True, title="commands")
    for group in (serve, agents, sessions, fleet, config, doctor):
        group.register(commands)
    return top


def _fail(status: Exit, *lines: str) -> int:
    for line in lines:
        if line:
            print(printable(line), file=sys.stderr)  # SECURITY: a server's text may repeat an agent's
    return status
