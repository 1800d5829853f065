"""Virtual addresses: what DNS answers for members of headless services that this node cannot route to.

``visibility`` decides; ``VirtualPool`` allocates. An allocation is found by hashing (node, address) and probing from
there, so it does not depend on who else is there unless two hashes meet, and it never moves while it lives. Existing
allocations go in and come out as plain data, so they outlive a restart. A virtual address means something only on the
node that gave it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from types import MappingProxyType

import msgspec

from isthmus.model.cluster import Key
from isthmus.model.findings import Code, Finding, Severity
from isthmus.plan.nodes import Me, NodeFacts, overlap
from isthmus.plan.verdict import Because, Verdict

MemberKey = tuple[str, str]
"""(node, address)"""

GRACE_S = 600.0
"""How long an address that nobody wants is kept for its member: far longer than any DNS answer (30 s) is cached."""


class Visibility(StrEnum):
    """What this node's pods are told of a headless member."""

    REAL = "real"
    VIRTUAL = "virtual"


def visibility(node: str, address: str, nodes: Mapping[str, NodeFacts], me: Me) -> Verdict[Visibility]:
    """Decide whether this node can route to a member. What cannot be known is virtual: that is always right."""
    if node == me.node:
        return _verdict(Visibility.REAL, "same-node", f"{node} is this node")
    facts = nodes.get(node)
    if facts is None:
        return _verdict(Visibility.VIRTUAL, "unknown-node", f"nothing is known of {node}")
    if not me.site or not facts.site:
        return _verdict(Visibility.VIRTUAL, "unknown-site", f"{node if me.site else me.node} has no site")
    if facts.site != me.site:
        return _verdict(Visibility.VIRTUAL, "other-site", f"{node} is on site {facts.site}, this node on {me.site}")
    return _same_site(node, address, facts, me)


def _same_site(node: str, address: str, facts: NodeFacts, me: Me) -> Verdict[Visibility]:
    shared = _first_overlap(facts.pod_cidrs, me.pod_cidrs)
    if address in facts.addresses:
        return _verdict(Visibility.REAL, "node-address", f"{address} is {node}'s own, on the same site")
    if shared:
        return _verdict(Visibility.VIRTUAL, "overlapping-ranges", f"{node} and this node both use {shared}")
    target = ip_address(address)
    for text in facts.pod_cidrs:
        if target in ip_network(text):
            return _verdict(Visibility.REAL, "same-site", f"{address} is in {node}'s range {text}, on the same site")
    return _verdict(Visibility.VIRTUAL, "unknown-range", f"{address} is in no known range of {node}")


def _first_overlap(theirs: Sequence[str], ours: Sequence[str]) -> str:
    for one in theirs:
        for other in ours:
            if overlap(ip_network(one), ip_network(other)):
                return other
    return ""


def _verdict(action: Visibility, rule: str, text: str) -> Verdict[Visibility]:
    return Verdict(action, rule, Because(text))


class VirtualRecord(msgspec.Struct, frozen=True):
    """One allocation as plain data. ``released_s`` is when the last service let go of it, None while it is wanted."""

    node: str
    address: str
    virtual: str
    released_s: float | None = None


class VirtualOwner(msgspec.Struct, frozen=True):
    """What stands behind a virtual address, and the services that it is a member of."""

    node: str
    address: str
    services: tuple[Key, ...]


