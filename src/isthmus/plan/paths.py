"""Which ways lead to another node, best first, and why each stands where it stands. Pure.

Direct ways that answered lately come first, then direct ways that were not tried, then the peer's own dialling
(reverse), then relays. A direct way that failed stays on the list behind the others of its kind, so that it is tried
again and found when it exists. Equal ways are ordered by round-trip time, and the one in use keeps its place until
another is clearly better: two ways of nearly the same length must not take turns.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from enum import IntEnum, StrEnum

import msgspec

from isthmus.plan.verdict import Because, Verdict

RECENT_S = 3_600.0
MAX_DIRECT = 8
CLEARLY_BETTER = 0.8
CLEARLY_BETTER_MS = 2.0

_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)


class PathKind(StrEnum):
    """How two nodes come to a connection."""

    DIRECT = "direct"
    REVERSE = "reverse"
    RELAYED = "relayed"


class PathId(msgspec.Struct, frozen=True, order=True):
    """One way. ``address`` is HOST:PORT that is dialled, '' for reverse; ``relay`` is '' for direct."""

    kind: PathKind
    address: str = ""
    relay: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.kind.value, self.address, self.relay and f"by {self.relay}") if part)


class Seen(msgspec.Struct, frozen=True):
    """What became of a way at first hand: times of the last success and failure (0 for never), round-trip time."""

    worked_s: float = 0.0
    failed_s: float = 0.0
    rtt_ms: float = 0.0
    error: str = ""

    def works(self, now_s: float) -> bool:
        """Whether it answered lately and did not fail since."""
        return self.worked_s > self.failed_s and now_s - self.worked_s < RECENT_S


class Self(msgspec.Struct, frozen=True):
    """This node. ``reached`` is whether another node has dialled it lately."""

    node: str
    site: str = ""
    addresses: tuple[str, ...] = ()
    reached: bool = False


class Peer(msgspec.Struct, frozen=True):
    """The other node, as it announced itself (or as the store says)."""

    node: str
    site: str = ""
    addresses: tuple[str, ...] = ()


class Relay(msgspec.Struct, frozen=True):
    """A relay, as this node's control channel to it shows it. ``holds_peer``: the peer has a channel there too."""

    name: str
    address: str
    site: str = ""
    connected: bool = False
    holds_peer: bool = False
    rtt_ms: float = 0.0


class Rank(IntEnum):
    """The classes of ways, best first; the names in lower case are the rules of the verdicts."""

    DIRECT_WORKS = 0
    DIRECT_SAME_SITE = 1
    DIRECT_PUBLIC = 2
    DIRECT_PRIVATE = 3
    DIRECT_FAILED = 4
    REVERSE_WORKS = 5
    REVERSE = 6
    RELAYED = 7

    @property
    def rule(self) -> str:
        """The stable name."""
        return self.name.lower().replace("_", "-")


class Way(msgspec.Struct, frozen=True):
    """A way on the list; ``verdict`` says why it stands there."""

    path: PathId
    rank: Rank
    verdict: Verdict[PathKind]
    rtt_ms: float = 0.0


class Ranking(msgspec.Struct, frozen=True):
    """The ways, best first, and those that are out of the question."""

    ways: tuple[Way, ...]
    excluded: tuple[Verdict[str], ...] = ()


def rank(
    own: Self,
    peer: Peer,
    relays: Sequence[Relay],
    seen: Mapping[PathId, Seen],
    *,
    previous: Sequence[PathId] = (),
    now_s: float,
) -> Ranking:
    """All ways to ``peer``, best first. ``previous`` is the last answer's order, for steadiness."""
    ways: list[Way] = []
    excluded: list[Verdict[str]] = []
    _direct(own, peer, seen, now_s, ways, excluded)
    _reverse(own, peer, relays, seen, now_s, ways, excluded)
    _relayed(own, peer, relays, ways, excluded)
    return Ranking(tuple(_ordered(ways, previous)), tuple(excluded))


def is_private(address: str) -> bool:
    """Whether HOST:PORT lies in a range that every site uses for itself (RFC 1918, 4193, 6598)."""
    host = _host(address)
    return host is None or any(host.version == network.version and host in network for network in _PRIVATE)


def _direct(
    own: Self,
    peer: Peer,
    seen: Mapping[PathId, Seen],
    now_s: float,
    ways: list[Way],
    excluded: list[Verdict[str]],
) -> None:
    if not peer.addresses:
        excluded.append(_out("direct", "no-address", f"node {peer.node} announced no address"))
    for address in peer.addresses[:MAX_DIRECT]:
        if address in own.addresses:
            excluded.append(_out("direct", "own-address", f"{address} of node {peer.node} is this node's address too"))
            continue
        path = PathId(PathKind.DIRECT, address)
        ways.append(_direct_way(own, peer, path, seen.get(path, Seen()), now_s))
    for address in peer.addresses[MAX_DIRECT:]:
        excluded.append(_out("direct", "too-many", f"{address}: {MAX_DIRECT} addresses of a node are tried at most"))


