"""The link port: TLS before anything is parsed, a bounded number of handshakes, then connections for the owner."""

import errno
import os
import socket
from collections.abc import Callable

import structlog

from isthmus.link.handshake import Handshake
from isthmus.link.limits import LinkLimits
from isthmus.link.station import Crew
from isthmus.link.tlssocket import TlsSocket, tune
from isthmus.link.tlsstate import TlsState
from isthmus.loop.loop import READ, Loop
from isthmus.wire.tls import ALPN_LINK, ALPN_REVERSE, Identity

log = structlog.get_logger(__name__)

BACKLOG = 1024
BATCH = 32
REST_S = 0.1  # after an accept for which no descriptor was left
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)

# tls, who, the dialler's address, and whether we are the one who opens streams on it.
Accepted = Callable[[TlsSocket, Identity, str, bool], None]


class Listener:
    """Accepts links on all addresses, IPv4 and IPv6."""

    def __init__(self, main: Loop, crew: Crew, tls: TlsState, limits: LinkLimits, accepted: Accepted) -> None:
        self._main = main
        self._crew = crew
        self._tls = tls
        self._limits = limits
        self._accepted = accepted
        self._sockets: list[socket.socket] = []
        self._reserve = -1  # a descriptor to give up when there are none, so that a caller can be refused
        self._paused = False
        self._pending: dict[Handshake, None] = {}
        self.refused: dict[str, int] = {}

    @property
    def handshakes(self) -> int:
        """In progress."""
        return len(self._pending)

    def listen(self, port: int) -> int:
        """Bind and accept; returns the port (for 0: the one that was given). Raises OSError."""
        families = [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
        for family, host in families:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and family == socket.AF_INET6:
                    continue
                raise
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setblocking(False)
            try:
                sock.bind((host, port))
            except OSError as error:
                sock.close()
                if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6:  # IPv6 is disabled
                    continue
                raise
            sock.listen(BACKLOG)
            port = sock.getsockname()[1]
            self._sockets.append(sock)
        self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        for sock in self._sockets:
            self._watch(sock)
        return port

    def close(self) -> None:
        """Stop accepting; handshakes in progress are given up."""
        for sock in self._sockets:
            self._main.discard(sock)
        self._sockets.clear()
        for handshake in list(self._pending):
            handshake.doom()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def _watch(self, sock: socket.socket) -> None:
        self._main.add(sock.fileno(), READ, lambda _events: self._accept(sock))

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(BATCH):
            if len(self._pending) >= self._limits.handshakes:
                self._count("handshakes-full")
                self._pause()
                return
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    self._shed(listener)
                return
            if not self._tls.ready:
                self._count("no-credentials")
                sock.close()
                continue
            tune(sock)
            self._begin(sock, f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}")

    def _begin(self, sock: socket.socket, address: str) -> None:
        handshake: Handshake

        def done(tls: TlsSocket | None, identity: Identity | None, reason: str) -> None:
            timer.cancel()
            self._pending.pop(handshake, None)
            self._resume()
            self._shaken(tls, identity, reason, address)

        handshake = Handshake(
            self._main,
            self._crew.pick(),
            sock,
            self._tls.server(),
            server_side=True,
            wanted="",
            revoked=self._tls.revoked,
            done=done,
        )
        timer = self._main.call_later(self._limits.handshake_s, handshake.doom)
        self._pending[handshake] = None

    def _shaken(self, tls: TlsSocket | None, identity: Identity | None, reason: str, address: str) -> None:
        if tls is None or identity is None:
            self._count("handshake")
            log.info("link handshake failed", address=address, reason=reason)
            return
        agreed = tls.ssl.selected_alpn_protocol()
        if agreed not in (ALPN_LINK, ALPN_REVERSE):
            self._count("protocol")
            tls.sock.close()
            return
        self._accepted(tls, identity, address, agreed == ALPN_REVERSE)

    def _shed(self, listener: socket.socket) -> None:
        """No descriptors: refuse the caller at once rather than let it wait in the backlog, then rest a little."""
        self._count("no-descriptors")
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
            try:
                listener.accept()[0].close()
            except OSError:
                pass
        try:
            self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._pause()
            self._main.call_later(REST_S, self._resume)

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            for sock in self._sockets:
                self._main.remove(sock.fileno())

    def _resume(self) -> None:
        if self._paused and len(self._pending) < self._limits.handshakes:
            self._paused = False
            for sock in self._sockets:
                self._watch(sock)

    def _count(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
