"""The room of commands: what `ashd <command>` does, a file per group.

Holds: each command's parser and the function behind it. Never holds: anything a running coordinator or runner needs.
Runs in the caller's terminal. Client commands speak the public API only and import neither gRPC, Falcon nor psycopg,
so that they start at once; commands that serve import their room when they are run.
Ends with an exit status (exits.py).
"""
