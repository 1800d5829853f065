"""Upstreams: the resolvers for every name that is not the cluster's."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import join_text

# What the DNS worker, which asks them all the time, has found itself.
TROUBLES = ("dns.no-upstreams", "dns.upstream-loop", "dns.upstreams-dead")


def _run(node: Examined) -> Finding:
    if node.facts is None:
        return not_checked("the agent's settings are not known")
    if known := [one.text for one in node.status.troubles if one.code in TROUBLES] if node.status else []:
        return Finding(State.WARNING, "; ".join(known), "correct dns.upstreams, or the way to them")
    upstreams = node.facts.settings.dns.upstreams
    if not upstreams:
        return not_checked(
            "dns.upstreams is empty: the servers of /etc/resolv.conf are used, and the agent has no complaint"
        )
    why = {server: error for server in upstreams if (error := node.ask_upstream(server))}
    details = tuple(f"{server}: {error}" for server, error in why.items())
    if len(why) == len(upstreams):
        advice = "names outside the cluster get SERVFAIL: correct dns.upstreams, or the way to them"
        return Finding(State.ERROR, "no upstream answers", advice, details)
    if why:
        return Finding(State.WARNING, f"silent: {join_text(list(why))}", "the others are used meanwhile", details)
    return ok(f"answering: {join_text(list(upstreams))}")


CHECK = Check("upstreams", "upstream resolvers", _run, ("agent",))
