"""Intercepted UDP: one socket an address, which says where each datagram was going and answers in that one's name.

Two ways lead here and may be in use side by side (docs/interception.md): after DNAT the destination is conntrack's
record, and answers leave from this socket, for conntrack changes them back; after TPROXY the destination stands beside
the datagram, and answers leave from a transparent socket bound to it. The datagram itself tells them apart: what came
through DNAT was delivered to the socket's own address.
"""

import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from isthmus.kernel.conntrack import Conntrack, NotIntercepted
from isthmus.kernel.sockets import (
    ORIGINAL_DESTINATION_SPACE,
    Address,
    peer_of,
    received_destination,
    reply_socket,
    transparent_datagrams,
)

MAX_DATAGRAM_BYTES = 65_535
# A record is asked for again after this much silence of a client. It must be shorter than the shortest time for which
# conntrack keeps a silent flow (30 s by default), for the same port may mean another destination afterwards.
RECORD_FRESH_S = 15.0
MAX_RECORDS = 65_536
MAX_REPLY_SOCKETS = 1_024


class Flow(NamedTuple):
    """Who talks to whom; hashable, so it serves as a session's key.

    ``peer`` is the sender as our socket sees it (netfilter may have changed its port), ``client`` the real sender.
    ``redirected``: through DNAT, answers leave from the intake's own socket.
    """

    peer: Address
    client: Address
    destination: Address
    redirected: bool


class Intake:
    """Receives intercepted datagrams on ``address:port`` and answers them. One thread; never blocks."""

    def __init__(
        self, address: str, port: int, *, reuse_port: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._socket = transparent_datagrams(address, port, reuse_port=reuse_port)
        self._name = peer_of(self._socket.getsockname())
        self._clock = clock
        self._buffer = bytearray(MAX_DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        self._conntrack: Conntrack | None = None
        self._records: OrderedDict[Address, tuple[Flow, float]] = OrderedDict()
        self._reply_sockets: OrderedDict[Address, socket.socket] = OrderedDict()
        self.strangers = 0
        """Datagrams that nobody redirected: sent to the intake's own address. Dropped."""

    def fileno(self) -> int:
        """For the readiness loop."""
        return self._socket.fileno()

    def receive(self) -> tuple[bytes, Flow] | None:
        """The next datagram and its flow; None for one that belongs to no flow (counted in ``strangers``).

        BlockingIOError, and nothing else, says that the socket is empty.
        """
        size, ancillary, _flags, name = self._socket.recvmsg_into([self._buffer], ORIGINAL_DESTINATION_SPACE)
        peer = peer_of(name)
        destination = received_destination(ancillary)
        if destination is not None and destination != self._name:
            return bytes(self._view[:size]), Flow(peer, peer, destination, False)
        flow = self._recorded(peer)
        if flow is None:
            self.strangers += 1
            return None
        return bytes(self._view[:size]), flow

    def reply(self, flow: Flow, payload: bytes) -> None:
        """Send one answer in the destination's name. OSError as the system gives it (BlockingIOError: queue full)."""
        if flow.redirected:
            self._socket.sendto(payload, flow.peer)
        else:
            self._reply_socket(flow.destination).sendto(payload, flow.peer)

    def close(self) -> None:
        """Close every socket; may be repeated."""
        self._socket.close()
        for sock in self._reply_sockets.values():
            sock.close()
        self._reply_sockets.clear()
        if self._conntrack is not None:
            self._conntrack.close()
            self._conntrack = None

    def _recorded(self, peer: Address) -> Flow | None:
        now_s = self._clock()
        known = self._records.get(peer)
        if known is not None and now_s < known[1]:
            flow = known[0]
        else:
            if self._conntrack is None:
                self._conntrack = Conntrack()
            try:
                record = self._conntrack.record(socket.IPPROTO_UDP, peer, self._name)
            except NotIntercepted:
                return None
            if record.destination == self._name:
                return None
            flow = Flow(peer, record.client, record.destination, True)
        self._records[peer] = (flow, now_s + RECORD_FRESH_S)
        self._records.move_to_end(peer)
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        return flow

    def _reply_socket(self, destination: Address) -> socket.socket:
        sock = self._reply_sockets.get(destination)
        if sock is None:
            sock = reply_socket(destination)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # for sending only
            self._reply_sockets[destination] = sock
            if len(self._reply_sockets) > MAX_REPLY_SOCKETS:
                self._reply_sockets.popitem(last=False)[1].close()
        else:
            self._reply_sockets.move_to_end(destination)
        return sock
