"""Endpoints of this node, reached for streams and datagrams that come from other nodes (model/ports.EndpointConnector).

plan/admission.py decides; what it refuses is counted by rule.
"""

import errno
import socket
from collections.abc import Callable

from isthmus.loop.loop import READ, Loop
from isthmus.model.ports import DatagramEndpoint, Outcome, StreamRequest
from isthmus.model.settings import ProxySettings
from isthmus.plan.admission import Admission, admit
from isthmus.proxy.counters import Counters, Reason
from isthmus.proxy.dial import Dial
from isthmus.proxy.table import Table
from isthmus.proxy.udp import DATAGRAMS_A_TURN, connected_datagrams

StreamDone = Callable[[Outcome, socket.socket | None, str], None]

_buffer = bytearray(65_536)
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Connector:
    """Implements ``EndpointConnector``."""

    def __init__(
        self, loop: Loop, settings: ProxySettings, table: Table, counters: Counters, *, mark: bool = True
    ) -> None:
        self._loop = loop
        self._settings = settings
        self._table = table
        self._counters = counters
        self._mark = mark

    def connect(self, peer: str, request: StreamRequest, done: StreamDone) -> None:
        """Connect within ``connect_timeout_s``; ``done`` may be called before this returns."""
        refusal = self._refusal(request)
        if refusal:
            done(Outcome.NOT_ALLOWED, None, refusal)
            return
        _Attempt(self._loop, self._settings.connect_timeout_s, request, done, mark=self._mark).start()

    def open_datagrams(
        self, peer: str, request: StreamRequest, received: Callable[[bytes], None]
    ) -> tuple[Outcome, DatagramEndpoint | None, str]:
        """A UDP session towards the endpoint. The caller closes it; a closed port shows as silence, as on a network."""
        refusal = self._refusal(request)
        if refusal:
            return Outcome.NOT_ALLOWED, None, refusal
        try:
            sock = connected_datagrams(request.address, request.port, mark=self._mark)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._counters.refuse(Reason.NO_DESCRIPTORS)
                return Outcome.EXHAUSTED, None, error.strerror or ""
            return Outcome.NO_PATH, None, error.strerror or ""
        return Outcome.OPENED, Datagrams(self._loop, sock, received), ""

    def _refusal(self, request: StreamRequest) -> str:
        table = self._table
        plan = table.plan(request.namespace, request.service)
        verdict = admit(request, plan, table.own_endpoints(request.namespace, request.service), table.node)
        self._counters.admitted(verdict.rule)
        return "" if verdict.action is Admission.ADMIT else f"{verdict.rule}: {verdict.because.text}"


class _Attempt:
    """One connection with its deadline."""

    __slots__ = ("_deadline", "_dial", "_done", "_loop")

    def __init__(self, loop: Loop, timeout_s: float, request: StreamRequest, done: StreamDone, *, mark: bool) -> None:
        self._loop = loop
        self._done = done
        self._dial = Dial(loop, request.address, request.port, self._dialled, mark=mark)
        self._deadline = loop.call_later(timeout_s, self._late)

    def start(self) -> None:
        known = self._dial.start()
        if known is not None:
            self._dialled(self._dial, *known)

    def _dialled(self, dial: Dial, outcome: Outcome, detail: str) -> None:
        self._deadline.cancel()
        self._done(outcome, dial.take() if outcome is Outcome.OPENED else None, detail)

    def _late(self) -> None:
        waits = self._dial.waits_for_a_port
        self._dial.cancel()
        if waits:
            self._done(Outcome.EXHAUSTED, None, "no local port was free")
        else:
            self._done(Outcome.TIMED_OUT, None, "the endpoint did not answer")


class Datagrams:
    """Implements ``DatagramEndpoint``."""

    __slots__ = ("_loop", "_received", "_sock", "errors")

    def __init__(self, loop: Loop, sock: socket.socket, received: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._sock: socket.socket | None = sock
        self._received = received
        self.errors = 0
        loop.add(sock.fileno(), READ, self._ready)

    def send(self, payload: bytes) -> None:
        """Send one datagram to the endpoint; errors are counted, never raised."""
        if self._sock is None:
            return
        try:
            self._sock.send(payload)
        except OSError:
            self.errors += 1

    def close(self) -> None:
        """Close the socket. May be repeated."""
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.discard(sock)

    def _ready(self, _events: int) -> None:
        for _ in range(DATAGRAMS_A_TURN):
            if self._sock is None:  # closed by the receiver of the one before
                return
            try:
                size = self._sock.recv_into(_buffer)
            except BlockingIOError:
                return
            except OSError:
                self.errors += 1
                return
            self._received(bytes(memoryview(_buffer)[:size]))
