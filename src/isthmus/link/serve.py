"""The acceptor's end: streams and datagrams that peers ask for, to endpoints that the injected connector reaches."""

from collections.abc import Callable
from socket import socket

from isthmus.link.connection import Connection, Owner
from isthmus.link.datagrams import DatagramServer
from isthmus.link.gossip import Gossip
from isthmus.link.limits import LinkLimits
from isthmus.model.ports import EndpointConnector, Outcome, StreamRequest
from isthmus.wire.stream import Event


class Server(Owner):
    """Holds the accepted connections of all peers."""

    def __init__(self, connector: EndpointConnector, limits: LinkLimits, gossip: Gossip) -> None:
        self._connector = connector
        self._gossip = gossip
        self._limits = limits
        self._all: dict[Connection, DatagramServer | None] = {}
        self._draining = False
        self.outcomes: dict[str, int] = {}

    @property
    def connections(self) -> list[Connection]:
        return list(self._all)

    @property
    def sessions(self) -> int:
        return sum(len(server) for server in self._all.values() if server is not None)

    def add(self, connection: Connection) -> None:
        """A handshake is done: say READY and serve."""
        if self._draining:
            connection.tls.sock.close()
            return
        self._all[connection] = None
        connection.owner = self
        connection.start()

    def drain(self) -> None:
        """No new streams: idle connections close now, the others after their stream."""
        self._draining = True
        for connection in list(self._all):
            if connection.state == "idle":
                connection.close("draining")

    def close_where(self, condition: Callable[[Connection], bool], reason: str) -> None:
        for connection in list(self._all):
            if condition(connection):
                connection.close(reason)

    def announcements(self) -> tuple[bytes, ...]:
        return self._gossip.ours

    def heard(self, connection: Connection, announcements: tuple[bytes, ...]) -> None:
        self._gossip.tell(connection.peer.name, announcements)

    def idle(self, connection: Connection) -> None:
        if self._draining:
            connection.close("draining")

    def lost(self, connection: Connection, reason: str) -> None:
        server = self._all.pop(connection, None)
        if server is not None:
            server.close()

    def wanted(self, connection: Connection, request: StreamRequest) -> None:
        def done(outcome: Outcome, endpoint: socket | None, detail: str) -> None:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
            if connection.gone:
                if endpoint is not None:
                    endpoint.close()
            elif outcome is Outcome.OPENED and endpoint is not None:
                connection.accept(endpoint)
            else:
                connection.refuse(outcome, detail)

        self._connector.connect(connection.peer.name, request, done)

    def datagrams(self, connection: Connection, events: list[Event]) -> None:
        server = self._all.get(connection)
        if server is None:
            server = self._all[connection] = DatagramServer(connection, self._connector, self._limits)
        for event in events:
            server.take(event)
