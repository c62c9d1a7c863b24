"""The room of the wire: gRPC between coordinators and runners.

Holds: generated code (v1/, from proto/), channels and servers with their options and authentication, statuses,
conversions. Never holds: decisions. Runs in: coordinator workers and runner supervisors.
"""
