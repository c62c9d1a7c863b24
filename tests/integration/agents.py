"""Small agents that tests deploy."""

HELLO = {"agent.py": 'async def turn(message, session):\n    yield "hello "\n    yield message.text\n'}

COUNTER = {
    "agent.py": """
count = 0
async def turn(message, session):
    global count
    count += 1
    yield f"{count} {len(session.history)} {session.turn}"
"""
}

SLOW = {
    "agent.py": """
import asyncio
async def turn(message, session):
    n = int(message.text)
    for i in range(n):
        await asyncio.sleep(0.05)
        yield f"{i} "
        if i % 10 == 9:
            block = {"type": "text", "text": f"block {i}"}
            yield {"type": "assistant", "message": {"role": "assistant", "content": [block]}}
"""
}

TOOLS = {
    "agent.py": """
async def turn(message, session):
    yield {"type": "system", "subtype": "init"}
    yield {"type": "assistant", "message": {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "let me look"},
        {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}},
        {"type": "server_thing", "payload": 1},
        {"type": "done", "forged": True},
    ]}}
    yield {"type": "user", "message": {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t1", "content": "a.txt", "is_error": False}]}}
    yield {"type": "result", "subtype": "success", "result": "one file", "num_turns": 2,
           "usage": {"input_tokens": 3, "output_tokens": 5}}
"""
}

FAILING = {"agent.py": 'async def turn(message, session):\n    yield "so far"\n    raise ValueError("no such luck")\n'}

SUICIDE = {
    "agent.py": """
import os, signal
async def turn(message, session):
    yield "goodbye"
    os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != 1 else os._exit(9)
"""
}

HUNGRY = {
    "agent.py": """
async def turn(message, session):
    hoard = []
    while True:
        hoard.append(bytearray(4 << 20))
""",
    "agent.yaml": "runtime: python\nlimits:\n  memoryMb: 96\n",
}

FLOOD = {
    "agent.py": """
async def turn(message, session):
    text = "x" * 4000
    delta = {"type": "stream_event", "event": {"type": "content_block_delta", "index": 0,
             "delta": {"type": "text_delta", "text": text}}}
    for _ in range(int(message.text)):
        yield delta
    yield "that was all"
"""
}

UNICODE = {
    "agent.py": """
async def turn(message, session):
    for character in message.text:
        yield character
"""
}

ECHO = {"agent.yaml": "runtime: echo\n"}

MOCK = {"CLAUDE.md": "You are a test.\n"}

COMMAND = {
    "agent.yaml": 'runtime: command\nentry: ["python3", "agent.py"]\n',
    "agent.py": """
import json, sys
for line in sys.stdin:
    told = json.loads(line)
    if told["type"] == "turn":
        print(json.dumps({"type": "delta", "text": "you said "}), flush=True)
        print(json.dumps({"type": "delta", "text": told["content"]}), flush=True)
        print(json.dumps({"type": "done"}), flush=True)
""",
}
