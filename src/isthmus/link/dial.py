"""Dialling: TCP, the relay's ticket where there is one, TLS. One object an attempt.

In a ticketed pair both sides dial, and the control process says which of them is the TLS client: the client opens
streams. Without a ticket the dialler is the TLS client; asked to dial by the peer, it says by ALPN that it accepts.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Callable

import msgspec

from isthmus.link.handshake import Handshake
from isthmus.link.station import Crew, Station
from isthmus.link.tlssocket import TlsSocket, tune
from isthmus.link.tlsstate import TlsState
from isthmus.loop.loop import READ, WRITE, Loop
from isthmus.model.errors import IsthmusError
from isthmus.wire.stream import Side
from isthmus.wire.ticket import AnswerReader, preamble
from isthmus.wire.tls import ALPN_LINK, ALPN_REVERSE, Identity
from isthmus.wire.worker import PathSpec


class Target(msgspec.Struct, frozen=True):
    """What to dial: the peer that must be there, how, and what we are on the connection."""

    node: str
    path: PathSpec
    address: str
    side: Side
    ticket: bytes = b""


class AddressError(IsthmusError):
    """An address is not HOST:PORT."""

    code = "link.address"


def split_address(text: str) -> tuple[str, int]:
    """HOST and PORT; an IPv6 host stands in brackets. Raises AddressError."""
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise AddressError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def is_literal(host: str) -> bool:
    """Whether the host is an address and needs no look-up."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


Done = Callable[[TlsSocket | None, Identity | None, str], None]


class Dial:
    """One attempt. ``done(tls, identity, reason)`` is called once, on the main loop; '' is success."""

    __slots__ = ("_answer", "_crew", "_done", "_handshake", "_main", "_sock", "_timer", "_tls", "target")

    def __init__(self, main: Loop, crew: Crew, tls: TlsState, target: Target, limit_s: float, done: Done) -> None:
        self._main = main
        self._crew = crew
        self._tls = tls
        self.target = target
        self._done: Done | None = done
        self._sock: socket.socket | None = None
        self._handshake: Handshake | None = None
        self._answer = AnswerReader()
        self._timer = main.call_later(limit_s, lambda: self.cancel(f"no connection within {limit_s:g} s"))
        try:
            host, port = split_address(target.address)
        except AddressError as error:
            reason = error.message
            main.call_soon(lambda: self._fail(reason))
            return
        if is_literal(host):
            main.call_soon(lambda: self._connect(host, port))
        else:
            self._resolve(crew.pick(), host, port)

    def cancel(self, reason: str) -> None:
        """Give up."""
        if self._handshake is not None:
            self._handshake.doom()
        self._fail(reason)

    def _resolve(self, station: Station, host: str, port: int) -> None:
        def look_up() -> None:
            try:
                found = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
            except OSError as error:
                reason = f"{host}: {error.strerror or error}"
                self._main.call_threadsafe(lambda: self._fail(reason))
            else:
                self._main.call_threadsafe(lambda: self._connect(found, port))

        station.loop.call_threadsafe(look_up)

    def _connect(self, host: str, port: int) -> None:
        if self._done is None:
            return
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            self._fail(f"socket: {error.strerror}")
            return
        self._sock = sock
        tune(sock)
        try:
            code = sock.connect_ex((host, port))
        except OSError as error:
            code = error.errno or errno.EINVAL
        if code not in (0, errno.EINPROGRESS):
            self._fail(f"connect: {os.strerror(code)}")
            return
        self._main.add(sock.fileno(), WRITE, self._connected)

    def _connected(self, _events: int) -> None:
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(f"connect: {os.strerror(code)}")
            return
        if not self.target.ticket:
            self._shake_hands(server_side=False)
            return
        try:
            sent = self._sock.send(preamble(self.target.ticket))  # 40 bytes into an empty send buffer: never in part
        except OSError as error:
            self._fail(f"ticket: {error.strerror}")
            return
        if sent != len(preamble(self.target.ticket)):
            self._fail("ticket: not sent in one piece")
            return
        self._main.set_handler(self._sock.fileno(), self._answered)
        self._main.modify(self._sock.fileno(), READ)

    def _answered(self, _events: int) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(self._answer.missing_bytes)
            if not data:
                self._fail("relay: closed before the peer came")
                return
            joined = self._answer.feed(data)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(f"relay: {error.strerror}")
            return
        except IsthmusError as error:
            self._fail(f"relay: {error.message}")
            return
        if joined:
            self._shake_hands(server_side=self.target.side is Side.ACCEPTOR)

    def _shake_hands(self, *, server_side: bool) -> None:
        assert self._sock is not None
        self._main.remove(self._sock.fileno())
        reverse = not server_side and self.target.side is Side.ACCEPTOR
        sock, self._sock = self._sock, None
        self._handshake = Handshake(
            self._main,
            self._crew.pick(),
            sock,
            self._tls.server() if server_side else self._tls.client(reverse=reverse),
            server_side=server_side,
            wanted=self.target.node,
            revoked=self._tls.revoked,
            done=self._shaken,
        )

    def _shaken(self, tls: TlsSocket | None, identity: Identity | None, reason: str) -> None:
        if self._done is None:
            if tls is not None:
                tls.sock.close()
            return
        if tls is not None:
            agreed = tls.ssl.selected_alpn_protocol()
            expected = ALPN_REVERSE if not self.target.ticket and self.target.side is Side.ACCEPTOR else ALPN_LINK
            if agreed != expected:
                tls.sock.close()
                tls, identity, reason = None, None, f"the other side speaks {agreed or 'no protocol of ours'}"
        self._finish(tls, identity, reason)

    def _fail(self, reason: str) -> None:
        if self._sock is not None:
            self._main.discard(self._sock)
            self._sock = None
        self._finish(None, None, reason)

    def _finish(self, tls: TlsSocket | None, identity: Identity | None, reason: str) -> None:
        done, self._done = self._done, None
        self._timer.cancel()
        if done is not None:
            done(tls, identity, reason)
