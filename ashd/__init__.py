"""ashd: AI-agent sessions in sandboxes, on one machine or a fleet."""

__version__ = "0.1.0"
