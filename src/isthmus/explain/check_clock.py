"""The clock: certificates are valid by it, so a wrong clock looks like a wrong certificate."""

from math import isinf

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import duration_text

ADVICE = "set the clock, and let chrony or systemd-timesyncd keep it"
SKEW = "identity.clock"  # what the issuer's answers told the agent
TOLERATED_S = 60.0


def _run(node: Examined) -> Finding:
    begins_s = node.certificate_from_s()
    if begins_s is not None and node.now_s < begins_s:
        late = duration_text(begins_s - node.now_s)
        return Finding(State.ERROR, f"this node's clock is at least {late} behind its certificate's issuer", ADVICE)
    if node.status and (apart := next((one.text for one in node.status.troubles if one.code == SKEW), "")):
        return Finding(State.WARNING, apart, ADVICE)
    error_s = node.clock_error_s()
    if error_s is None:
        return not_checked("the kernel does not say how right its clock is")
    if isinf(error_s):
        # Common in containers and on small machines whose host keeps the clock: no reason to wake anybody.
        return not_checked("nothing on this node keeps its clock right, so its error is not known")
    if error_s > TOLERATED_S:
        return Finding(State.WARNING, f"the clock may be off by {duration_text(error_s)}", ADVICE)
    return ok(f"kept right, to {duration_text(error_s)} or better")


CHECK = Check("clock", "clock", _run, ("agent",))
