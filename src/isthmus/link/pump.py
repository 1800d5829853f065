"""One stream: bytes between a plain socket and a link connection, until both directions have ended.

Half-close goes across as END, an abort of either side resets the other. Back-pressure: while one side does not take
what was sent to it, the other side is not read; at most one chunk a direction waits here. A pump starts on the main
station and moves to the crew when it carries bulk, and back when it is quiet.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from isthmus.link.station import Station
from isthmus.link.tlssocket import LINGER_ZERO, LinkLost
from isthmus.loop.loop import ERROR, GONE, PEER_ENDED, READ, WRITE
from isthmus.wire.stream import HEADER_BYTES, End, Event, Open, StreamError, data_header_into

if TYPE_CHECKING:
    from isthmus.link.connection import Connection

WINDOW_BYTES = 1 << 20
BULK_WINDOW_S = 0.05  # a window filled faster than this: bulk, 160 Mbit/s or more
QUIET_WINDOW_S = 0.5  # a window not filled by then: no bulk any more
INTACT, LOST = True, False
READING = READ | PEER_ENDED


class Pump:
    """Moves one stream. ``finished(intact, reason)`` is called once, on the main loop, the plain socket closed."""

    __slots__ = (
        "_connection",
        "_finished",
        "_parked",
        "_plain",
        "_plain_events",
        "_plain_fd",
        "_received_end",
        "_sent_end",
        "_shut",
        "_station",
        "_tls",
        "_tls_events",
        "_to_plain",
        "_window_bytes",
        "_window_start_s",
        "bytes_from_link",
        "bytes_to_link",
        "next_open",
    )

    def __init__(self, connection: "Connection", plain: socket.socket, finished: Callable[[bool, str], None]) -> None:
        self._connection = connection
        self._tls = connection.tls
        self._plain = plain
        self._plain_fd = plain.fileno()
        self._finished = finished
        self._station = connection.main
        self._plain_events = READING
        self._tls_events = READ
        self._parked = False
        self._to_plain: memoryview | None = None
        self._sent_end = self._received_end = self._shut = False
        self._window_bytes = 0
        self._window_start_s = self._station.loop.now_s
        self.bytes_to_link = self.bytes_from_link = 0
        self.next_open: Open | None = None

    @property
    def tls_events(self) -> int:
        """What is watched for on the link's socket."""
        return self._tls_events

    @property
    def on_crew(self) -> bool:
        return self._station.bulk

    def start(self, rest: list[Event]) -> None:
        """Begin, on the main station; ``rest`` came together with what opened the stream."""
        loop = self._station.loop
        loop.add(self._plain_fd, READING, self._on_plain)
        loop.set_handler(self._tls.fd, self._on_tls)
        self._guard(lambda: self._take(rest))

    # Events.

    def _on_plain(self, events: int) -> None:
        if events == READ and self._plain_events == READING:
            self._guard(self._outward)
        else:
            self._guard(lambda: self._plain_ready(events))

    def _on_tls(self, events: int) -> None:
        if events == READ and self._tls_events == READ:
            self._guard(self._inward)
        else:
            self._guard(lambda: self._tls_ready(events))

    def _guard(self, step: Callable[[], bool]) -> None:
        """Run one step; unless it was steady, watch for what is needed next, on the right station, or end."""
        try:
            if step() and self._window_bytes < WINDOW_BYTES and not self._station.bulk:
                return
            if self._shut and self._sent_end and self._tls.unsent is None:
                self._finish(INTACT, "")
                return
            self._watch()
            if self._window_bytes >= WINDOW_BYTES or self._station.bulk:
                self._choose_station()
        except LinkLost as error:
            self._finish(LOST, f"link: {error}")
        except StreamError as error:
            self._finish(LOST, f"link: {error.message}")
        except OSError as error:
            self._finish(LOST, f"endpoint: {error.strerror}")

    def _plain_ready(self, events: int) -> bool:
        if events & ERROR:
            code = self._plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, "reset")
        if events & WRITE:
            self._flush_plain()
        if self._plain_events & READ:
            if events & PEER_ENDED:
                self._outward_to_end()
            else:
                self._outward()
        elif events & GONE:
            self._park()
        return False

    def _outward(self) -> bool:
        """From the plain socket into the link, one chunk at most. True where nothing but bytes has changed."""
        station = self._station
        try:
            count = self._plain.recv_into(station.out_body)
        except BlockingIOError:
            return True
        if not count:
            self._sent_end = True
            self._tls.write(self._connection.machine.end())
            return False
        data_header_into(station.out, count)
        self._tls.write(station.out[: HEADER_BYTES + count])
        self.bytes_to_link += count
        self._window_bytes += count
        return self._tls.unsent is None

    def _outward_to_end(self) -> None:
        """As ``_outward``, when the sender has ended: its last bytes and END go in one record where they fit."""
        station, body = self._station, self._station.out_body
        try:
            count = ended = self._plain.recv_into(body)
        except BlockingIOError:
            return
        if 0 < count < len(body):
            with suppress(BlockingIOError):
                ended = self._plain.recv_into(body[count:])
                count += ended
        start, stop = (0 if count else HEADER_BYTES), HEADER_BYTES + count
        if count:
            data_header_into(station.out, count)
            self.bytes_to_link += count
            self._window_bytes += count
        if not ended:
            self._sent_end = True
            end = self._connection.machine.end()
            station.out[stop : stop + len(end)] = end
            stop += len(end)
        self._tls.write(station.out[start:stop])

    def _inward(self) -> bool:
        """From the link into the plain socket, one chunk at most. True where nothing but bytes has changed."""
        count = self._tls.read(self._station)
        if not count:
            return True
        self._window_bytes += count
        self._take(self._connection.machine.receive(self._station.plain[:count]))
        return self._to_plain is None and not self._received_end

    def _tls_ready(self, events: int) -> bool:
        tls = self._tls
        if events & WRITE:
            tls.flush()
        if self._tls_events & READ or (events & GONE and self._to_plain is None):
            self._inward()
        elif events & GONE:
            raise LinkLost("reset")
        return False

    def _take(self, events: list[Event]) -> bool:
        for event in events:
            if type(event) is memoryview:
                self._deliver(event)
            elif type(event) is End:
                self._received_end = True
                self._shut_if_flushed()
            elif type(event) is Open:  # the opener is done with this stream already; we still flush its last bytes
                self.next_open = event
            else:
                raise StreamError(f"{type(event).__name__} came amid a stream")
        return False

    def _deliver(self, data: memoryview) -> None:
        """Into the plain socket; what it does not take is copied aside, for the buffer is shared."""
        self.bytes_from_link += len(data)
        if self._to_plain is not None:
            self._to_plain = memoryview(bytes(self._to_plain) + data)
            return
        try:
            sent = self._plain.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._to_plain = memoryview(bytes(data[sent:]))

    def _flush_plain(self) -> None:
        if self._to_plain is None:
            return
        try:
            sent = self._plain.send(self._to_plain)
        except BlockingIOError:
            return
        self._to_plain = self._to_plain[sent:] if sent < len(self._to_plain) else None
        self._shut_if_flushed()

    def _shut_if_flushed(self) -> None:
        if self._received_end and not self._shut and self._to_plain is None:
            self._shut = True
            try:
                self._plain.shutdown(socket.SHUT_WR)
            except OSError:
                if not self._sent_end:
                    raise

    # What is watched, and where.

    def _wanted(self) -> tuple[int, int]:
        plain = tls = 0
        if not self._sent_end and self._tls.unsent is None:
            plain = READING
        if self._to_plain is not None:
            plain |= WRITE
        elif self.next_open is None:
            tls = READ
        if self._tls.unsent is not None:
            tls |= WRITE
        return plain, tls

    def _watch(self) -> None:
        plain, tls = self._wanted()
        if plain != self._plain_events:
            self._plain_events = plain
            if not self._parked:
                self._station.loop.modify(self._plain_fd, plain)
            elif plain:
                self._parked = False
                self._station.loop.add(self._plain_fd, plain, self._on_plain)
        if tls != self._tls_events:
            self._tls_events = tls
            self._station.loop.modify(self._tls.fd, tls)

    def _park(self) -> None:
        """The plain socket has hung up while we may not read it: epoll would report that without end."""
        if not self._parked:
            self._parked = True
            self._station.loop.remove(self._plain_fd)

    def _choose_station(self) -> None:
        now_s = self._station.loop.now_s
        elapsed_s = now_s - self._window_start_s
        full = self._window_bytes >= WINDOW_BYTES
        if not full and elapsed_s < QUIET_WINDOW_S:
            return
        self._window_bytes = 0
        self._window_start_s = now_s
        if self._station.bulk and not full:
            self._move(self._connection.main)
        elif not self._station.bulk and elapsed_s < BULK_WINDOW_S:
            self._move(self._connection.crew.pick())

    def _move(self, station: Station) -> None:
        loop = self._station.loop
        if not self._parked:
            loop.remove(self._plain_fd)
        loop.remove(self._tls.fd)
        self._station = station
        station.loop.call_threadsafe(self._arrive)

    def _arrive(self) -> None:
        loop = self._station.loop
        self._window_start_s = loop.now_s
        loop.add(self._tls.fd, self._tls_events, self._on_tls)
        if not self._parked:
            loop.add(self._plain_fd, self._plain_events, self._on_plain)

    # The end.

    def _finish(self, intact: bool, reason: str) -> None:
        loop = self._station.loop
        if not intact:
            self._reset(self._plain)
            self._tls.reset()
        if self._parked:
            self._plain.close()
        else:
            loop.discard(self._plain)
        if not self._station.bulk:
            self._finished(intact, reason)
            return
        loop.remove(self._tls.fd)
        main = self._connection.main
        main.loop.call_threadsafe(lambda: self._come_home(intact, reason))

    def _come_home(self, intact: bool, reason: str) -> None:
        self._station = self._connection.main
        self._station.loop.add(self._tls.fd, READ, self._on_tls)
        self._tls_events = READ
        self._finished(intact, reason)

    @staticmethod
    def _reset(sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
        except OSError:
            pass
