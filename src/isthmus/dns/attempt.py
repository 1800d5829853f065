"""One question to one upstream: UDP from a random port, then TCP if the reply was cut. On the loop, never blocking."""

import errno
import os
import secrets
import socket
from collections.abc import Callable

from isthmus.dns import message
from isthmus.dns.message import Malformed
from isthmus.dns.upstream_reply import UpstreamReply, parse_reply
from isthmus.dns.upstreams import Upstream
from isthmus.loop.loop import READ, WRITE, Loop

MAX_BYTES = 65_535
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Done = Callable[["Attempt", UpstreamReply | None, str], None]


class Attempt:
    """``done(attempt, reply, error)`` is called once, unless ``close`` comes first. Time limits are the caller's.

    A connected socket takes replies from that address and port only; the kernel picks a random port for each attempt,
    and a reply with another id or question is passed over (RFC 5452).
    """

    def __init__(
        self, loop: Loop, upstream: Upstream, question: bytes, flags: int, do: bool, now_s: float, done: Done
    ) -> None:
        self.upstream, self.started_s = upstream, now_s
        self._loop, self._question, self._done = loop, question, done
        self._id = secrets.randbits(16)
        edns = b"" if upstream.plain else message.encode_opt(do=do)
        head = message.HEADER.pack(self._id, flags, 1, 0, 0, 0 if upstream.plain else 1)
        self._query = head + question + edns
        self.our_fault = False  # out of descriptors: says nothing about the upstream
        self._socket: socket.socket | None = None
        self._inbox = bytearray()
        self._outbox = b""

    def start(self) -> None:
        """Send. A failure is reported from the loop, not from here."""
        self.upstream.asked += 1
        try:
            self._open(socket.SOCK_DGRAM)
            assert self._socket is not None
            self._socket.send(self._query)
            self._loop.add(self._socket.fileno(), READ, self._datagram)
        except OSError as error:
            self.our_fault = error.errno in EXHAUSTED
            text = error.strerror or str(error)
            self._loop.call_soon(lambda: self._finish(None, text))

    def close(self) -> None:
        """Give up; ``done`` is not called any more."""
        self._done = _ignore
        self._close_socket()

    def _open(self, kind: socket.SocketKind) -> None:
        family = socket.AF_INET6 if ":" in self.upstream.address else socket.AF_INET
        self._socket = socket.socket(family, kind)
        self._socket.setblocking(False)
        code = self._socket.connect_ex((self.upstream.address, self.upstream.port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))

    def _datagram(self, _events: int) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(MAX_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(None, error.strerror or str(error))
            return
        try:
            reply = parse_reply(data, self._id, self._question)
        except Malformed:
            return  # anyone can send broken bytes; the real reply may follow
        if reply is None:
            return
        if reply.truncated:
            self._over_tcp()
        else:
            self._finish(reply, "")

    def _over_tcp(self) -> None:
        self._close_socket()
        self._outbox = len(self._query).to_bytes(2, "big") + self._query
        try:
            self._open(socket.SOCK_STREAM)
            assert self._socket is not None
            self._loop.add(self._socket.fileno(), WRITE, self._write)
        except OSError as error:
            self._finish(None, error.strerror or str(error))

    def _write(self, _events: int) -> None:
        assert self._socket is not None
        try:
            self._outbox = self._outbox[self._socket.send(self._outbox) :]
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(None, error.strerror or str(error))
            return
        if not self._outbox:
            self._loop.set_handler(self._socket.fileno(), self._stream)
            self._loop.modify(self._socket.fileno(), READ)

    def _stream(self, _events: int) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(MAX_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(None, error.strerror or str(error))
            return
        self._inbox += data
        size = int.from_bytes(self._inbox[:2], "big") + 2
        if len(self._inbox) >= max(size, 3):
            try:
                reply = parse_reply(bytes(self._inbox[2:size]), self._id, self._question)
            except Malformed as error:
                self._finish(None, str(error))
            else:
                self._finish(reply, "" if reply else "answered another question over TCP")
        elif not data:
            self._finish(None, "closed the TCP connection")

    def _finish(self, reply: UpstreamReply | None, error: str) -> None:
        self._close_socket()
        done, self._done = self._done, _ignore
        done(self, reply, error)

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._loop.discard(self._socket)
            self._socket = None


def _ignore(_attempt: Attempt, _reply: UpstreamReply | None, _error: str) -> None:
    pass
