"""Questions over TCP (RFC 7766): many on one connection, answered as they are ready, in any order.

Everything is bounded: connections, questions under way on one connection, bytes waiting to be read by the client, and
the time a connection may be idle or stuck.
"""

import errno
import socket
import time
from collections import Counter
from collections.abc import Callable

from isthmus.dns.answers import Answers, AskUpstreams, Forward
from isthmus.loop.loop import GONE, READ, WRITE, Loop

MAX_CONNECTIONS = 256
MAX_UNDER_WAY = 64
MAX_UNSENT_BYTES = 256 * 1024
READ_BYTES = 64 * 1024
IDLE_S = 10.0
SWEEP_S = 1.0
REST_S = 0.5  # after running out of descriptors

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TcpServer:
    """One bound TCP address on the loop."""

    def __init__(self, loop: Loop, bound: socket.socket, answers: Answers, ask: AskUpstreams) -> None:
        self._loop, self._socket, self._answers, self._ask = loop, bound, answers, ask
        self._counters: Counter[str] = answers.counters
        self._connections: dict[int, _Connection] = {}
        self._closed = False

    def start(self) -> None:
        """Listen and accept."""
        self._socket.listen(512)
        self._loop.add(self._socket.fileno(), READ, self._accept)
        self._loop.call_later(SWEEP_S, self._sweep)

    def close(self) -> None:
        """Close the listener and every connection."""
        self._closed = True
        self._loop.discard(self._socket)
        for connection in list(self._connections.values()):
            connection.close()

    def _accept(self, _events: int) -> None:
        try:
            accepted, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._counters["tcp_exhausted"] += 1
                self._loop.modify(self._socket.fileno(), 0)
                self._loop.call_later(REST_S, self._resume)
            return
        self._counters["tcp_connections"] += 1
        if len(self._connections) >= MAX_CONNECTIONS:
            self._counters["tcp_evicted"] += 1
            min(self._connections.values(), key=lambda one: one.active_s).close()
        connection = _Connection(self._loop, accepted, self._answers, self._ask, self._connections.pop)
        self._connections[accepted.fileno()] = connection

    def _resume(self) -> None:
        if not self._closed:
            self._loop.modify(self._socket.fileno(), READ)

    def _sweep(self) -> None:
        before_s = time.monotonic() - IDLE_S
        for connection in list(self._connections.values()):
            if connection.active_s < before_s:
                self._counters["tcp_idle"] += 1
                connection.close()
        if not self._closed:
            self._loop.call_later(SWEEP_S, self._sweep)


class _Connection:
    """One client's connection. ``active_s`` is when bytes last moved."""

    def __init__(
        self,
        loop: Loop,
        accepted: socket.socket,
        answers: Answers,
        ask: AskUpstreams,
        gone: Callable[[int], object],
    ) -> None:
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop, self._socket, self._answers, self._ask, self._gone = loop, accepted, answers, ask, gone
        self._inbox, self._outbox = bytearray(), bytearray()
        self._under_way = 0
        self._ended = False  # the client sends no more; what is under way is still answered
        self._watched = READ
        self._open = True
        self.active_s = time.monotonic()
        loop.add(accepted.fileno(), READ, self._ready)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._gone(self._socket.fileno())
            self._loop.discard(self._socket)

    def _ready(self, events: int) -> None:
        self.active_s = time.monotonic()
        if events & GONE:
            self.close()
            return
        try:
            if self._outbox:
                self._flush()
            if self._open and events & ~WRITE and not self._ended:
                self._read()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        if self._open:
            self._answer_inbox()

    def _read(self) -> None:
        data = self._socket.recv(READ_BYTES)
        self._inbox += data
        self._ended = not data

    def _answer_inbox(self) -> None:
        """Answer the questions that are complete, as many as the bounds allow; the rest waits in the inbox."""
        at = 0
        while len(self._inbox) - at >= 2 and not self._full():
            end = at + 2 + int.from_bytes(self._inbox[at : at + 2], "big")
            if len(self._inbox) < end:
                break
            self._answer(bytes(self._inbox[at + 2 : end]))
            at = end
        del self._inbox[:at]
        self._settle()

    def _full(self) -> bool:
        return self._under_way >= MAX_UNDER_WAY or len(self._outbox) > MAX_UNSENT_BYTES

    def _answer(self, data: bytes) -> None:
        self._answers.counters["queries_tcp"] += 1
        answer = self._answers.known(data) or self._answers.answer(data, udp=False)
        if isinstance(answer, Forward):
            self._under_way += 1
            self._ask(answer, False, self._answered)
        elif answer is not None:
            self._put(answer)

    def _answered(self, reply: bytes) -> None:
        self._under_way -= 1
        if self._open:
            self.active_s = time.monotonic()
            self._put(reply)
            self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        if self._open:
            self._answer_inbox()

    def _put(self, reply: bytes) -> None:
        self._outbox += len(reply).to_bytes(2, "big") + reply

    def _flush(self) -> None:
        del self._outbox[: self._socket.send(self._outbox)]

    def _settle(self) -> None:
        """Send what can be sent, watch for what is wanted next, close when nothing is left to do."""
        try:
            if self._outbox:
                self._flush()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._ended and not self._outbox and not self._under_way:
            self.close()
            return
        wanted = (WRITE if self._outbox else 0) | (0 if self._ended or self._full() else READ)
        if wanted != self._watched:
            self._watched = wanted
            self._loop.modify(self._socket.fileno(), wanted)
