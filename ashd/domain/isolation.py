"""How far a sandbox is closed off, as one word."""

from __future__ import annotations

LEVELS = ("none", "standard", "strict")
"""Each has all that the one before it has."""

LEAST = {"auto": "standard"}
"""What a setting that is no level demands at least."""


def reaches(level: str, demanded: str) -> bool:
    """Whether `level` is what the setting `demanded` asks for, or more. What is no level reaches nothing."""
    demanded = LEAST.get(demanded, demanded)
    return level in LEVELS and LEVELS.index(level) >= LEVELS.index(demanded)
