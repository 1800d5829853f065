"""Which endpoint of a service a connection goes to, and which are tried after it. Pure.

``Pool`` is the state of one service port: what was allocated (rotation, affinity, open connections, rests) beside what
the model says. Time and randomness come in as arguments. A choice costs the same at 3 members and at 1,000: what
depends on all members is recomputed only when the members or the rests change.

Order of the rules, first that applies: ClientIP affinity, then the balance of the service within the nearest tier that
has an endpoint at hand. A member that is not ready is never tried; one that rests is tried when nothing else is left.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from ipaddress import ip_address
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import structs

from isthmus.plan.serving import Balance, Distance, Member, PortPlan, ServicePlan
from isthmus.plan.verdict import Because, Verdict

if TYPE_CHECKING:
    from random import Random

AFFINITY_ENTRIES = 65_536
RING_POINTS = 64
_DIGEST_BYTES = 64
_POINT_BYTES = 8


class Candidate(NamedTuple):
    """An endpoint that may be tried; ``node`` and ``address`` are its identity, ``port`` is the endpoint's own."""

    node: str
    address: str
    port: int
    distance: Distance


class Choice(NamedTuple):
    """The endpoints in the order in which to try them, each once, worked out as far as it is read.

    ``rule`` is one of the names in docs/proxy.md: ``affinity``, a Balance value, ``all-resting`` or ``no-endpoint``.
    """

    rule: str
    candidates: Iterator[Candidate]


class Standing(msgspec.Struct, frozen=True):
    """One member as ``explain`` shows it: which tier it stands in (from 1), or why it is passed over."""

    node: str
    address: str
    port: int
    tier: int
    passed_over: str = ""


class Ring:
    """Consistent hashing: each candidate holds RING_POINTS places on a circle; a key belongs to the next place.

    Adding or removing a candidate changes only the keys that it gains or loses.
    """

    __slots__ = ("_members", "_places")

    def __init__(self) -> None:
        self._members: set[Candidate] = set()
        self._places: list[tuple[int, Candidate]] = []

    def update(self, members: Iterable[Candidate]) -> None:
        """Make the ring hold exactly ``members``."""
        wanted = set(members)
        gone, new = self._members - wanted, wanted - self._members
        if gone:
            self._places = [place for place in self._places if place[1] not in gone]
        if len(new) > len(self._members):
            self._places = sorted(chain(self._places, *map(_places_of, new)))
        else:
            for candidate in new:
                for place in _places_of(candidate):
                    insort(self._places, place)
        self._members = wanted

    def walk(self, key: bytes) -> Iterator[Candidate]:
        """Every candidate once, in the order of the circle from the place of ``key``."""
        places = self._places
        point = int.from_bytes(blake2b(key, digest_size=_POINT_BYTES).digest(), "big")
        start = bisect_left(places, point, key=lambda place: place[0])
        seen: set[Candidate] = set()
        for at in range(len(places)):
            candidate = places[(start + at) % len(places)][1]
            if candidate not in seen:
                seen.add(candidate)
                yield candidate
                if len(seen) == len(self._members):
                    return


