"""The command runtime's protocol, all of it, in one small program: it counts down from the number it is sent.

It imports nothing of ashd, and could be written in any language that reads and writes lines.
"""

import json
import queue
import sys
import threading

turns = queue.Queue()
interrupted = threading.Event()


def say(**message):
    print(json.dumps(message), flush=True)


def read_commands():
    """Reads beside the work, so that an interrupt is heard in mid-turn."""
    for line in sys.stdin:
        command = json.loads(line)
        if command["type"] == "turn":
            turns.put(command)
        elif command["type"] == "interrupt":
            interrupted.set()
    turns.put(None)


def count_down(turn):
    content = turn["content"]
    if not isinstance(content, str) or not content.strip().isdigit():
        say(type="done", error="send a number, and I count down from it")
        return
    start = int(content)
    for number in range(start, 0, -1):
        say(type="delta", text=f"{number} ")
        if interrupted.wait(timeout=0.1):
            say(type="done")
            return
    # A message object of one's own: what clients show, and what is saved.
    blocks = [{"type": "text", "text": f"lift-off! (turn {turn['turn']}, from {start})"}]
    say(type="assistant", message={"role": "assistant", "content": blocks})
    say(type="done")


threading.Thread(target=read_commands, daemon=True).start()
while (turn := turns.get()) is not None:
    print(f"turn {turn['turn']} of session {turn['session']['id']}", file=sys.stderr)  # goes to the session's logs
    interrupted.clear()
    count_down(turn)