def _direct_way(own: Self, peer: Peer, path: PathId, seen: Seen, now_s: float) -> Way:
    same_site = bool(own.site) and own.site == peer.site
    if seen.works(now_s):
        text = f"{path.address} answered {now_s - seen.worked_s:.0f} s ago in {seen.rtt_ms:.1f} ms"
        return _way(path, Rank.DIRECT_WORKS, text, peer, seen.rtt_ms)
    if seen.failed_s and now_s - seen.failed_s < RECENT_S:
        text = f"{path.address} failed {now_s - seen.failed_s:.0f} s ago: {seen.error or 'no answer'}"
        return _way(path, Rank.DIRECT_FAILED, text, peer)
    if same_site:
        return _way(path, Rank.DIRECT_SAME_SITE, f"{path.address} is in the same site, {own.site}", peer)
    if is_private(path.address):
        return _way(path, Rank.DIRECT_PRIVATE, f"{path.address} is private to another site; not tried lately", peer)
    return _way(path, Rank.DIRECT_PUBLIC, f"{path.address} is a public address; not tried lately", peer)


def _reverse(
    own: Self,
    peer: Peer,
    relays: Sequence[Relay],
    seen: Mapping[PathId, Seen],
    now_s: float,
    ways: list[Way],
    excluded: list[Verdict[str]],
) -> None:
    through = [relay for relay in _nearest(own, relays) if relay.connected and relay.holds_peer]
    if not through:
        excluded.append(_out("reverse", "no-relay", f"no relay holds this node and {peer.node}, to ask it to dial"))
        return
    why = _why_reachable(own, peer)
    if not why:
        excluded.append(_out("reverse", "not-reachable", "this node has no address that another site can dial"))
        return
    path = PathId(PathKind.REVERSE, relay=through[0].name)
    before = seen.get(path, Seen())
    if before.works(now_s):
        text = f"node {peer.node} dialled us {now_s - before.worked_s:.0f} s ago"
        ways.append(_way(path, Rank.REVERSE_WORKS, text, peer, before.rtt_ms))
    elif before.failed_s and now_s - before.failed_s < RECENT_S:
        text = f"asked {now_s - before.failed_s:.0f} s ago, node {peer.node} could not dial us: {before.error}"
        ways.append(_way(path, Rank.REVERSE, text, peer))
    else:
        ways.append(_way(path, Rank.REVERSE, why, peer))


def _why_reachable(own: Self, peer: Peer) -> str:
    if not own.addresses:
        return ""
    if own.reached:
        return "another node has dialled this node lately"
    if own.site and own.site == peer.site:
        return f"both nodes are in site {own.site}"
    public = [address for address in own.addresses if not is_private(address)]
    return f"{public[0]} of this node is a public address" if public else ""


def _relayed(own: Self, peer: Peer, relays: Sequence[Relay], ways: list[Way], excluded: list[Verdict[str]]) -> None:
    if not relays:
        excluded.append(_out("relayed", "no-relay", "no relay is configured", setting="relays"))
    for relay in _nearest(own, relays):
        if not relay.connected:
            excluded.append(_out("relayed", "relay-away", f"no control channel to relay {relay.name}"))
        elif not relay.holds_peer:
            excluded.append(_out("relayed", "peer-away", f"node {peer.node} has no channel to relay {relay.name}"))
        else:
            path = PathId(PathKind.RELAYED, relay.address, relay.name)
            text = f"relay {relay.name} holds both nodes, {relay.rtt_ms:.1f} ms from here"
            ways.append(_way(path, Rank.RELAYED, text, peer, relay.rtt_ms))


def _nearest(own: Self, relays: Sequence[Relay]) -> list[Relay]:
    """By round-trip time; those not measured yet after the measured ones, the same site first."""
    return sorted(relays, key=lambda relay: (not relay.rtt_ms, relay.rtt_ms, relay.site != own.site, relay.name))


def _ordered(ways: list[Way], previous: Sequence[PathId]) -> list[Way]:
    before = {path: place for place, path in enumerate(previous)}
    last = len(before)
    ordered: list[Way] = []
    for value in Rank:
        # Not sorted by time alone: among unmeasured ones the order they came in (the announcer's) is kept.
        alike = sorted((way for way in ways if way.rank is value), key=lambda way: (not way.rtt_ms, way.rtt_ms))
        if len(alike) > 1:
            kept = min(alike, key=lambda way: before.get(way.path, last))
            if kept.path in before and not _clearly_better(alike[0].rtt_ms, kept.rtt_ms):
                alike.remove(kept)
                alike.insert(0, kept)
        ordered += alike
    return ordered


def _clearly_better(rtt_ms: float, kept_ms: float) -> bool:
    if not rtt_ms:
        return False
    return not kept_ms or (rtt_ms < kept_ms * CLEARLY_BETTER and rtt_ms < kept_ms - CLEARLY_BETTER_MS)


def _way(path: PathId, rank_: Rank, text: str, peer: Peer, rtt_ms: float = 0.0) -> Way:
    return Way(path, rank_, Verdict(path.kind, rank_.rule, Because(text, object=f"Node {peer.node}")), rtt_ms)


def _out(kind: str, rule: str, text: str, *, setting: str = "") -> Verdict[str]:
    return Verdict(f"not {kind}", f"{kind}-{rule}", Because(text, setting=setting))


def _host(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
