"""The room of pure rules: state machines, cursors, schedules.

Holds: what is decided. Never holds: I/O, clocks, chance, anything of a library. Runs in: any process.
"""