class VirtualPool:
    """The allocations of one node. ``addresses`` is a live view for ``plan_service``."""

    def __init__(
        self,
        ranges: Sequence[str],
        records: Iterable[VirtualRecord] = (),
        *,
        now_s: float = 0.0,
        grace_s: float = GRACE_S,
    ) -> None:
        """Take up ``records`` of an earlier run; those outside the ranges, or given twice, are forgotten.

        All times are wall clock, for they outlive the process. Members that nobody wants again within the grace are
        released as if they had been let go now.
        """
        self._ranges = {4: _Range(ranges, 4), 6: _Range(ranges, 6)}
        self._grace_s = grace_s
        self._given: dict[MemberKey, str] = {}
        self._owner: dict[str, MemberKey] = {}
        self._wanted_by: dict[MemberKey, set[Key]] = {}
        self._members_of: dict[Key, frozenset[MemberKey]] = {}
        self._released_s: dict[MemberKey, float] = {}
        self._short: set[Key] = set()
        self.addresses: Mapping[MemberKey, str] = MappingProxyType(self._given)
        for record in records:
            self._restore(record, now_s)

    def want(self, service: Key, members: Iterable[MemberKey], now_s: float) -> tuple[Finding, ...]:
        """Set what ``service`` wants (nothing when it is gone); a finding for each member that gets no address."""
        wanted = frozenset(members)
        before = self._members_of.get(service, frozenset())
        for key in before - wanted:
            self._release(service, key, now_s)
        if wanted:
            self._members_of[service] = wanted
        else:
            self._members_of.pop(service, None)
        for key in sorted(wanted):
            self._wanted_by.setdefault(key, set()).add(service)
            self._released_s.pop(key, None)
        short = [key for key in sorted(wanted) if not self._allocate(key, now_s)]
        self._short.add(service) if short else self._short.discard(service)
        return tuple(self._exhausted(service, key) for key in short)

    @property
    def short(self) -> frozenset[Key]:
        """Services with a member that got no address: want again after ``expire`` has freed some."""
        return frozenset(self._short)

    def expire(self, now_s: float) -> tuple[str, ...]:
        """Reclaim what nobody has wanted for the grace; the addresses that are free again."""
        due = [key for key, released_s in self._released_s.items() if now_s - released_s >= self._grace_s]
        return tuple(self._forget(key) for key in due)

    def owner(self, address: str) -> VirtualOwner | None:
        """Who stands behind a virtual address (canonical text); also within the grace, then with no services."""
        key = self._owner.get(address)
        if key is None:
            return None
        return VirtualOwner(*key, services=tuple(sorted(self._wanted_by.get(key, ()))))

    def records(self) -> tuple[VirtualRecord, ...]:
        """All allocations, by member, for the next run."""
        return tuple(
            VirtualRecord(*key, virtual=self._given[key], released_s=self._released_s.get(key))
            for key in sorted(self._given)
        )

    def _restore(self, record: VirtualRecord, now_s: float) -> None:
        key = (record.node, record.address)
        family = ip_address(record.address).version
        if record.virtual in self._owner or key in self._given or not self._ranges[family].has(record.virtual):
            return
        self._given[key] = record.virtual
        self._owner[record.virtual] = key
        self._ranges[family].used += 1
        self._released_s[key] = now_s if record.released_s is None else min(record.released_s, now_s)

    def _allocate(self, key: MemberKey, now_s: float) -> bool:
        if key in self._given:
            return True
        pool = self._ranges[ip_address(key[1]).version]
        if pool.used >= pool.size:
            self.expire(now_s)
        found = pool.probe(key, lambda address: address in self._owner)
        if found is None:
            return False
        self._given[key] = found
        self._owner[found] = key
        pool.used += 1
        return True

    def _release(self, service: Key, key: MemberKey, now_s: float) -> None:
        services = self._wanted_by[key]
        services.discard(service)
        if not services:
            del self._wanted_by[key]
            if key in self._given:
                self._released_s[key] = now_s

    def _forget(self, key: MemberKey) -> str:
        del self._released_s[key]
        address = self._given.pop(key)
        del self._owner[address]
        self._ranges[ip_address(address).version].used -= 1
        return address

    def _exhausted(self, service: Key, key: MemberKey) -> Finding:
        version = ip_address(key[1]).version
        pool = self._ranges[version]
        text = f"no virtual address is left for {key[1]} on {key[0]}: all {pool.size} IPv{version} addresses are given"
        return Finding(
            Severity.ERROR,
            Code.VIRTUAL_EXHAUSTED,
            text,
            field="virtual-cidrs",
            expected=f"a larger IPv{version} range in virtual-cidrs",
            object=str(service),
        )


class _Range:
    """The usable addresses of one family, numbered through: all but the first and the last of each range."""

    def __init__(self, ranges: Sequence[str], version: int) -> None:
        networks = [network for network in map(ip_network, ranges) if network.version == version]
        self._spans = [(int(network[0]) + 1, max(0, network.num_addresses - 2)) for network in networks]
        self._version = version
        self.size = sum(length for _, length in self._spans)
        self.used = 0

    def has(self, text: str) -> bool:
        address = ip_address(text)
        if address.version != self._version:
            return False
        return any(start <= int(address) < start + length for start, length in self._spans)

    def probe(self, key: MemberKey, taken: Callable[[str], bool]) -> str | None:
        """The first free address at or after the hash of ``key``, or None."""
        if self.used >= self.size:
            return None
        start = int.from_bytes(blake2b("\0".join(key).encode(), digest_size=16).digest(), "big") % self.size
        while taken(address := self._at(start)):
            start = (start + 1) % self.size
        return address

    def _at(self, number: int) -> str:
        for first, length in self._spans:
            if number < length:
                return str(IPv4Address(first + number) if self._version == 4 else IPv6Address(first + number))
            number -= length
        raise IndexError(number)
