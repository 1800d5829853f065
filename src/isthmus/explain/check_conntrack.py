"""Connection tracking: a full table drops new connections of everything on this node, silently."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok

FULL = 0.8
COUNT = "net/netfilter/nf_conntrack_count"
LIMIT = "net/netfilter/nf_conntrack_max"


def _run(node: Examined) -> Finding:
    count, limit = node.sysctl(COUNT), node.sysctl(LIMIT)
    if count is None or limit is None or not count.isdigit() or not limit.isdigit() or limit == "0":
        return not_checked("the kernel does not say how full its table of connections is")
    text = f"{count} of {limit} connections tracked"
    if int(count) > FULL * int(limit):
        return Finding(State.WARNING, text, f"raise {LIMIT.replace('/', '.')}, or find who opens so many")
    return ok(text)


CHECK = Check("conntrack", "connection tracking", _run)
