"""The room of `ashd up`: everything that mode 1 has and a fleet has not.

Holds: the embedded Postgres, and the supervisor of the three programs of one machine. Never holds: anything a
coordinator or runner does; they are started as the same commands an operator would type.
Runs in one process without threads ("ashd: up"), the parent of all others; they are told by the kernel when it dies.
Ends, on SIGTERM or ctrl-c, by ending its children in the reverse order of their start.
"""
