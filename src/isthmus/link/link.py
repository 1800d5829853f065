"""The room's front: everything between this node and others, composed. Lives on the data worker's loop."""

from collections.abc import Callable
from typing import Any

import structlog

from isthmus.link.accept import Listener
from isthmus.link.carrier import Carrier
from isthmus.link.connection import Connection
from isthmus.link.dial import Dial, Target
from isthmus.link.limits import LinkLimits
from isthmus.link.paths import DIRECT, REVERSE
from isthmus.link.peer import Room
from isthmus.link.serve import Server
from isthmus.link.station import Crew, Station
from isthmus.link.tlssocket import TlsSocket
from isthmus.link.tlsstate import TlsState
from isthmus.loop.loop import Loop, Timer
from isthmus.model.ports import EndpointConnector
from isthmus.model.settings import LINK_PORT
from isthmus.wire.stream import Side
from isthmus.wire.tls import Identity, TlsError
from isthmus.wire.worker import Announce, Credentials, DialFailed, DropPeer, FromWorker, PathSpec, PutPeer, Trouble
from isthmus.wire.worker import Dial as DialMessage

log = structlog.get_logger(__name__)

SWEEP_S = 0.25

LinkMessage = PutPeer | DropPeer | Credentials | Announce | DialMessage | DialFailed


