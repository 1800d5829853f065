"""The path: how the endpoint's node is reached, one report a node, and which ways were ranked lower."""

from isthmus.explain.hop import Flow, Held, Report, Step, Witness
from isthmus.explain.words import count_text
from isthmus.wire.local import Facts, LinkRow, PathFacts, PeerFacts

HOP = "path"
SHOWN = 4


def hop(flow: Flow, facts: Facts, _witness: Witness) -> Step:
    """One report for each node that an endpoint of the first choice is on."""
    if not flow.endpoints:
        return Step(flow)
    nodes = list(dict.fromkeys(endpoint.node for endpoint in flow.endpoints))
    reports = [_report(node, facts) for node in nodes]
    shown = tuple(reports[:SHOWN])
    return Step(flow, shown, last=not any(report.passes for report in reports))


def describe(path: PathFacts) -> str:
    """``direct to 192.0.2.11:20006``."""
    if path.kind == "relayed":
        return f"relayed by {path.relay} at {path.address}"
    if path.kind == "reverse":
        return f"reverse: the peer dials us, asked over relay {path.relay}"
    return f"direct to {path.address}"


def _report(node: str, facts: Facts) -> Report:
    if node == facts.me.node:
        return Report(HOP, "connected on this node", "same-node", f"the endpoint is on {node}", held=Held.OK)
    peer = next((one for one in facts.peers if one.node == node), None)
    if peer is None:
        because = f"neither the store nor an announcement says how {node} is reached"
        return Report(HOP, f"{node} cannot be reached", "unknown-node", because, object=f"Node {node}", passes=False)
    usable = [path for path in peer.paths if path.usable]
    if not usable:
        return _unreachable(peer, facts)
    return _reached(peer, usable[0], facts)


def _unreachable(peer: PeerFacts, facts: Facts) -> Report:
    return Report(
        HOP,
        f"{peer.node} cannot be reached now",
        "no-path",
        f"{count_text(len(peer.paths), 'path')} known to {peer.node}, none usable",
        object=f"Node {peer.node}",
        place=facts.places.get(f"Node {peer.node}", ""),
        alternatives=tuple(_lower(path) for path in peer.paths),
        passes=False,
    )


def _reached(peer: PeerFacts, best: PathFacts, facts: Facts) -> Report:
    held, held_text = _held(peer.node, best, facts.links)
    where = f"{peer.node} (site {peer.site})" if peer.site else peer.node
    return Report(
        HOP,
        f"to {where}: {describe(best)}",
        best.kind,
        best.because or f"the best of {count_text(len(peer.paths), 'path')}",
        object=f"Node {peer.node}",
        place=facts.places.get(f"Node {peer.node}", "") or f"known from {peer.source}",
        held=held,
        held_text=held_text,
        alternatives=tuple(_lower(path) for path in peer.paths if path is not best),
    )


def _lower(path: PathFacts) -> str:
    text = f"{describe(path)}{f', {path.because}' if path.because else ''}"
    return f"ranked lower: {text}" if path.usable else f"not usable: {text}"


def _held(node: str, best: PathFacts, links: tuple[LinkRow, ...] | None) -> tuple[Held, str]:
    if links is None:
        return Held.NOT_CHECKED, "the data worker did not say which connections are open"
    open_ = [link for link in links if link.node == node and link.tls]
    if not open_:
        return Held.NOT_CHECKED, f"no connection to {node} is open now"
    same = [link for link in open_ if link.path == best.kind]
    count = count_text(len(same), "connection")
    if same:
        return Held.OK, f"{count} to {node} open on that path, {same[0].tls}"
    # A better path is taken for new connections only, so older ones on another path are right.
    return Held.NOT_CHECKED, f"open connections to {node} are {open_[0].path}; new ones take this path"
