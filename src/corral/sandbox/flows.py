"""How another terminal sees what goes in and out of the sandboxes of this machine."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from corral.actions import Flow
from corral.errors import RequestError
from corral.monitor.jsonl import flow_of
from corral.sandbox.registry import connections, find_sandbox


class Live(NamedTuple):
    """One flow that goes on."""

    sandbox: str
    flow: Flow


def list_flows(name: str | None = None) -> list[Live]:
    """The flows of one sandbox (by its id or the beginning of that), or of all of this user's whose controllers answer;
    oldest first. Raises RequestError where the one is not there."""
    found: list[Live] = []
    if name is not None:
        connection, entry = find_sandbox(name)
        try:
            message, _ = connection.ask({"verb": "flows", "id": entry.id})
        finally:
            connection.close()
        found += (Live(entry.id, flow_of(fields)) for fields in message["flows"])
    else:
        for connection, _ in connections():
            # A controller that ends just now, or hangs; what it has told already is shown.
            with suppress(RequestError, OSError, ValueError):
                listed, _ = connection.ask({"verb": "list"})
                for entry in listed["sandboxes"]:
                    message, _ = connection.ask({"verb": "flows", "id": entry["id"]})
                    found += (Live(entry["id"], flow_of(fields)) for fields in message["flows"])
            connection.close()
    return sorted(found, key=lambda live: live.flow.started)
