"""One peer: its paths, how connections to it are made, its pool, its datagrams."""

from collections.abc import Callable
from itertools import count

import structlog

from isthmus.link.connection import Connection, Owner
from isthmus.link.datagrams import DatagramClient
from isthmus.link.dial import Dial, Target
from isthmus.link.gossip import Gossip
from isthmus.link.limits import LinkLimits
from isthmus.link.paths import DIRECT, REVERSE, PathBook
from isthmus.link.pool import Pool, Wish
from isthmus.link.station import Crew, Station
from isthmus.link.tlssocket import TlsSocket
from isthmus.link.tlsstate import TlsState
from isthmus.loop.loop import Timer
from isthmus.model.ports import Outcome, StreamRequest
from isthmus.wire.stream import Side
from isthmus.wire.tls import Identity
from isthmus.wire.worker import Dial as DialMessage
from isthmus.wire.worker import DropPeer, FromWorker, NeedConnection, PathReport, PathSpec, PutPeer

log = structlog.get_logger(__name__)

REPORT_EVERY_S = 5.0  # a path that goes on working is reported this often; a change at once


class Room:
    """What all peers share. ``send`` takes messages to the control process."""

    __slots__ = ("crew", "gossip", "limits", "main", "numbers", "send", "tls")

    def __init__(
        self, main: Station, crew: Crew, tls: TlsState, limits: LinkLimits, send: Callable[[FromWorker], None]
    ) -> None:
        self.main = main
        self.crew = crew
        self.tls = tls
        self.limits = limits
        self.send = send
        self.numbers = count(1)
        self.gossip = Gossip(send)


class Attempt(Owner):
    """One connection in the making, until READY: dialled by us, or asked for over the control process."""

    __slots__ = ("_connection", "_dial", "_over", "_peer", "_start_s", "_timer", "path", "request")

    def __init__(self, peer: "Peer", path: PathSpec, request: int) -> None:
        self._peer = peer
        self.path = path
        self.request = request
        self._over = False
        self._dial: Dial | None = None
        self._connection: Connection | None = None
        loop = peer.room.main.loop
        limit_s = peer.room.limits.connect_s
        self._start_s = loop.now_s
        self._timer: Timer = loop.call_later(limit_s, lambda: self.fail(f"no connection within {limit_s:g} s"))

    def dial(self, address: str, ticket: bytes) -> None:
        """Connect as the one who opens streams."""
        room = self._peer.room
        target = Target(self._peer.node, self.path, address, Side.OPENER, ticket)
        self._start_s = room.main.loop.now_s
        self._dial = Dial(room.main.loop, room.crew, room.tls, target, room.limits.connect_s, self._dialled)

    def adopt(self, tls: TlsSocket, identity: Identity) -> None:
        """The handshake is done, whoever dialled; wait for READY."""
        room = self._peer.room
        if identity.serial in room.tls.revoked:  # since the handshake began
            tls.sock.close()
            self.fail("the peer's certificate is revoked")
            return
        self._connection = Connection(room.main, room.crew, tls, Side.OPENER, identity, self.path, self)
        self._connection.start()

    @property
    def unmet(self) -> bool:
        """Whether it still waits for a connection to come, rather than for one that came to be READY."""
        return self._connection is None

    def fail(self, reason: str) -> None:
        """Give up, whatever stage it is in."""
        if not self._over:
            self._over = True
            self._timer.cancel()
            if self._dial is not None:
                self._dial.cancel(reason)
            if self._connection is not None:
                self._connection.close(reason)
            self._peer.attempt_failed(self, reason)

    def announcements(self) -> tuple[bytes, ...]:
        return self._peer.room.gossip.ours

    def heard(self, connection: Connection, announcements: tuple[bytes, ...]) -> None:
        self._peer.room.gossip.tell(connection.peer.name, announcements)

    def ready(self, connection: Connection) -> None:
        if self._over:
            connection.close("too late")
            return
        self._over = True
        self._timer.cancel()
        # TLS 1.3 takes one round trip until our Finished, READY answers it: two in all.
        rtt_ms = (self._peer.room.main.loop.now_s - self._start_s) * 500.0
        self._peer.attempt_succeeded(self, connection, rtt_ms)

    def lost(self, connection: Connection, reason: str) -> None:
        self.fail(f"the peer closed it: {reason}")

    def _dialled(self, tls: TlsSocket | None, identity: Identity | None, reason: str) -> None:
        self._dial = None
        if self._over:
            if tls is not None:
                tls.sock.close()
        elif tls is not None and identity is not None:
            self.adopt(tls, identity)
        else:
            self.fail(reason)


