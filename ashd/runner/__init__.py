"""The room of the runner: the supervisor of one host's sandboxes.

Holds: the supervisor and what it needs (zygote, warm pool, cgroups, workspaces, journals), its gRPC service, its link
up to the coordinators. Never holds: a database, a fork (the zygote forks), what happens inside a sandbox (the room
`sandbox`). Runs in: `ashd runner`, one asyncio loop. Ends: SIGTERM drains, ends the sandboxes and deregisters; killed,
its sandboxes live on and its successor adopts them.
"""
