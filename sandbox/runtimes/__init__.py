"""One file for each way of running an agent; each has `make(claim) -> Runtime` (see sandbox.turns)."""
