"""The certificate: without a valid one no other node talks to this one."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import duration_text

OVERDUE_S = 600.0
ENROL = "on the issuer run `isthmus token create --node NAME`, and start the agent with that token"


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    identity = node.status.identity
    if identity.state == "none":
        alone = not node.status.peers and not node.status.relays
        text = "this node has no certificate"
        return ok(f"{text}, and no other node is known") if alone else Finding(State.ERROR, text, ENROL)
    if identity.state == "enrolling":
        return Finding(State.WARNING, f"enrolling{_with(identity.error)}", "it is tried again by itself")
    if identity.state != "valid" or identity.expires_at <= node.now_s:
        text = f"the certificate is {identity.state if identity.state != 'valid' else 'expired'}{_with(identity.error)}"
        return Finding(State.ERROR, text, ENROL)
    left = duration_text(identity.expires_at - node.now_s)
    late_s = node.now_s - identity.renews_at if identity.renews_at else 0.0
    if late_s > OVERDUE_S:
        text = f"renewal is {duration_text(late_s)} overdue{_with(identity.error)}; the certificate is valid for {left}"
        return Finding(State.WARNING, text, f"see that the issuer {identity.issuer} runs and can be reached")
    return ok(f"valid for {left}")


def _with(error: str) -> str:
    return f": {error}" if error else ""


CHECK = Check("certificate", "certificate", _run, ("agent", "clock"))
