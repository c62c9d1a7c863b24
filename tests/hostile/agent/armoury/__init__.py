"""Attacks, one function each; deployed with agent.py and run inside a sandbox. Standard library only.

An attack returns what it gained, as text; nothing (or an OSError that means refusal) is a defence that held. Each one
is bounded in time, number and bytes, and does no harm even where it succeeds.
"""
