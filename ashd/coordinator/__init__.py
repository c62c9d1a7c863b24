"""The coordinator: what clients talk to, and what runners report to.

Holds: the HTTP API (app.py, a file per resource), the streams of events, dispatch to runners, their registry, sweeps.
Never holds: SQL (ashd.store), state that a restart would lose.
Runs in: gunicorn workers; everything with a connection or a task is opened in the worker's lifespan, after the fork.
Ends: on SIGTERM, streams get a last frame and a valid cursor, and clients go on at another worker.
"""
