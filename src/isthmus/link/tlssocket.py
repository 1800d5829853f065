"""A non-blocking TCP socket with TLS in memory buffers. Encrypts and decrypts in the station's reused buffers."""

import socket
import ssl
import struct

from isthmus.link.station import Station

LINGER_ZERO = struct.pack("ii", 1, 0)
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 15, 5, 3


class LinkLost(Exception):
    """The connection ended; the text says how."""


def tune(sock: socket.socket) -> None:
    """Options of every link socket: no delay, and a silent peer is noticed after half a minute of idleness."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


class TlsSocket:
    """The encrypted side of a connection. ``unsent`` is ciphertext the kernel did not take yet, or None."""

    __slots__ = (
        "_decrypt",
        "_encrypt",
        "_incoming",
        "_outgoing",
        "_pending",
        "_recv_into",
        "_sock_send",
        "fd",
        "sock",
        "ssl",
        "unsent",
    )

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._decrypt = self.ssl.read
        self._encrypt = self.ssl.write
        self._pending = self.ssl.pending
        self._recv_into = sock.recv_into
        self._sock_send = sock.send
        self.unsent: memoryview | None = None

    def handshake(self, station: Station) -> bool:
        """Go on with the handshake; True once it is complete. Raises LinkLost."""
        try:
            count = self.sock.recv_into(station.cipher)
            if count == 0:
                raise LinkLost("closed during the handshake")
            self._incoming.write(station.cipher[:count])
        except BlockingIOError:
            pass
        except OSError as error:
            raise LinkLost(f"{error.strerror} during the handshake") from error
        try:
            self.ssl.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            done = False
        except ssl.SSLError as error:
            self._tell()  # the alert: it tells the other side why
            raise LinkLost(f"handshake: {error.reason or error}") from error
        self._tell()
        return done

    def read(self, station: Station) -> int:
        """Receive once and decrypt all of it into ``station.plain``; return how many bytes. Raises LinkLost."""
        incoming = self._incoming
        try:
            count = self._recv_into(station.cipher)
        except BlockingIOError:
            return self._decrypted(station) if incoming.pending or self._pending() else 0
        except OSError as error:
            raise LinkLost(error.strerror or "lost") from error
        if count == 0:
            raise LinkLost("closed")
        incoming.write(station.cipher[:count])
        return self._decrypted(station)

    def _decrypted(self, station: Station) -> int:
        plain, incoming, decrypt = station.plain, self._incoming, self._decrypt
        total, room = 0, len(plain)
        try:
            while total < room:
                got = decrypt(room - total, plain[total:])
                if not got:
                    raise LinkLost("closed with notice")
                total += got  # type: ignore[operator]
                if not incoming.pending and not self._pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            raise LinkLost("closed with notice") from None
        except ssl.SSLError as error:
            raise LinkLost(f"TLS: {error.reason or error}") from error
        if self._outgoing.pending:  # an answer to a key update
            self._tell()
        return total

    def write(self, data: "memoryview | bytes") -> None:
        """Encrypt and send; what the kernel does not take is kept in ``unsent``. Raises LinkLost."""
        try:
            self._encrypt(data)
        except ssl.SSLError as error:
            raise LinkLost(f"TLS: {error.reason or error}") from error
        self._tell()

    def flush(self) -> bool:
        """Send what waits; True when nothing is left. Raises LinkLost."""
        if self.unsent is not None:
            rest, self.unsent = self.unsent, None
            self._send(rest)
        return self.unsent is None

    @property
    def unsent_bytes(self) -> int:
        return len(self.unsent) if self.unsent is not None else 0

    def reset(self) -> None:
        """Make the close that follows an abort: RST, so that it passes a peer that does not read."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
        except OSError:
            pass

    def doom(self) -> None:
        """End the connection from any thread: its station sees a hang-up and cleans up."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _tell(self) -> None:
        data = self._outgoing.read()
        if not data:
            return
        if self.unsent is not None:
            self.unsent = memoryview(bytes(self.unsent) + data)
        else:
            self._send(data)

    def _send(self, data: "bytes | memoryview") -> None:
        try:
            sent = self._sock_send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise LinkLost(error.strerror or "lost") from error
        if sent < len(data):
            self.unsent = memoryview(data)[sent:]
