"""A TLS connection between two agents: idle, opening a stream, carrying it, idle again.

The opener's end is pooled (pool.py); the acceptor's end serves whatever comes (accept.py). Both live on the main loop
except while a pump moves bulk.
"""

import fcntl
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass
from socket import socket

from isthmus.link.pump import Pump
from isthmus.link.station import Crew, Station
from isthmus.link.tlssocket import LinkLost, TlsSocket
from isthmus.loop.loop import READ, WRITE
from isthmus.model.ports import Outcome, StreamRequest
from isthmus.wire.stream import (
    Announced,
    Datagram,
    Event,
    Open,
    Opened,
    Phase,
    Ready,
    Refused,
    SessionClose,
    SessionOpen,
    Side,
    StreamError,
    StreamMachine,
)
from isthmus.wire.tls import Identity
from isthmus.wire.worker import PathSpec

Ended = Callable[[int, int], None]


@dataclass(slots=True)
class Opening:
    """A stream that the opener has asked for."""

    client: socket
    opened: Callable[[Outcome, str], None]
    ended: Ended
    since_s: float


class Owner:
    """What a connection tells its holder. All calls come on the main loop; the defaults do nothing."""

    def announcements(self) -> tuple[bytes, ...]:
        """What we announce of ourselves at the start of a connection, signed."""
        return ()

    def heard(self, connection: "Connection", announcements: tuple[bytes, ...]) -> None:
        """What the other side announced at the start of the connection, unchecked."""

    def ready(self, connection: "Connection") -> None:
        """Opener: the acceptor has checked us; the connection is idle for the first time."""

    def idle(self, connection: "Connection") -> None:
        """A stream is over, or was refused, and the connection may carry the next."""

    def lost(self, connection: "Connection", reason: str) -> None:
        """The connection is closed. Follows the end of its stream, if it had one."""

    def stale(self, connection: "Connection", opening: Opening) -> None:
        """Opener: closed before the answer to OPEN came, so nothing has reached the endpoint. ``lost`` follows."""

    def wanted(self, connection: "Connection", request: StreamRequest) -> None:
        """Acceptor: a stream is asked for; answer with ``accept`` or ``refuse``."""

    def datagrams(self, connection: "Connection", events: list[Event]) -> None:
        """SessionOpen, Datagram and SessionClose events."""


