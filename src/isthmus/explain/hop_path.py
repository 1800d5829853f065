"""The path: how the endpoint's node is reached, one report a node, and which ways were ranked lower or left out."""

from collections.abc import Sequence

import msgspec

from isthmus.explain.hop import Flow, Held, NodePath, Report, Step, Witness
from isthmus.explain.words import count_text
from isthmus.plan.paths import PathId, PathKind, Rank, Ranking, Way, rank
from isthmus.wire.local import Facts, IdentityStatus, LinkRow, PeerFacts

HOP = "path"
SHOWN = 4
USABLE = ("valid",)
WORKING = (Rank.DIRECT_WORKS, Rank.REVERSE_WORKS)


def hop(flow: Flow, facts: Facts, _witness: Witness) -> Step:
    """One report for each node that an endpoint of the first choice is on."""
    if not flow.endpoints:
        return Step(flow)
    nodes = list(dict.fromkeys(endpoint.node for endpoint in flow.endpoints))
    found = [_reach(node, facts) for node in nodes]
    paths = tuple(path for _, path in found if path)
    reports = tuple(report for report, _ in found)
    return Step(msgspec.structs.replace(flow, paths=paths), reports[:SHOWN], last=not paths)


def ranking_of(peer: PeerFacts, facts: Facts) -> Ranking:
    """The ways to a peer, ranked by the function the agent ranks them with, on the same values."""
    return rank(facts.own, peer.peer, peer.relays, dict(peer.seen), previous=peer.previous, now_s=facts.now_s)


def describe(path: PathId) -> str:
    """``direct to 192.0.2.11:20006``."""
    if path.kind is PathKind.RELAYED:
        return f"relayed by {path.relay} at {path.address}"
    if path.kind is PathKind.REVERSE:
        return f"reverse, dialled by the peer, which is asked over relay {path.relay}"
    return f"direct to {path.address}"


def choose(ways: Sequence[Way], open_links: Sequence[LinkRow]) -> Way | None:
    """The way that a new connection takes: the best that is known to work, else the best; None where all failed.

    An open connection is the proof that a way works; without any, all are tried and the first to come up serves.
    """
    for way in ways:
        if way.rank in WORKING or any(_is_on(link, way) for link in open_links):
            return way
    return next((way for way in ways if way.rank is not Rank.DIRECT_FAILED), None)


def _is_on(link: LinkRow, way: Way) -> bool:
    if link.path != way.path.kind.value:
        return False
    return link.address == way.path.address if way.path.kind is PathKind.DIRECT else link.relay == way.path.relay


def _reach(node: str, facts: Facts) -> tuple[Report, NodePath | None]:
    if node == facts.me.node:
        text = f"the endpoint is on {node}"
        report = Report(HOP, "connected on this node", "same-node", text, held=Held.OK, held_text="no path is needed")
        return report, NodePath(node, "this node", True)
    if facts.identity is not None and facts.identity.state not in USABLE:
        return _without_certificate(node, facts.identity), None
    peer = next((one for one in facts.peers if one.peer.node == node), None)
    if peer is None:
        because = f"neither the store nor an announcement says how {node} is reached"
        object_ = f"Node {node}"
        return Report(HOP, f"{node} cannot be reached", "unknown-node", because, object=object_, passes=False), None
    ranking = ranking_of(peer, facts)
    open_links = [link for link in facts.links or () if link.node == node and link.tls]
    chosen = choose(ranking.ways, open_links)
    if chosen is None:
        return _unreachable(peer, ranking, facts), None
    report = _reached(peer, chosen, ranking, open_links, facts)
    proven = chosen.rank in WORKING or report.held is Held.OK
    after = ranking.ways[ranking.ways.index(chosen) + 1 :]
    otherwise = next((describe(way.path) for way in after if way.path.kind is not chosen.path.kind), "")
    return report, NodePath(node, describe(chosen.path), proven, otherwise)


def _without_certificate(node: str, identity: IdentityStatus) -> Report:
    error = f": {identity.error}" if identity.error else ""
    because = f"this node's certificate is “{identity.state}”{error}, and no node talks to another without a valid one"
    return Report(HOP, f"{node} cannot be reached", "no-certificate", because, object=f"Node {node}", passes=False)


def _unreachable(peer: PeerFacts, ranking: Ranking, facts: Facts) -> Report:
    node = peer.peer.node
    because = "no way to it is known" if not ranking.ways else "every way to it failed lately"
    return Report(
        HOP,
        f"{node} cannot be reached now",
        "no-path",
        because,
        object=f"Node {node}",
        place=_place(peer, facts),
        alternatives=(*(_failed(way) for way in ranking.ways), *_excluded(ranking)),
        passes=False,
    )


def _reached(peer: PeerFacts, chosen: Way, ranking: Ranking, open_links: Sequence[LinkRow], facts: Facts) -> Report:
    held, held_text = _held(peer.peer.node, chosen, open_links, facts.links is not None)
    where = f"{peer.peer.node} (site {peer.peer.site})" if peer.peer.site else peer.peer.node
    return Report(
        HOP,
        f"to {where}: {describe(chosen.path)}",
        chosen.verdict.rule,
        chosen.verdict.because.text,
        object=chosen.verdict.because.object,
        place=_place(peer, facts),
        setting=chosen.verdict.because.setting,
        held=held,
        held_text=held_text,
        alternatives=(*_others(chosen, ranking.ways), *_excluded(ranking)),
    )


def _place(peer: PeerFacts, facts: Facts) -> str:
    return facts.places.get(f"Node {peer.peer.node}", "") or f"known from {peer.source}"


def _others(chosen: Way, ways: Sequence[Way]) -> list[str]:
    at = ways.index(chosen)
    higher = [f"better, and not known to work: {_told(way)}" for way in ways[:at]]
    return [*higher, *(f"ranked lower: {_told(way)}" for way in ways[at + 1 :])]


def _failed(way: Way) -> str:
    return f"tried in vain: {_told(way)}"


def _excluded(ranking: Ranking) -> list[str]:
    return [f"{verdict.action}: {verdict.because.text}" for verdict in ranking.excluded]


def _told(way: Way) -> str:
    return f"{describe(way.path)} ({way.verdict.because.text})"


def _held(node: str, chosen: Way, open_links: Sequence[LinkRow], known: bool) -> tuple[Held, str]:
    if not known:
        return Held.NOT_CHECKED, "the data worker did not say which connections are open"
    same = [link for link in open_links if _is_on(link, chosen)]
    if same:
        return Held.OK, f"{count_text(len(same), 'connection')} to {node} open on that path, {same[0].tls}"
    if open_links:
        # A better path is taken for new connections only, so older ones on another path are right.
        return Held.NOT_CHECKED, f"open connections to {node} are {open_links[0].path}; new ones take this path"
    return Held.NOT_CHECKED, f"no connection to {node} is open; all ways are tried, the first to come up serves"