class Link:
    """Owns the listener, the accepted connections, the peers and the crew. All methods: on the loop's thread.

    ``carrier`` is what proxy/ is given; ``connector`` is what proxy/ gives. ``control_send`` takes messages to the
    control process: NeedConnection, PathReport, Trouble.
    """

    def __init__(
        self,
        loop: Loop,
        control_send: Callable[[FromWorker], None],
        connector: EndpointConnector,
        *,
        port: int = LINK_PORT,
        limits: LinkLimits | None = None,
    ) -> None:
        self._loop = loop
        self._send = control_send
        self._port = port
        self._limits = limits or LinkLimits()
        self._tls = TlsState()
        self._crew = Crew(self._limits.crew)
        self._main = Station(loop, bulk=False)
        room = Room(self._main, self._crew, self._tls, self._limits, control_send)
        self._gossip = room.gossip
        self._server = Server(connector, self._limits, room.gossip)
        self._listener = Listener(loop, self._crew, self._tls, self._limits, self._accepted)
        self.carrier = Carrier(room)
        self._dials: set[Dial] = set()
        self._dropped: dict[str, str] = {}
        self._sweeper: Timer | None = None

    # Life.

    def start(self) -> int:
        """Listen on the link port; returns it. Until credentials come, callers are refused. Raises OSError."""
        self._crew.start()
        self._sweep()
        return self._listener.listen(self._port)

    def drain(self) -> None:
        """Accept and open nothing new; streams that run go on."""
        self._listener.close()
        self._server.drain()
        self.carrier.drain()

    @property
    def busy(self) -> int:
        """Streams that run, in both directions."""
        return sum(1 for connection in self._connections() if connection.state.startswith("streaming"))

    def stop(self) -> None:
        """End everything now."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._listener.close()
        for dial in list(self._dials):
            dial.cancel("stopping")
        for node in list(self.carrier.peers):
            self.carrier.drop(DropPeer(node, "stopping"))
        self._server.close_where(lambda _connection: True, "stopping")
        self._crew.stop()

    def handle(self, message: LinkMessage) -> None:
        """A message of the control process."""
        match message:
            case PutPeer(node=node):
                self._dropped.pop(node, None)
                self.carrier.put(message)
            case DropPeer(node=node, reason=reason):
                self._dropped[node] = reason
                self.carrier.drop(message)
                self._server.close_where(lambda connection: connection.peer.name == node, reason)
            case Credentials():
                self._load(message)
            case Announce(signed):
                self._gossip.ours = signed
            case DialMessage():
                self._dial(message)
            case DialFailed(request=request, node=node, reason=reason):
                peer = self.carrier.peers.get(node)
                if peer is not None:
                    peer.dial_failed(request, reason)

    # What it is doing.

    def counters(self) -> dict[str, int]:
        """Names are documented in docs/links.md."""
        totals: dict[str, int] = {
            "link_handshakes_running": self._listener.handshakes,
            "link_unknown_peer": self.carrier.unknown_peers,
            "link_sessions_accepted": self._server.sessions,
        }
        for reason, number in self._listener.refused.items():
            totals[f"link_refused_{reason.replace('-', '_')}"] = number
        for outcome, number in self._server.outcomes.items():
            totals[f"link_served_{outcome.replace('-', '_')}"] = number
        for peer in self.carrier.peers.values():
            for name, number in peer.pool.counters.items():
                key = f"link_{name.replace('-', '_')}"
                totals[key] = totals.get(key, 0) + number
            totals["link_datagrams_dropped"] = totals.get("link_datagrams_dropped", 0) + peer.udp.dropped
            totals["link_datagrams_sent"] = totals.get("link_datagrams_sent", 0) + peer.udp.sent
        return totals

    def links(self) -> list[dict[str, Any]]:
        """One row a connection, plain data, for ``dump links``."""
        now_s = self._loop.now_s
        return [self._row(connection, now_s) for connection in self._connections()]

    def paths(self) -> list[dict[str, Any]]:
        """One row a path that is known, as it fared at first hand."""
        return [
            {
                "peer": node,
                "kind": record.spec.kind,
                "address": record.spec.address,
                "relay": record.spec.relay,
                "works": record.works,
                "rtt_ms": record.rtt_ms,
                "failures": record.failures,
                "error": record.error,
                "used": record.spec == peer.book.working(),
            }
            for node, peer in self.carrier.peers.items()
            for record in peer.book.records()
        ]

    def _row(self, connection: Connection, now_s: float) -> dict[str, Any]:
        cipher = connection.tls.ssl.cipher()
        return {
            "peer": connection.peer.name,
            "kind": connection.path.kind,
            "address": connection.path.address,
            "relay": connection.path.relay,
            "side": str(connection.machine.side),
            "state": connection.state,
            "sent_bytes": connection.sent_bytes,
            "received_bytes": connection.received_bytes,
            "streams": connection.streams,
            "age_s": round(now_s - connection.created_s, 1),
            "serial": connection.peer.serial,
            "tls": f"{connection.tls.ssl.version()} {cipher[0] if cipher else ''}".strip(),
        }

    def _connections(self) -> list[Connection]:
        found = self._server.connections
        for peer in self.carrier.peers.values():
            found += peer.pool.connections
            if peer.udp.connection is not None:
                found.append(peer.udp.connection)
        return found

    # Inside.

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        for peer in list(self.carrier.peers.values()):
            peer.sweep(self._loop.now_s)

    def _load(self, message: Credentials) -> None:
        try:
            self._tls.load(message)
        except TlsError as error:
            log.error("credentials not loaded", reason=error.message)
            self._send(Trouble("link.credentials", error.message))
            return
        self._send(Trouble("link.credentials", ""))
        revoked = self._tls.revoked
        if revoked:
            self._server.close_where(lambda connection: connection.peer.serial in revoked, "revoked")
            for peer in self.carrier.peers.values():
                peer.pool.close_where(lambda connection: connection.peer.serial in revoked, "revoked")
                if peer.udp.connection is not None and peer.udp.connection.peer.serial in revoked:
                    peer.udp.connection.close("revoked")

    def _accepted(self, tls: TlsSocket, identity: Identity, address: str, we_open: bool) -> None:
        if self._unwelcome(identity):
            tls.sock.close()
        elif not we_open:
            self._serve(tls, identity, PathSpec(DIRECT, address))
        elif (peer := self.carrier.peers.get(identity.name)) is not None:
            peer.came_from_peer(tls, identity, address)
        else:
            tls.sock.close()

    def _unwelcome(self, identity: Identity) -> bool:
        """Dropped or revoked, perhaps while the handshake was under way."""
        return identity.name in self._dropped or identity.serial in self._tls.revoked

    def _serve(self, tls: TlsSocket, identity: Identity, path: PathSpec) -> None:
        self._server.add(Connection(self._main, self._crew, tls, Side.ACCEPTOR, identity, path, self._server))

    def _dial(self, message: DialMessage) -> None:
        """Asked for by us or wished by the peer. Reverse and unticketed, not requested: the peer will open streams."""
        for_peer = message.kind == REVERSE and not message.ticket and not message.request
        if message.role == "client" and not for_peer:
            peer = self.carrier.peers.get(message.node)
            if peer is not None and self._tls.ready:
                peer.dial_for(message)
            return
        if message.node in self._dropped or not self._tls.ready:
            return
        path = PathSpec(message.kind, message.address)
        target = Target(message.node, path, message.address, Side.ACCEPTOR, bytes.fromhex(message.ticket))

        def done(tls: TlsSocket | None, identity: Identity | None, reason: str) -> None:
            self._dials.discard(dial)
            if tls is not None and identity is not None and self._unwelcome(identity):
                tls.sock.close()
            elif tls is not None and identity is not None:
                self._serve(tls, identity, path)
            else:
                log.info("dial for a peer failed", peer=message.node, kind=message.kind, reason=reason)

        dial = Dial(self._loop, self._crew, self._tls, target, self._limits.connect_s, done)
        self._dials.add(dial)
