"""Inputs and effects of the core as short texts, for the trace of a run."""

from __future__ import annotations

from typing import Any

from proto.pb import rpc_pb2
from proto.scan import WatchResponse


def describe(value: Any) -> str:
    """Return a short text for an input or effect of the core."""
    if isinstance(value, WatchResponse):
        flags = [name for name in ("created", "canceled", "fragment") if getattr(value, name)]
        revisions = [event.revision for event in value.events]
        return f"<header {value.header.revision} {' '.join(flags)} {revisions} compact {value.compact_revision}>"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(describe, value))}]"
    slots = [
        name
        for name in ("session", "watches", "payload", "message", "upstream", "status", "text")
        if hasattr(value, name)
    ]
    if type(value).__module__.endswith(".effects"):
        return f"{type(value).__name__}({', '.join(describe(getattr(value, name)) for name in slots)})"
    if type(value).__name__ == "Payload":
        return f"payload {value.first_revision}..{value.last_revision}"
    if isinstance(value, bytes):
        return str(rpc_pb2.WatchResponse.FromString(value[5:])).replace("\n", " ")
    if type(value).__name__ == "Session":
        return f"session {id(value) % 10_000}"
    return repr(value)
