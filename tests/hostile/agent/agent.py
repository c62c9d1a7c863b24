"""An agent that does what it is told, and is told to attack: one order a turn, one verdict as its answer.

As a python agent through `turn`, as a command agent through `main`. What an attack yields is said as if the agent had
said it; its verdict comes last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

from armoury import weapons  # type: ignore[import-not-found]


async def turn(message: Any, session: Any) -> AsyncIterator[Any]:
    for said in weapons.obey(message.text):
        yield said


def main() -> None:
    for line in sys.stdin:
        told = json.loads(line)
        if told["type"] == "turn":
            for said in _as_lines(weapons.obey(told["content"])):
                print(said, flush=True)


def _as_lines(items: Iterator[Any]) -> Iterator[str]:
    for item in items:
        yield json.dumps({"type": "delta", "text": item} if isinstance(item, str) else item)
    yield '{"type": "done"}'


if __name__ == "__main__":
    main()
