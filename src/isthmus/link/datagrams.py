"""UDP sessions over a link: one connection a peer carries all. Queues are short; what does not fit is dropped."""

from collections.abc import Callable
from typing import Protocol

from isthmus.link.connection import Connection, Owner
from isthmus.link.limits import LinkLimits
from isthmus.model.ports import DatagramEndpoint, EndpointConnector, Outcome, StreamRequest
from isthmus.wire.stream import MAX_DATAGRAM_BYTES, Datagram, Event, SessionClose, SessionOpen

Received = Callable[[bytes], None]
Closed = Callable[[Outcome, str], None]


class TakeConnection(Protocol):
    """Asks the pool for a connection of its own: ``taken`` or ``failed`` follows once."""

    def __call__(self, taken: Callable[[Connection], None], failed: Closed) -> None: ...


class _Session:
    __slots__ = ("announced", "closed", "received", "request")

    def __init__(self, request: StreamRequest, received: Received, closed: Closed) -> None:
        self.request = request
        self.received = received
        self.closed = closed
        self.announced = False


class DatagramClient(Owner):
    """The opener's end: sessions of our clients towards endpoints of one peer.

    When the connection is lost the sessions live on: the next datagram of each opens it again on a new connection.
    """

    def __init__(self, limits: LinkLimits, take: TakeConnection) -> None:
        self._limits = limits
        self._take = take
        self._sessions: dict[int, _Session] = {}
        self._connection: Connection | None = None
        self._taking = False
        self._queue: list[tuple[int, bytes]] = []
        self._queued_bytes = 0
        self.dropped = self.sent = self.answers = 0

    @property
    def connection(self) -> Connection | None:
        return self._connection

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, number: int, request: StreamRequest, received: Received, closed: Closed) -> bool:
        """Remember a session; False when there are too many."""
        if len(self._sessions) >= self._limits.sessions:
            return False
        self._sessions[number] = _Session(request, received, closed)
        return True

    def send(self, number: int, payload: bytes) -> None:
        """Send or queue or drop."""
        if number not in self._sessions:
            return
        if len(payload) > MAX_DATAGRAM_BYTES:
            self.dropped += 1
        elif self._connection is not None:
            self._transmit(self._connection, number, payload)
        elif self._queued_bytes + len(payload) > self._limits.datagram_queue_bytes:
            self.dropped += 1
        else:
            self._queue.append((number, payload))
            self._queued_bytes += len(payload)
            if not self._taking:
                self._taking = True
                self._take(self._taken, self._failed)

    def close(self, number: int) -> None:
        """Our client is gone."""
        session = self._sessions.pop(number, None)
        if session is not None and session.announced and self._connection is not None:
            machine = self._connection.machine
            self._connection.send_frame(machine.session_close(number, Outcome.OPENED, ""))

    def close_all(self, reason: str) -> None:
        """The peer is gone."""
        self._fail(Outcome.NO_PATH, reason)
        if self._connection is not None:
            self._connection.close(reason)

    def lost(self, connection: Connection, reason: str) -> None:
        self._connection = None
        for session in self._sessions.values():
            session.announced = False

    def datagrams(self, connection: Connection, events: list[Event]) -> None:
        for event in events:
            match event:
                case Datagram(number, payload):
                    session = self._sessions.get(number)
                    if session is not None:
                        self.answers += 1
                        session.received(payload)
                case SessionClose(number, outcome, detail):
                    session = self._sessions.pop(number, None)
                    if session is not None:
                        session.closed(outcome, detail)

    def _taken(self, connection: Connection) -> None:
        self._taking = False
        self._connection = connection
        connection.owner = self
        queue, self._queue, self._queued_bytes = self._queue, [], 0
        for number, payload in queue:
            self._transmit(connection, number, payload)

    def _failed(self, outcome: Outcome, detail: str) -> None:
        self._taking = False
        self._fail(outcome, detail)

    def _fail(self, outcome: Outcome, detail: str) -> None:
        self._queue, self._queued_bytes = [], 0
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.closed(outcome, detail)

    def _transmit(self, connection: Connection, number: int, payload: bytes) -> None:
        session = self._sessions.get(number)
        if session is None:
            return
        if connection.gone or connection.tls.unsent_bytes + len(payload) > self._limits.datagram_queue_bytes:
            self.dropped += 1
            return
        if not session.announced:
            session.announced = True
            connection.send_frame(connection.machine.session_open(number, session.request))
        connection.send_frame(connection.machine.datagram(number, payload))
        self.sent += 1


class DatagramServer:
    """The acceptor's end of one datagram connection: sessions towards endpoints of this node."""

    def __init__(self, connection: Connection, connector: EndpointConnector, limits: LinkLimits) -> None:
        self._connection = connection
        self._connector = connector
        self._limits = limits
        self._sessions: dict[int, DatagramEndpoint] = {}
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def take(self, event: Event) -> None:
        """One event from the peer."""
        match event:
            case Datagram(number, payload):
                endpoint = self._sessions.get(number)
                if endpoint is not None:
                    endpoint.send(payload)
                else:
                    self.dropped += 1
            case SessionOpen(number, request):
                self._open(number, request)
            case SessionClose(number, _, _):
                endpoint = self._sessions.pop(number, None)
                if endpoint is not None:
                    endpoint.close()

    def close(self) -> None:
        """The connection is gone."""
        sessions, self._sessions = self._sessions, {}
        for endpoint in sessions.values():
            endpoint.close()

    def _open(self, number: int, request: StreamRequest) -> None:
        if number in self._sessions:
            return
        endpoint: DatagramEndpoint | None = None
        outcome, detail = Outcome.EXHAUSTED, f"{len(self._sessions)} sessions are open"
        if len(self._sessions) < self._limits.sessions:
            outcome, endpoint, detail = self._connector.open_datagrams(
                self._connection.peer.name, request, lambda payload: self._answer(number, payload)
            )
        if outcome is Outcome.OPENED and endpoint is not None:
            self._sessions[number] = endpoint
        else:
            self._connection.send_frame(self._connection.machine.session_close(number, outcome, detail))

    def _answer(self, number: int, payload: bytes) -> None:
        connection = self._connection
        if connection.gone or connection.tls.unsent_bytes + len(payload) > self._limits.datagram_queue_bytes:
            self.dropped += 1
        else:
            connection.send_frame(connection.machine.datagram(number, payload))
