"""One port for everything: accepts, looks at the first byte, and hands on. Bounds what strangers may hold.

A connection is a stranger until it has shown a certificate or a good ticket. Strangers are bounded in number, in all
and by source address, and in time. When descriptors run out, one that is kept in reserve is used to accept and close,
so that clients are refused at once instead of left waiting, and the port rests for a moment.
"""

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable

import structlog

from isthmus.wire import control, enrolment
from isthmus.wire.ticket import MAGIC, PreambleReader, TicketError, refusal

log = structlog.get_logger(__name__)

TLS_HANDSHAKE = 0x16
BACKLOG = 1024
ACCEPTS_A_TURN = 64
FIRST_BYTES_DEADLINE_S = 5.0
HANDSHAKE_DEADLINE_S = 5.0
STRANGERS = 1_024
STRANGERS_AN_ADDRESS = 256
REST_S = 0.25

Streams = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Tickets = Callable[[socket.socket, bytes], None]


class Door:
    """The listening socket and the connections that have not said yet who they are."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        context: Callable[[], ssl.SSLContext | None],
        on_control: Streams | None,
        on_enrol: Streams | None,
        on_ticket: Tickets | None,
        counters: Counter[str],
        strangers: int = STRANGERS,
        strangers_an_address: int = STRANGERS_AN_ADDRESS,
    ) -> None:
        """``listener`` is bound and non-blocking. ``context`` is asked for every handshake: certificates change."""
        self._listener = listener
        self._context = context
        self._serves = {control.ALPN: on_control, enrolment.ALPN: on_enrol}
        self._on_ticket = on_ticket
        self._counters = counters
        self._most = strangers
        self._most_an_address = strangers_an_address
        self._strangers: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._open = False

    @property
    def strangers(self) -> int:
        """Connections that have not said yet who they are."""
        return self._strangers.total()

    def open(self) -> None:
        """Begin to accept."""
        self._listener.listen(BACKLOG)
        self._open = True
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stop accepting and end what goes on."""
        if self._open:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._open = False
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._accept_failed(error)
                return
            self._admit(sock, plain_address(address[0]))

    def _admit(self, sock: socket.socket, source: str) -> None:
        self._counters["accepted"] += 1
        if self.strangers >= self._most:
            self._refuse(sock, "refused-strangers")
        elif self._strangers[source] >= self._most_an_address:
            self._refuse(sock, "refused-strangers-address")
        else:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._strangers[source] += 1
            task = asyncio.get_running_loop().create_task(self._welcome(sock, source), name=f"stranger {source}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _refuse(self, sock: socket.socket, why: str) -> None:
        self._counters[why] += 1
        sock.close()

    def _accept_failed(self, error: OSError) -> None:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            log.warning("accept failed", error=str(error))
            return
        self._counters["no-descriptors"] += 1
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
            try:
                self._listener.accept()[0].close()
            except OSError:
                pass
        self._rest()

    def _rest(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        loop.call_later(REST_S, self._wake_up)

    def _wake_up(self) -> None:
        if not self._open:
            return
        if self._reserve < 0:
            try:
                self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._rest()
                return
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def _welcome(self, sock: socket.socket, source: str) -> None:
        """See what a connection begins with; it is a stranger until this returns or hands it on."""
        known = _Once(lambda: self._no_longer(source))
        try:
            async with asyncio.timeout(FIRST_BYTES_DEADLINE_S):
                first = await _peek(sock)
            if first and first[0] == TLS_HANDSHAKE:
                await self._tls(sock, known)
            elif first and MAGIC.startswith(first) and self._on_ticket is not None:
                await self._ticket(sock, known)
            else:
                self._counters["garbage" if first else "closed-silently"] += 1
                sock.close()
        except (TimeoutError, OSError, ssl.SSLError) as error:
            self._counters["stranger-late" if isinstance(error, TimeoutError) else "stranger-broken"] += 1
            sock.close()
        finally:
            known()

    async def _ticket(self, sock: socket.socket, known: "_Once") -> None:
        loop = asyncio.get_running_loop()
        preamble = PreambleReader()
        try:
            async with asyncio.timeout(FIRST_BYTES_DEADLINE_S):
                while data := await loop.sock_recv(sock, preamble.missing_bytes):
                    ticket = preamble.feed(data)
                    if ticket is not None:
                        known()
                        assert self._on_ticket is not None
                        self._on_ticket(sock, ticket)
                        return
        except TicketError:
            self._counters["garbage"] += 1
            sock.close()
            return
        self._counters["closed-silently"] += 1
        sock.close()

    async def _tls(self, sock: socket.socket, known: "_Once") -> None:
        context = self._context()
        if context is None:
            self._counters["no-certificate-yet"] += 1
            sock.close()
            return
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=65_536, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, sock, ssl=context, ssl_handshake_timeout=HANDSHAKE_DEADLINE_S, ssl_shutdown_timeout=1.0
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            alpn = transport.get_extra_info("ssl_object").selected_alpn_protocol()
            serve = self._serves.get(alpn)
            if serve is None:
                self._counters["wrong-protocol"] += 1
                return
            if alpn == control.ALPN:
                known()  # the channel counts from here: it has a bound of its own
            await serve(reader, writer)
        finally:
            transport.abort()

    def _no_longer(self, source: str) -> None:
        self._strangers[source] -= 1
        if self._strangers[source] <= 0:
            del self._strangers[source]


class _Once:
    """Calls once, however often it is called."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


async def _peek(sock: socket.socket) -> bytes:
    """The first bytes, which stay in the socket; b"" when the other side closed."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock.fileno(), _settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
    return sock.recv(len(MAGIC), socket.MSG_PEEK)


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def plain_address(host: str) -> str:
    """An address as text, an IPv4 address in IPv6 clothes as IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def host_port(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def refuse_half(sock: socket.socket, reason: str) -> None:
    """Tell a dialler why its ticket is not good, and close."""
    try:
        sock.send(refusal(reason), socket.MSG_DONTWAIT)
    except OSError:
        pass  # gone already
    sock.close()
