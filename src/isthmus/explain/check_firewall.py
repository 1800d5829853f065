"""Rules of others: those that act before ours, and firewalls that drop what would reach the proxy."""

from isthmus.explain.check import Check, Examined, Finding, Hooked, State, not_checked, ok
from isthmus.explain.words import count_text
from isthmus.kernel.nft_rules import PRIORITY_NAT
from isthmus.wire.local import InterceptionStatus

NAT_HOOKS = ("prerouting", "output")


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    chains = node.hooked()
    if chains is None:
        return not_checked("the rules of others could not be read")
    interception = node.status.interception
    before = [_shadows(chain) for chain in chains if _acts_before(chain)]
    closed = [_closed(chain) for chain in chains if _drops_ours(chain, interception)]
    if before or closed:
        advice = []
        if before:
            advice.append(
                "the first NAT chain that changes a connection wins: see that those leave the service ranges alone"
            )
        if closed:
            advice.append(f"let packets to {interception.address_v4} ports 53 and {interception.port} in")
        return Finding(State.WARNING, "rules of others may come in the way", "; ".join(advice), (*before, *closed))
    return ok(f"{count_text(len(chains), 'foreign chain')}, none in the way")


def _acts_before(chain: Hooked) -> bool:
    return (
        chain.kind == "nat" and chain.hook in NAT_HOOKS and chain.priority <= PRIORITY_NAT and bool(chain.text.strip())
    )


def _drops_ours(chain: Hooked, interception: InterceptionStatus) -> bool:
    """A closed firewall that names neither our device nor our address: pods' packets end there."""
    if chain.hook != "input" or not chain.drops:
        return False
    names = [interception.device, interception.address_v4, interception.address_v6]
    return not any(name and name in chain.table_text for name in names)


def _shadows(chain: Hooked) -> str:
    return f"{chain.name}: NAT at {chain.hook}, priority {chain.priority}, before ours ({PRIORITY_NAT})"


def _closed(chain: Hooked) -> str:
    return f"{chain.name}: drops what it does not know at {chain.hook}, and does not name us"


CHECK = Check("firewall", "rules of others", _run, ("agent",))
