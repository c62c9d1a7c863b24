"""Attacks: agents that try to harm their neighbours, their runner and their host, deployed over HTTP to a real
coordinator and runner.

Each attack is a function in agent/armoury/, run by a deployed agent of the python and of the command runtime, and a
test case here. Each case asserts that the attack failed, and that nobody noticed: a neighbour session that was there
before answers as before, its file and its secret untouched and nowhere in what the attacker said; the runner is the
same process, registered, healthy, and has logged no error; the host is as it was (scene.py says what is looked at).

Covers: resources, processes, files, kernel, network, output, archives; the environment a session brings along.
Leaves out, because this version has no such endpoints: files and workspace archives of a session (links made during
the call, hostile members), exec, attachments, snapshots. They need cases here when they come.

Modes: as root, and as an ordinary user (start pytest as one). What a case needs the host to enforce it asks of
GET /api/internal/runners, and skips, with the runner's own words as the reason, where that is missing.
"""
