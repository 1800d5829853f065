"""The workers: the processes that carry bytes and answer names are ready, and stay so."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import count_text, join_text

NAMES = {"data", "dns"}


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    workers = node.status.workers
    down = [worker.name for worker in workers if worker.state != "ready"]
    absent = sorted(NAMES - {worker.name for worker in workers})
    if down or absent:
        return Finding(
            State.ERROR,
            f"not ready: {join_text(down + absent)}",
            "look at the agent's log for why it ends; it is retried",
        )
    restarted = [f"{one.name} {count_text(one.restarts, 'time')}" for one in workers if one.restarts]
    if restarted:
        return Finding(State.WARNING, f"started again: {join_text(restarted)}", "look at the agent's log for why")
    return ok(f"ready: {join_text([worker.name for worker in workers])}")


CHECK = Check("workers", "worker processes", _run, ("agent",))
