"""Open files: a proxied connection takes two, so a low limit is a low number of connections."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok

FULL = 0.8
LEAST = 4_096


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    found = {worker.name: node.descriptors(worker.pid) for worker in node.status.workers}
    known = {name: one for name, one in found.items() if one is not None}
    if not known:
        return not_checked("the workers' open files cannot be read: ask as root")
    texts = [f"{name} {one.used} of {one.limit}" for name, one in known.items()]
    advice = "raise the limit on open files (LimitNOFILE= of the agent's unit); the agent uses all that it may"
    if any(one.used > FULL * one.limit for one in known.values()):
        return Finding(State.WARNING, f"nearly all are in use: {', '.join(texts)}", advice)
    if any(one.limit < LEAST for one in known.values()):
        return Finding(State.WARNING, f"the limit is low: {', '.join(texts)}", advice)
    return ok(", ".join(texts))


CHECK = Check("descriptors", "open files", _run, ("agent", "workers"))
