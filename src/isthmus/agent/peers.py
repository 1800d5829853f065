"""The other nodes: what the store and they themselves say, how their paths fared, and the ranking that follows.

plan/paths.py ranks; this keeps what it needs and tells the data worker what changed. A node that was revoked, or whose
certificate ended, has no paths until it announces itself again.
"""

from collections.abc import Callable, Iterable, Sequence

from isthmus.link.control_channel import RelayState
from isthmus.model.settings import AgentSettings
from isthmus.plan import paths
from isthmus.plan.nodes import Me, NodeFacts
from isthmus.plan.paths import PathId, PathKind, Rank, Ranking, Seen, Way
from isthmus.wire.announcement import Announcement
from isthmus.wire.local import PeerFacts, PeerStatus
from isthmus.wire.worker import DropPeer, PathReport, PathSpec, PutPeer

Send = Callable[[PutPeer | DropPeer], None]


class Peer:
    """What is known of one node."""

    __slots__ = ("announced", "facts", "gone", "ranking", "seen", "sent")

    def __init__(self) -> None:
        self.facts: NodeFacts | None = None
        self.announced: Announcement | None = None
        self.gone = ""
        self.seen: dict[PathId, Seen] = {}
        self.ranking = Ranking(())
        self.sent: tuple[PathSpec, ...] | None = None

    @property
    def source(self) -> str:
        """Where the knowledge comes from, for a reader."""
        parts = [name for name, known in (("store", self.facts), ("announcement", self.announced)) if known]
        return " and ".join(parts) or "links"


class Peers:
    """All other nodes. ``relays`` tells how the relays stand now; ``now_s`` is wall clock."""

    def __init__(
        self,
        settings: AgentSettings,
        send: Send,
        relays: Callable[[], Sequence[RelayState]],
        now_s: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._send = send
        self._relays = relays
        self._now_s = now_s
        self._peers: dict[str, Peer] = {}
        self._reached = False
        self.addresses: tuple[str, ...] = ()

    # What becomes known.

    def put_facts(self, node: str, facts: NodeFacts | None) -> None:
        """What planning knows of the node (store and announcement merged); None: nothing any more."""
        if node == self._settings.node:
            return
        peer = self._peers.setdefault(node, Peer())
        peer.facts = facts
        self._settle(node, peer)

    def announced(self, announcement: Announcement) -> None:
        """The node announced itself: it is (again) one of us."""
        peer = self._peers.setdefault(announcement.node, Peer())
        peer.announced = announcement
        peer.gone = ""

    def gone(self, node: str, reason: str) -> None:
        """The node is revoked or its certificate ended: its connections are closed, its paths forgotten."""
        peer = self._peers.setdefault(node, Peer())
        peer.announced, peer.gone, peer.sent = None, reason, None
        peer.seen.clear()
        peer.ranking = Ranking(())
        self._send(DropPeer(node, reason))

    def report(self, report: PathReport) -> bool:
        """A path worked or failed at first hand; return whether the node's ranking may have changed."""
        peer = self._peers.get(report.node)
        if peer is None:
            return False
        kind = PathKind(report.kind)
        path = PathId(kind, "" if kind is PathKind.REVERSE else report.address, report.relay)
        before, now_s = peer.seen.get(path, Seen()), self._now_s()
        if report.error:
            peer.seen[path] = Seen(before.worked_s, now_s, before.rtt_ms, report.error)
        else:
            peer.seen[path] = Seen(now_s, before.failed_s, report.rtt_ms)
            self._reached = self._reached or kind is PathKind.REVERSE
        return before.works(now_s) != peer.seen[path].works(now_s)

    # What follows.

    def names(self) -> Iterable[str]:
        """All known nodes."""
        return tuple(self._peers)

    def rank(self, node: str, me: Me) -> None:
        """Rank the ways to ``node`` again and tell the data worker if the list changed."""
        peer = self._peers.get(node)
        if peer is None or peer.gone:
            return
        there, relays = self._there(node, peer), self._relays_for(node)
        previous = [way.path for way in peer.ranking.ways]
        peer.ranking = paths.rank(self.own(me), there, relays, peer.seen, previous=previous, now_s=self._now_s())
        specs = tuple(PathSpec(way.path.kind, way.path.address, way.path.relay) for way in peer.ranking.ways)
        if specs != peer.sent:
            peer.sent = specs
            self._send(PutPeer(node, specs))

    def everything(self) -> Iterable[PutPeer | DropPeer]:
        """The full state for a data worker that starts."""
        for node, peer in self._peers.items():
            if peer.gone:
                yield DropPeer(node, peer.gone)
            elif peer.sent is not None:
                yield PutPeer(node, peer.sent)

    def rows(self) -> list[PeerStatus]:
        """For ``status``."""
        return [
            PeerStatus(
                node,
                peer.facts.site if peer.facts else "",
                f"gone: {peer.gone}" if peer.gone else peer.source,
                [_words(way) for way in peer.ranking.ways if way.rank is not Rank.DIRECT_FAILED],
            )
            for node, peer in sorted(self._peers.items())
        ]

    def facts(self) -> tuple[PeerFacts, ...]:
        """For ``trace``: what ``rank`` is given."""
        return tuple(
            PeerFacts(
                self._there(node, peer),
                peer.source,
                tuple(self._relays_for(node)),
                tuple(peer.seen.items()),
                tuple(way.path for way in peer.ranking.ways),
            )
            for node, peer in sorted(self._peers.items())
            if not peer.gone
        )

    def own(self, me: Me) -> paths.Self:
        """This node, as ``rank`` is told of it."""
        return paths.Self(me.node, me.site, self.addresses, self._reached)

    def _there(self, node: str, peer: Peer) -> paths.Peer:
        return paths.Peer(node, peer.facts.site if peer.facts else "", self._addresses(peer))

    def _relays_for(self, node: str) -> list[paths.Relay]:
        return [
            paths.Relay(one.name, one.address, one.site, one.connected, node in one.present, one.rtt_ms)
            for one in self._relays()
        ]

    def _addresses(self, peer: Peer) -> tuple[str, ...]:
        """HOST:PORT to dial: what the node announced, then the store's addresses with the usual link port."""
        announced = peer.announced.addresses if peer.announced else ()
        hosts = peer.facts.addresses if peer.facts else ()
        port = self._settings.link_port
        stored = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]
        known = {address.rpartition(":")[0] for address in announced}
        return (*announced, *(one for one in stored if one.rpartition(":")[0] not in known))

    def _settle(self, node: str, peer: Peer) -> None:
        if peer.facts is None and peer.announced is None and not peer.gone:
            del self._peers[node]
            self._send(DropPeer(node, "no longer known"))


def _words(way: Way) -> str:
    """A way for ``status``; a direct one that nobody has tried may lead nowhere, and says so."""
    untried = way.path.kind is PathKind.DIRECT and way.rank is not Rank.DIRECT_WORKS
    return f"{way.path} (not tried)" if untried else str(way.path)
