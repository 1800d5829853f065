"""Names: this node's DNS server answers on its address, and it is ours that answers."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok


def _run(node: Examined) -> Finding:
    if node.facts is None or node.status is None:
        return not_checked("the agent's settings are not known")
    interception = node.status.interception
    address = interception.address_v4 or interception.address_v6
    record_type = "A" if interception.address_v4 else "AAAA"
    # The server's own name: nobody else on the way to that address would answer it with that address.
    name = f"ns.dns.{node.facts.settings.dns.domain}"
    answer = node.dns.resolve(name, record_type)
    if answer is None:
        return Finding(
            State.ERROR, f"{address} does not answer for {name}", "pods get no names: look at the agent's log"
        )
    if address not in answer:
        text = f"another server answers on {address}: {name} is {', '.join(sorted(answer)) or 'unknown to it'}"
        return Finding(State.ERROR, text, "find the process that listens on port 53 there: `ss -lnup 'sport = 53'`")
    return ok(f"{address} answers for {node.facts.settings.dns.domain}")


CHECK = Check("dns", "names", _run, ("agent", "workers", "interception"))