class Peer:
    """A node that we open streams to."""

    def __init__(self, node: str, room: Room) -> None:
        self.node = node
        self.room = room
        self.book = PathBook(room.limits)
        self.pool = Pool(node, room.main.loop, room.limits, self._dialling, self._grow, self.book.outranked)
        self.udp = DatagramClient(room.limits, self._take_connection)
        self._attempts: dict[int, Attempt] = {}
        self._race: list[Timer] = []  # tries of a race that have not begun
        self._racing = False
        self._errors: dict[PathSpec, str] = {}

    # From the control process.

    def put(self, message: PutPeer) -> None:
        """New ranking. A race that has ended in vain may have better luck with what is new."""
        self.book.put(message.paths)
        self.pool.close_outranked()
        if self.pool.waiting_count:
            self.pool.grow_if_needed()

    def drop(self, message: DropPeer) -> None:
        """Gone or revoked."""
        self.book.put(())
        self._stop_race()
        for attempt in list(self._attempts.values()):
            attempt.fail(message.reason)
        self.pool.close(message.reason)
        self.udp.close_all(message.reason)

    def dial_for(self, message: DialMessage) -> None:
        """An answer to NeedConnection, or, unsolicited, a connection that we may open streams on."""
        attempt = self._attempts.get(message.request)
        if attempt is None:
            path = self.book.first_of(message.kind) or PathSpec(message.kind, message.address)
            attempt = self._new_attempt(path)
        attempt.dial(message.address, bytes.fromhex(message.ticket))

    def dial_failed(self, request: int, reason: str) -> None:
        attempt = self._attempts.get(request)
        if attempt is not None:
            attempt.fail(reason)

    def came_from_peer(self, tls: TlsSocket, identity: Identity, address: str) -> None:
        """The peer has dialled us so that we can open streams: what the oldest reverse attempt waits for."""
        for attempt in self._attempts.values():
            if attempt.path.kind == REVERSE and attempt.unmet:
                attempt.adopt(tls, identity)
                return
        path = self.book.first_of(REVERSE) or PathSpec(REVERSE, address)
        self._new_attempt(path).adopt(tls, identity)

    # Streams.

    def sweep(self, now_s: float) -> None:
        """Every quarter of a second."""
        self.pool.sweep(now_s)
        if now_s - self.pool.used_s < self.room.limits.idle_s:
            for path in self.book.better_to_retry(now_s):
                self._begin(path)
        if not self._racing:
            self.pool.grow_if_needed()
        if self.udp.connection is not None and not len(self.udp):
            self.udp.connection.close("no sessions")

    # Attempts.

    def attempt_failed(self, attempt: Attempt, reason: str) -> None:
        self._forget(attempt)
        now_s = self.room.main.loop.now_s
        self.book.failed(attempt.path, reason, now_s)
        self._errors[attempt.path] = reason
        log.info("path failed", peer=self.node, kind=attempt.path.kind, address=attempt.path.address, reason=reason)
        self._report(attempt.path, 0.0, reason)
        if self._race:
            self._race.pop(0).fire()  # the next need not wait for its turn
        elif not self._attempts:
            self._try_the_rest()

    def attempt_succeeded(self, attempt: Attempt, connection: Connection, rtt_ms: float) -> None:
        self._forget(attempt)
        now_s = self.room.main.loop.now_s
        news = self.book.succeeded(attempt.path, rtt_ms)
        record = self.book.record(attempt.path)
        if record is not None and (news or now_s - record.reported_s > REPORT_EVERY_S):
            record.reported_s = now_s
            self._report(attempt.path, rtt_ms, "")
        self._stop_race()
        self._errors.clear()
        self.pool.add(connection)
        if news:
            self.pool.close_outranked()
        self.pool.grow_if_needed()

    def _dialling(self) -> int:
        return len(self._attempts)

    def _grow(self, number: int) -> None:
        if not self.room.tls.ready:
            return
        if self.book.working() is None and self._racing:
            return
        tries = self.book.tries(self.room.main.loop.now_s)
        if not tries:
            self._nothing_works()
        elif self.book.working() is not None:
            for _ in range(number):
                self._begin(tries[0].spec)
        else:
            self._start_race([(item.delay_s, item.spec) for item in tries])

    def _start_race(self, tries: list[tuple[float, PathSpec]]) -> None:
        self._racing = True
        loop = self.room.main.loop
        for delay_s, spec in tries:
            if delay_s == 0.0:
                self._begin(spec)
                continue
            timer = loop.call_later(delay_s, lambda spec=spec: self._begin_raced(spec))  # type: ignore[misc]
            self._race.append(timer)

    def _begin_raced(self, spec: PathSpec) -> None:
        now_s = self.room.main.loop.now_s
        self._race = [timer for timer in self._race if timer.when_s > now_s]
        self._begin(spec)

    def _stop_race(self) -> None:
        self._racing = False
        for timer in self._race:
            timer.cancel()
        self._race.clear()

    def _begin(self, path: PathSpec) -> None:
        attempt = self._new_attempt(path)
        if path.kind == DIRECT:
            attempt.dial(path.address, b"")
        else:
            self.room.send(NeedConnection(attempt.request, self.node, path.kind, path.relay))

    def _new_attempt(self, path: PathSpec) -> Attempt:
        attempt = Attempt(self, path, next(self.room.numbers))
        self._attempts[attempt.request] = attempt
        record = self.book.record(path)
        if record is not None:
            record.trying += 1
        return attempt

    def _forget(self, attempt: Attempt) -> None:
        if self._attempts.pop(attempt.request, None) is not None:
            record = self.book.record(attempt.path)
            if record is not None:
                record.trying -= 1

    def _try_the_rest(self) -> None:
        """All that was tried has failed. Where a path that had worked was tried alone, the others have their turn."""
        self._stop_race()
        tries = self.book.tries(self.room.main.loop.now_s)
        untried = [(item.delay_s, item.spec) for item in tries if item.spec not in self._errors]
        if not self.pool.waiting_count or not untried:
            self._nothing_works()
            return
        first_s = untried[0][0]
        self._start_race([(delay_s - first_s, spec) for delay_s, spec in untried])

    def _nothing_works(self) -> None:
        self._stop_race()
        detail = "; ".join(f"{path.kind} {path.address}: {error}" for path, error in self._errors.items())
        self._errors.clear()
        self.pool.fail_waiting(Outcome.NO_PATH, detail or f"no path to {self.node} is known")

    def _report(self, path: PathSpec, rtt_ms: float, error: str) -> None:
        self.room.send(PathReport(self.node, path.kind, path.address, path.relay, round(rtt_ms, 3), error))

    def _take_connection(self, taken: Callable[[Connection], None], failed: Callable[[Outcome, str], None]) -> None:
        until_s = self.room.main.loop.now_s + self.room.limits.wait_s
        request = StreamRequest("", "", "", 0, protocol="UDP")
        self.pool.want(Wish(request, None, failed, lambda _out, _in: None, until_s, taker=taken))