class Connection:
    """One end. ``path`` is how it came about; for accepted ones its address is the peer's."""

    __slots__ = (
        "_events",
        "_opening",
        "_pump",
        "_received_bytes",
        "_sent_bytes",
        "created_s",
        "crew",
        "gone",
        "idle_since_s",
        "machine",
        "main",
        "owner",
        "path",
        "peer",
        "streams",
        "tls",
    )

    def __init__(
        self, main: Station, crew: Crew, tls: TlsSocket, side: Side, peer: Identity, path: PathSpec, owner: Owner
    ) -> None:
        self.main = main
        self.crew = crew
        self.tls = tls
        self.machine = StreamMachine(side)
        self.peer = peer
        self.path = path
        self.owner = owner
        self.gone = False
        self.created_s = self.idle_since_s = main.loop.now_s
        self.streams = 0
        self._sent_bytes = self._received_bytes = 0
        self._opening: Opening | None = None
        self._pump: Pump | None = None
        self._events = 0

    # What it is doing.

    @property
    def state(self) -> str:
        """For people: starting, idle, opening, streaming, streaming-bulk or datagrams."""
        if self._pump is not None:
            return "streaming-bulk" if self._pump.on_crew else "streaming"
        return str(self.machine.phase)

    @property
    def sent_bytes(self) -> int:
        """Of all its streams so far, into the link."""
        return self._sent_bytes + (self._pump.bytes_to_link if self._pump is not None else 0)

    @property
    def received_bytes(self) -> int:
        """Of all its streams so far, out of the link."""
        return self._received_bytes + (self._pump.bytes_from_link if self._pump is not None else 0)

    @property
    def opening_since_s(self) -> float | None:
        return self._opening.since_s if self._opening is not None else None

    # Life.

    def start(self) -> None:
        """Watch the socket; the acceptor says READY. The handshake may have left bytes that no readiness announces."""
        self._events = READ
        self.main.loop.add(self.tls.fd, READ, self._on_tls)
        if self.machine.side is Side.ACCEPTOR:
            self._send(self.machine.ready(self.owner.announcements()))
        if not self.gone:
            self._on_tls(READ)

    def close(self, reason: str) -> None:
        """End it now, with whatever it carries."""
        if self.gone:
            return
        if self._pump is not None:
            self.tls.doom()  # the pump sees the hang-up, wherever it runs, and comes back through _stream_over
            return
        self._lose(reason)

    # The opener's end.

    def open(
        self, request: StreamRequest, client: socket, opened: Callable[[Outcome, str], None], ended: Ended
    ) -> None:
        """Ask for a stream on this idle connection."""
        self.streams += 1
        self._opening = Opening(client, opened, ended, self.main.loop.now_s)
        self._send(self.machine.open(request))

    def abandon(self) -> None:
        """The opener's caller has lost interest before the answer: the connection cannot be used further."""
        self._opening = None
        self._lose("the stream was given up")

    @property
    def unacknowledged(self) -> bool:
        """Whether the peer's kernel has yet to acknowledge what we sent."""
        try:
            waiting = fcntl.ioctl(self.tls.fd, termios.TIOCOUTQ, b"\0\0\0\0")
        except OSError:
            return True
        return bool(struct.unpack("i", waiting)[0])

    # The acceptor's end.

    def accept(self, endpoint: socket) -> None:
        """The endpoint is connected: move bytes from now on."""
        self.streams += 1
        self._send(self.machine.opened())
        if self.gone:
            endpoint.close()
        else:
            self._carry(endpoint, [], None)

    def refuse(self, outcome: Outcome, detail: str) -> None:
        """No stream."""
        self._send(self.machine.refused(outcome, detail))

    # Datagrams.

    def send_frame(self, frame: bytes) -> None:
        """Send a datagram frame, whole or not at all if the connection is gone."""
        if not self.gone:
            self._send(frame)

    # Inside.

    def _send(self, frame: bytes) -> None:
        try:
            self.tls.write(frame)
        except LinkLost as error:
            self._lose(str(error))
        else:
            self._watch()

    def _watch(self) -> None:
        events = READ if self.tls.unsent is None else READ | WRITE
        if events != self._events:
            self._events = events
            self.main.loop.modify(self.tls.fd, events)

    def _on_tls(self, events: int) -> None:
        try:
            if events & WRITE:
                self.tls.flush()
            count = self.tls.read(self.main)
            received = self.machine.receive(self.main.plain[:count]) if count else []
        except LinkLost as error:
            self._lose(str(error))
            return
        except StreamError as error:
            self._lose(error.message)
            return
        if received:
            self._take(received)
        if not self.gone and self._pump is None:
            self._watch()

    def _take(self, events: list[Event]) -> None:
        first = events[0]
        match first:
            case Opened():
                opening, self._opening = self._opening, None
                assert opening is not None
                opening.opened(Outcome.OPENED, "")
                self._carry(opening.client, events[1:], opening.ended)
            case Refused(outcome, detail):
                refused, self._opening = self._opening, None
                assert refused is not None
                self.idle_since_s = self.main.loop.now_s
                self.owner.idle(self)
                refused.opened(outcome, detail)
            case Open(request):
                self.owner.wanted(self, request)
            case Ready(announcements):
                self._greet(announcements)
            case Announced(announcements):
                self.owner.heard(self, announcements)
                if len(events) > 1:
                    self._take(events[1:])
            case SessionOpen() | Datagram() | SessionClose():
                self.owner.datagrams(self, events)
            case _:
                self._lose(f"{type(first).__name__} came in phase {self.machine.phase}")

    def _greet(self, announcements: tuple[bytes, ...]) -> None:
        """Opener: READY came. Our announcements go first, then the connection may be used."""
        self.idle_since_s = self.main.loop.now_s
        if announcements:
            self.owner.heard(self, announcements)
        if ours := self.owner.announcements():
            self._send(self.machine.announce(ours))
        if not self.gone:
            self.owner.ready(self)

    def _carry(self, plain: socket, rest: list[Event], ended: Ended | None) -> None:
        pump = Pump(self, plain, lambda intact, reason: self._stream_over(intact, reason, ended))
        self._pump = pump
        pump.start(rest)

    def _stream_over(self, intact: bool, reason: str, ended: Ended | None) -> None:
        pump, self._pump = self._pump, None
        assert pump is not None
        self._sent_bytes += pump.bytes_to_link
        self._received_bytes += pump.bytes_from_link
        if ended is not None:
            ended(pump.bytes_to_link, pump.bytes_from_link)
        if not intact:
            self._lose(reason)
            return
        self.main.loop.set_handler(self.tls.fd, self._on_tls)
        self._events = pump.tls_events
        self._watch()
        self.idle_since_s = self.main.loop.now_s
        self.owner.idle(self)
        if pump.next_open is not None and not self.gone:
            self.owner.wanted(self, pump.next_open.request)

    def _lose(self, reason: str) -> None:
        if self.gone:
            return
        self.gone = True
        opening, self._opening = self._opening, None
        if self.machine.phase not in (Phase.IDLE, Phase.STARTING):
            self.tls.reset()
        self.main.loop.discard(self.tls.sock)
        if opening is not None:
            self.owner.stale(self, opening)
        self.owner.lost(self, reason)
