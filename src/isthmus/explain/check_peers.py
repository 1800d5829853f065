"""Peers: every node that is known can be reached on some path."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import count_text

SHOWN = 10


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    peers = node.status.peers
    if not peers:
        return ok("no other node is known")
    lost = [peer for peer in peers if not peer.paths]
    if not lost:
        return ok(f"{count_text(len(peers), 'peer')}, each with a path")
    details = tuple(f"{peer.node}: known from {peer.source}" for peer in lost[:SHOWN])
    text = f"{len(lost)} of {count_text(len(peers), 'peer')} without a path"
    advice = "see whether the agent runs there and is connected to a relay of this node's; `isthmus trace` says more"
    return Finding(State.WARNING, text, advice, details)


CHECK = Check("peers", "peers", _run, ("agent", "certificate", "relays"))
