"""A TLS handshake on a crew station, and who turned out to be at the other end."""

import socket
import ssl
from collections.abc import Callable, Collection

from isthmus.link.station import Station
from isthmus.link.tlssocket import LinkLost, TlsSocket
from isthmus.loop.loop import READ, WRITE, Loop
from isthmus.wire.tls import Identity, TlsError, check_peer

Done = Callable[[TlsSocket | None, Identity | None, str], None]


class Handshake:
    """``done(tls, identity, '')`` or ``done(None, None, reason)`` once, on the main loop; a failed socket is closed.

    ``wanted`` is the node that must be there ('' for any). The caller bounds the time, by ``doom``.
    """

    __slots__ = ("_context", "_done", "_main", "_revoked", "_server_side", "_sock", "_station", "_tls", "_wanted")

    def __init__(
        self,
        main: Loop,
        station: Station,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        wanted: str,
        revoked: Collection[str],
        done: Done,
    ) -> None:
        self._main = main
        self._station = station
        self._sock = sock
        self._context = context
        self._server_side = server_side
        self._wanted = wanted
        self._revoked = revoked
        self._done = done
        self._tls: TlsSocket | None = None
        station.loop.call_threadsafe(self._begin)

    def doom(self) -> None:
        """From the main loop: give up; ``done`` comes with a reason."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _begin(self) -> None:
        try:
            self._tls = TlsSocket(self._sock, self._context, server_side=self._server_side)
        except (OSError, ValueError) as error:
            self._sock.close()
            self._report(None, None, f"handshake: {error}")
            return
        self._station.loop.add(self._tls.fd, READ, self._step)
        self._step(READ)

    def _step(self, events: int) -> None:
        tls = self._tls
        assert tls is not None
        try:
            if events & WRITE:
                tls.flush()
            complete = tls.handshake(self._station)
            if not complete:
                self._station.loop.modify(tls.fd, READ if tls.unsent is None else READ | WRITE)
                return
            identity = check_peer(tls.ssl, wanted=self._wanted, revoked=self._revoked)
        except (LinkLost, TlsError) as error:
            self._station.loop.discard(tls.sock)
            self._report(None, None, error.message if isinstance(error, TlsError) else str(error))
            return
        self._station.loop.remove(tls.fd)
        self._report(tls, identity, "")

    def _report(self, tls: TlsSocket | None, identity: Identity | None, reason: str) -> None:
        done = self._done
        self._main.call_threadsafe(lambda: done(tls, identity, reason))
