"""The agent: does it run, and does it answer? Everything else depends on it."""

from isthmus.explain.check import Check, Examined, Finding, State, ok
from isthmus.explain.words import duration_text


def _run(node: Examined) -> Finding:
    if node.error is not None:
        return Finding(State.ERROR, node.error.message, node.error.hint)
    if node.status is None:
        return Finding(State.ERROR, "the agent did not say how it is", "look at its log")
    up = duration_text(node.now_s - node.status.started_at)
    return ok(f"node {node.status.node}, process {node.status.pid}, up {up}")


CHECK = Check("agent", "agent", _run)
