"""The original destination: by which call the proxy learns it, and why by that one."""

from isthmus.explain.check import Check, Examined, Finding, not_checked, ok


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    interception = node.status.interception
    # A kernel on which the call hangs is not at fault here: the other way was chosen for it, and it works.
    reason = f": {interception.reason}" if interception.reason else ""
    return ok(f"by {interception.original_destination}{reason}")


CHECK = Check("original-destination", "original destination", _run, ("agent",))
