"""What is known of a node: the store's Node object and the node's own announcement, merged by a stated precedence.

1. An announcement under this node's own name, or one that is not well-formed, is refused as a whole.
2. The store wins: its site and its pod ranges replace what is announced.
3. What the store leaves open comes from the announcement.
4. Addresses are the union, the store's first.
"""

from collections.abc import Sequence
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import msgspec

from isthmus.model.cluster import Node
from isthmus.plan.verdict import Because, Verdict

MAX_ANNOUNCED = 64
"""Ranges or addresses one announcement may carry."""
WIDEST = {4: 8, 6: 16}
"""Shortest prefix a pod range may have: a wider one would take in other owners' addresses."""


class NodeFacts(msgspec.Struct, frozen=True):
    """What planning needs to know of a node. Ranges and addresses are canonical text."""

    site: str = ""
    pod_cidrs: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


class Me(msgspec.Struct, frozen=True):
    """This node."""

    node: str
    site: str = ""
    pod_cidrs: tuple[str, ...] = ()


class Adoption(StrEnum):
    """What became of an announcement."""

    STORED = "stored"  # there was none; the store speaks alone
    ANNOUNCED = "announced"  # the store is silent; the announcement speaks alone
    MERGED = "merged"  # both speak, by the precedence above
    REFUSED = "refused"


class KnownNode(msgspec.Struct, frozen=True):
    """The merged facts, None where nothing is known, and the verdict on the announcement."""

    facts: NodeFacts | None
    verdict: Verdict[Adoption]


def describe_me(node: str, site: str, pod_cidrs: Sequence[str], stored: Node | None) -> Me:
    """This node: a setting wins over the store's Node object, which fills in what no setting gives."""
    return Me(
        node,
        site or (stored.site if stored else ""),
        tuple(pod_cidrs) or (stored.pod_cidrs if stored else ()),
    )


def merge_node(
    name: str,
    stored: Node | None,
    announced: NodeFacts | None,
    me: Me,
    reserved: Sequence[str] = (),
) -> KnownNode:
    """Merge what the store and an announcement say of ``name``.

    ``reserved`` are ranges no pod may be in (service and virtual ranges): an announcement that claims one is refused.
    """
    base = _facts_of(stored) if stored else None
    if announced is None:
        return KnownNode(base, _stored(name, stored))
    refusal = _refusal(name, announced, me, reserved)
    if refusal:
        return KnownNode(base, refusal)
    if base is None:
        because = Because(f"the store has no Node {name}", object=f"Node {name}")
        return KnownNode(announced, Verdict(Adoption.ANNOUNCED, "announced-only", because))
    return KnownNode(_merge(base, announced), _merged(name, base, announced))


def _facts_of(node: Node) -> NodeFacts:
    return NodeFacts(node.site, node.pod_cidrs, node.internal_ips + node.external_ips)


def _merge(base: NodeFacts, announced: NodeFacts) -> NodeFacts:
    addresses = dict.fromkeys(base.addresses + announced.addresses)
    return NodeFacts(base.site or announced.site, base.pod_cidrs or announced.pod_cidrs, tuple(addresses))


def _stored(name: str, stored: Node | None) -> Verdict[Adoption]:
    if stored is None:
        return Verdict(Adoption.STORED, "unknown", Because(f"neither store nor announcement knows {name}"))
    return Verdict(Adoption.STORED, "stored-only", Because("nothing was announced", object=str(stored.key)))


def _merged(name: str, base: NodeFacts, announced: NodeFacts) -> Verdict[Adoption]:
    kept = []
    if base.site and announced.site and base.site != announced.site:
        kept.append(f"site {base.site} (announced: {announced.site})")
    if base.pod_cidrs and announced.pod_cidrs and set(base.pod_cidrs) != set(announced.pod_cidrs):
        kept.append(f"pod ranges {', '.join(base.pod_cidrs)} (announced: {', '.join(announced.pod_cidrs)})")
    if kept:
        text = f"the store wins: {'; '.join(kept)}"
        return Verdict(Adoption.MERGED, "store-wins", Because(text, object=f"Node {name}"))
    return Verdict(Adoption.MERGED, "no-conflict", Because("store and announcement agree", object=f"Node {name}"))


def _refusal(name: str, announced: NodeFacts, me: Me, reserved: Sequence[str]) -> Verdict[Adoption] | None:
    if name == me.node:
        return _refuse("own-name", f"{name} is this node; nobody else speaks for it")
    if max(len(announced.pod_cidrs), len(announced.addresses)) > MAX_ANNOUNCED:
        return _refuse("too-many", f"more than {MAX_ANNOUNCED} ranges or addresses")
    for text in announced.addresses:
        if not _is_address(text):
            return _refuse("bad-address", f"{text!r} is no address")
    for text in announced.pod_cidrs:
        refusal = _refuse_range(text, reserved)
        if refusal:
            return refusal
    return None


def _refuse_range(text: str, reserved: Sequence[str]) -> Verdict[Adoption] | None:
    try:
        network = ip_network(text)
    except ValueError:
        return _refuse("bad-range", f"{text!r} is no range")
    if network.prefixlen < WIDEST[network.version]:
        return _refuse("range-too-wide", f"{text} is wider than /{WIDEST[network.version]}")
    for other in reserved:
        if overlap(network, ip_network(other)):
            return _refuse("reserved-range", f"{text} overlaps {other}, which no pod may be in")
    return None


def overlap(one: IPv4Network | IPv6Network, other: IPv4Network | IPv6Network) -> bool:
    """Whether two ranges share an address; ranges of different families never do."""
    if isinstance(one, IPv4Network) and isinstance(other, IPv4Network):
        return one.overlaps(other)
    if isinstance(one, IPv6Network) and isinstance(other, IPv6Network):
        return one.overlaps(other)
    return False


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _refuse(rule: str, text: str) -> Verdict[Adoption]:
    return Verdict(Adoption.REFUSED, rule, Because(text, object="announcement"))