def _places_of(candidate: Candidate) -> Iterator[tuple[int, Candidate]]:
    identity = f"{candidate.node}|{candidate.address}|{candidate.port}".encode()
    for block in range(RING_POINTS * _POINT_BYTES // _DIGEST_BYTES):
        digest = blake2b(identity, digest_size=_DIGEST_BYTES, salt=bytes((block,))).digest()
        for at in range(0, _DIGEST_BYTES, _POINT_BYTES):
            yield int.from_bytes(digest[at : at + _POINT_BYTES], "big"), candidate


def hash_key(client_address: str) -> bytes:
    """What consistent hashing sees of a client: its address alone; ``::ffff:10.0.0.1`` is ``10.0.0.1``."""
    address = ip_address(client_address.partition("%")[0])
    mapped = address.ipv4_mapped if address.version == 6 else None
    return (mapped or address).packed


class Load:
    """Candidates by their number of open connections: the least loaded one is found without looking at all."""

    __slots__ = ("_buckets", "_counts", "_least")

    def __init__(self, candidates: Iterable[Candidate], active: dict[Candidate, int]) -> None:
        self._counts = {candidate: active.get(candidate, 0) for candidate in candidates}
        self._buckets: dict[int, dict[Candidate, None]] = {}
        for candidate, count in self._counts.items():
            self._buckets.setdefault(count, {})[candidate] = None
        self._least = min(self._buckets, default=0)

    def least(self) -> Candidate | None:
        """The candidate with the fewest connections; among equals the one that has waited longest."""
        while bucket := self._buckets.get(self._least):
            return next(iter(bucket))
        return None

    def move(self, candidate: Candidate, count: int) -> None:
        """``candidate`` has ``count`` open connections now; one that is not among the candidates is ignored."""
        before = self._counts.get(candidate)
        if before is None:
            return
        bucket = self._buckets[before]
        del bucket[candidate]
        if not bucket:
            del self._buckets[before]
        self._counts[candidate] = count
        self._buckets.setdefault(count, {})[candidate] = None
        if count < self._least or self._least not in self._buckets:
            # A count changes by one, so the next least is this one's or, where others share its old place, unchanged.
            self._least = count if count < self._least or count == before + 1 else min(self._buckets)

    def in_order(self) -> list[Candidate]:
        """All candidates, least loaded first."""
        return [candidate for count in sorted(self._buckets) for candidate in self._buckets[count]]


class Pool:
    """The endpoints of one service port with the state that choosing among them needs."""

    __slots__ = (
        "_active",
        "_affinity",
        "_affinity_s",
        "_at_hand",
        "_balance",
        "_loads",
        "_resting",
        "_rings",
        "_tiers",
        "_turn",
        "_wakes_s",
    )

    def __init__(self, plan: ServicePlan, port: PortPlan) -> None:
        self._turn = 0
        self._active: dict[Candidate, int] = {}
        self._resting: dict[Candidate, float] = {}
        self._affinity: OrderedDict[str, tuple[Candidate, float]] = OrderedDict()
        self._rings: list[Ring] = []
        self.update(plan, port)

    def update(self, plan: ServicePlan, port: PortPlan) -> None:
        """The service changed: rotation, open connections, rests and affinity of members that stay are kept."""
        self._balance = plan.balance
        self._affinity_s = plan.affinity_s
        self._tiers = tiers_of(plan, port)
        known = set(chain.from_iterable(self._tiers))
        self._resting = {candidate: until for candidate, until in self._resting.items() if candidate in known}
        self._refresh()
        if plan.balance is Balance.CLIENT_HASH:
            self._rings = (self._rings + [Ring() for _ in self._tiers])[: len(self._tiers)]
            for ring, tier in zip(self._rings, self._tiers, strict=True):
                ring.update(tier)
        else:
            self._rings = []

    def choose(self, client_address: str, now_s: float, rng: "Random") -> Choice:
        """The order in which to try the endpoints for one connection of ``client_address``."""
        if now_s >= self._wakes_s:
            self._wake(now_s)
        if self._affinity_s is not None:
            held = self._affinity.get(client_address)
            if held is not None and now_s - held[1] < self._affinity_s and self._is_at_hand(held[0]):
                self._remember(client_address, held[0], now_s)
                return Choice("affinity", self._behind(held[0], client_address, rng))
        if not any(self._at_hand):
            if self._resting:
                return Choice("all-resting", _by_rest(self._resting))
            return Choice("no-endpoint", iter(()))
        return Choice(self._balance.value, self._balanced(client_address, rng))

    def connected(self, candidate: Candidate, client_address: str, now_s: float) -> None:
        """A connection to ``candidate`` is open: it answers, it is busier, and the client sticks to it."""
        count = self._active.get(candidate, 0) + 1
        self._active[candidate] = count
        for load in self._loads:
            load.move(candidate, count)
        if candidate in self._resting:
            self._resting = {each: until for each, until in self._resting.items() if each != candidate}
            self._refresh()
        if self._affinity_s is not None:
            self._remember(client_address, candidate, now_s)

    def ended(self, candidate: Candidate) -> None:
        """A connection that ``connected`` reported is over."""
        count = self._active.get(candidate, 0) - 1
        if count > 0:
            self._active[candidate] = count
        else:
            self._active.pop(candidate, None)
        for load in self._loads:
            load.move(candidate, max(0, count))

    def rest(self, candidate: Candidate, until_s: float) -> None:
        """``candidate`` refused or did not answer: pass it over until ``until_s``."""
        if self.holds(candidate):
            self._resting = {**self._resting, candidate: until_s}
            self._refresh()

    def holds(self, candidate: Candidate) -> bool:
        """Whether the model still offers ``candidate``."""
        return any(candidate in tier for tier in self._tiers)

    def resting(self, now_s: float) -> dict[Candidate, float]:
        """Who rests, and for how many seconds still."""
        return {candidate: until - now_s for candidate, until in self._resting.items() if until > now_s}

    def active(self) -> dict[Candidate, int]:
        """Open connections by endpoint; those without any are left out."""
        return dict(self._active)

    def _balanced(self, client_address: str, rng: "Random") -> Iterator[Candidate]:
        """By the service's balance, nearest tier first; those that rest come last, the soonest awake first.

        An order holds on to the lists of its own time, so an endpoint that this very connection puts to rest does not
        come up again at the end.
        """
        if self._balance is Balance.ROUND_ROBIN:
            self._turn = turn = self._turn + 1  # taken now, not when the order is read
            order = _rotations(self._at_hand, turn)
        elif self._balance is Balance.RANDOM:
            order = _rotations(self._at_hand, rng.getrandbits(32))
        elif self._balance is Balance.LEAST_CONNECTIONS:
            order = _least_loaded(self._loads)
        else:
            order = _hashed(self._rings, hash_key(client_address), self._resting)
        return chain(order, _by_rest(self._resting)) if self._resting else order

    def _behind(self, first: Candidate, client_address: str, rng: "Random") -> Iterator[Candidate]:
        yield first
        yield from (candidate for candidate in self._balanced(client_address, rng) if candidate != first)

    def _is_at_hand(self, candidate: Candidate) -> bool:
        return candidate not in self._resting and self.holds(candidate)

    def _remember(self, client_address: str, candidate: Candidate, now_s: float) -> None:
        self._affinity[client_address] = (candidate, now_s)
        self._affinity.move_to_end(client_address)
        if len(self._affinity) > AFFINITY_ENTRIES:
            self._affinity.popitem(last=False)

    def _wake(self, now_s: float) -> None:
        self._resting = {candidate: until for candidate, until in self._resting.items() if until > now_s}
        self._refresh()

    def _refresh(self) -> None:
        self._wakes_s = min(self._resting.values(), default=float("inf"))
        self._at_hand = [[each for each in tier if each not in self._resting] for tier in self._tiers]
        least = self._balance is Balance.LEAST_CONNECTIONS
        self._loads = [Load(tier, self._active) for tier in self._at_hand] if least else []


def _rotations(tiers: list[list[Candidate]], turn: int) -> Iterator[Candidate]:
    for tier in tiers:
        for at in range(len(tier)):
            yield tier[(turn + at) % len(tier)]


def _least_loaded(loads: list[Load]) -> Iterator[Candidate]:
    for load in loads:
        first = load.least()
        if first is not None:
            yield first
            yield from (candidate for candidate in load.in_order() if candidate != first)


def _hashed(rings: list[Ring], key: bytes, resting: Mapping[Candidate, float]) -> Iterator[Candidate]:
    for ring in rings:
        yield from (candidate for candidate in ring.walk(key) if candidate not in resting)


def _by_rest(resting: Mapping[Candidate, float]) -> Iterator[Candidate]:
    return iter(sorted(resting, key=resting.__getitem__))


def of_family(plan: ServicePlan, cluster_address: str) -> ServicePlan:
    """``plan`` with the members of the family of ``cluster_address``; with all of them where that family has none.

    A dual-stack pod is a member twice, once with each address; it must not count twice.
    """
    family = ":" in cluster_address
    same = tuple(member for member in plan.members if (":" in member.address) is family)
    return structs.replace(plan, members=same) if same and len(same) < len(plan.members) else plan


def tiers_of(plan: ServicePlan, port: PortPlan) -> list[dict[Candidate, None]]:
    """The ready candidates of ``port``: nearest tier first, no tier empty, members in the plan's order."""
    tiers: dict[int, dict[Candidate, None]] = {}
    for member in plan.members:
        if passed_over(plan, port, member) == "":
            candidate = Candidate(member.node, member.address, member.ports[port.name], member.distance)
            tiers.setdefault(max(member.distance, plan.prefer), {})[candidate] = None
    return [tiers[distance] for distance in sorted(tiers)]


def passed_over(plan: ServicePlan, port: PortPlan, member: Member) -> str:
    """Why the model alone rules ``member`` out for ``port``; '' where it does not."""
    if port.name not in member.ports:
        return f"has no port {port.name or port.port}"
    if plan.local_only and member.distance is not Distance.SAME_NODE:
        return "on another node, and internalTrafficPolicy is Local"
    if not member.ready and not plan.publish_not_ready:
        return "not ready"
    return ""


def explain(
    plan: ServicePlan, port: PortPlan, client_address: str, resting_s: dict[Candidate, float] | None = None
) -> Verdict[tuple[Standing, ...]]:
    """What a connection of ``client_address`` may reach, in tiers, and why members are passed over.

    ``resting_s``: what ``Pool.resting`` of the data worker says. A choice by rotation or load depends on the
    connections before it, so every member of the first tier is named; a hash names its one member first.
    """
    resting_s = resting_s or {}
    tiers = tiers_of(plan, port)
    order = [(tier, each) for tier, group in enumerate(tiers, 1) for each in _preferred(plan, group, client_address)]
    standings = [
        Standing(each.node, each.address, each.port, tier, _rest_text(resting_s.get(each))) for tier, each in order
    ]
    for member in plan.members:
        if reason := passed_over(plan, port, member):
            standings.append(Standing(member.node, member.address, member.ports.get(port.name, 0), 0, reason))
    return Verdict(tuple(standings), *_rule(plan, tiers, resting_s))


def _preferred(plan: ServicePlan, group: Iterable[Candidate], client_address: str) -> Iterable[Candidate]:
    if plan.balance is not Balance.CLIENT_HASH:
        return group
    ring = Ring()
    ring.update(group)
    return ring.walk(hash_key(client_address))


def _rest_text(rest_s: float | None) -> str:
    return "" if rest_s is None else f"rests for {rest_s:.1f} s after it refused or did not answer"


def _rule(
    plan: ServicePlan, tiers: list[dict[Candidate, None]], resting_s: dict[Candidate, float]
) -> tuple[str, Because]:
    everyone = list(chain.from_iterable(tiers))
    if not everyone:
        count = len(plan.members)
        return "no-endpoint", Because(f"none of {count} members can be tried", plan.full_name)
    if all(each in resting_s for each in everyone):
        return "all-resting", Because(f"all {len(everyone)} endpoints rest; they are tried anyhow", plan.full_name)
    if plan.affinity_s is not None:
        text = f"sessionAffinity is ClientIP for {plan.affinity_s} s; a new client is placed by {plan.balance.value}"
        return "affinity", Because(text, plan.full_name, "spec.sessionAffinity")
    text = f"endpoints: {len(everyone)}, tiers by distance: {len(tiers)}; balance is {plan.balance.value}"
    return plan.balance.value, Because(text, plan.full_name, "isthmus.dev/balance")
