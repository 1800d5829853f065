"""Relays: the control channels over which nodes behind NATs find each other."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import join_text


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    relays = node.status.relays
    if not relays:
        return ok("none is configured")
    away = [
        f"{relay.name} at {relay.address}{f': {relay.error}' if relay.error else ''}"
        for relay in relays
        if not relay.connected
    ]
    advice = "see that `isthmus relay` runs there, and that its port is open to this node"
    if len(away) == len(relays):
        return Finding(State.ERROR, "no relay is connected", advice, tuple(away))
    if away:
        return Finding(State.WARNING, f"not connected: {join_text(away)}", advice)
    return ok(f"connected: {join_text([f'{relay.name} ({relay.rtt_ms:.0f} ms)' for relay in relays])}")


CHECK = Check("relays", "relays", _run, ("agent", "certificate"))
