"""The relay: knows which nodes are here, forwards what they announce, hands out tickets, joins pairs."""

import asyncio
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import structlog

from isthmus.model.errors import IsthmusError
from isthmus.relay.channel import Channel
from isthmus.relay.door import host_port, plain_address, refuse_half
from isthmus.relay.joiner import Joiner
from isthmus.relay.tickets import Pair, PairRefused, Stage, TicketBook
from isthmus.wire import control, identity, tls
from isthmus.wire.announcement import Stale
from isthmus.wire.registry import Registry
from isthmus.wire.ticket import ACCEPTED

log = structlog.get_logger(__name__)

CHANNELS = 5_000
TICK_S = 0.5
HELLO_DEADLINE_S = 10.0
EXPIRE_EVERY_TICKS = 20


class Limits(msgspec.Struct, frozen=True):
    """Bounds, from the settings and the process's limit of descriptors."""

    streams_per_node: int = 1_024
    pairs: int = 8_000
    pairing_s: float = 5.0
    outbox_bytes: int = 262_144
    channels: int = CHANNELS


class Relay:
    """The state of one relay process. All methods run on its event loop."""

    def __init__(self, name: str, registry: Registry, limits: Limits, counters: Counter[str]) -> None:
        self.name = name
        self.registry = registry
        self.limits = limits
        self.counters = counters
        self.channels: dict[str, Channel] = {}
        self.tickets = TicketBook(
            pairs_per_node=limits.streams_per_node,
            pairs=limits.pairs,
            pairing_s=limits.pairing_s,
            random_bytes=secrets.token_bytes,
        )
        self._halves: dict[int, tuple[str, socket.socket]] = {}
        self._connected = 0
        self._joiner: Joiner | None = None
        self._revocations_changed: list[Callable[[bytes], None]] = []

    def on_revocations(self, call: Callable[[bytes], None]) -> None:
        """``call`` gets each newer list that a node brought."""
        self._revocations_changed.append(call)

    async def run(self, stop: asyncio.Event) -> None:
        """Forget what is overdue, until ``stop``; then end every pair and channel."""
        loop = asyncio.get_running_loop()
        self._joiner = Joiner(loop.call_soon_threadsafe, self._pair_ended)
        self._joiner.start()
        ticks = 0
        try:
            while not stop.is_set():
                self._expire_pairs()
                ticks += 1
                if ticks % EXPIRE_EVERY_TICKS == 0:
                    self._expire_certificates(time.time())
                try:
                    async with asyncio.timeout(TICK_S):
                        await stop.wait()
                except TimeoutError:
                    pass
        finally:
            for channel in list(self.channels.values()):
                channel.close("stopping", "the relay stops")
            for _, sock in self._halves.values():
                sock.close()
            self._halves.clear()
            await asyncio.to_thread(self._joiner.stop)

    async def serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection under the control ALPN, after its handshake."""
        try:
            peer = tls.check_peer(_ssl(writer), kind="node", revoked=self.registry.revoked_serials)
        except tls.TlsError as error:
            self.counters["refused-certificate"] += 1
            writer.write(control.pack(control.Goodbye("certificate", str(error))))
            await _flush(writer)
            return
        if self._connected >= self.limits.channels:
            self.counters["refused-channels"] += 1
            return
        host, port = writer.get_extra_info("peername")[:2]
        channel = Channel(
            self,
            peer.name,
            peer.serial,
            host_port(plain_address(host), port),
            reader,
            writer,
            outbox_bytes=self.limits.outbox_bytes,
        )
        channel.expires_s = _expiry_s(writer)
        self._connected += 1
        deadline = asyncio.get_running_loop().call_later(HELLO_DEADLINE_S, self._no_hello, channel)
        try:
            await channel.run()
            await _flush(writer)
        finally:
            deadline.cancel()
            self._connected -= 1
            self._left(channel)

    def received(self, channel: Channel, message: control.FromNode) -> None:
        """Dispatch; raises ControlError when the channel shall end."""
        if isinstance(message, control.Hello):
            self._hello(channel, message)
        elif not channel.greeted:
            raise control.ControlError("the first message was not Hello")
        elif isinstance(message, control.Announce):
            self._announce(channel, message.announcement)
        elif isinstance(message, control.Connect):
            self._connect(channel, message)
        elif isinstance(message, control.Ping):
            channel.send(control.Pong(message.number, self.tickets.joined))
        elif isinstance(message, control.Revocations):
            self._brought_revocations(message.signed)

    def take_ticket(self, sock: socket.socket, ticket: bytes) -> None:
        """A connection has shown a ticket: it waits for its other half, or is joined with it now."""
        try:
            redeemed = self.tickets.redeem(ticket, time.monotonic())
        except PairRefused as error:
            self.counters[f"ticket-{error.reason_code}"] += 1
            refuse_half(sock, error.message)
            return
        pair = redeemed.pair
        if pair.stage is Stage.HALF:
            self._halves[pair.number] = (redeemed.side, sock)
            self._watch_half(pair, sock)
            return
        _, other = self._halves.pop(pair.number)
        asyncio.get_running_loop().remove_reader(other.fileno())
        asker, peer = (sock, other) if redeemed.side == "asker" else (other, sock)
        self._join(pair, asker, peer)

    def adopt_revocations(self, signed: bytes) -> bool:
        """Take a signed list; if it is newer, put out whom it names, at once, and tell everybody."""
        if self.registry.adopt(signed) is None:
            return False
        self.counters["revocation-lists"] += 1
        revoked = self.registry.revoked_serials
        for channel in list(self.channels.values()):
            channel.outbox.mark_revocations()
            channel.kick()
            if channel.serial in revoked:
                log.warning("node revoked", node=channel.node)
                self.counters["revoked-channels"] += 1
                channel.send(control.Revocations(signed))
                channel.close("revoked", "the certificate is revoked")
                self._end_pairs(channel.node)
        return True

    def _hello(self, channel: Channel, message: control.Hello) -> None:
        if message.node != channel.node:
            raise control.ControlError(f"the certificate names {channel.node}, not {message.node[:80]}")
        if message.version != control.VERSION:
            raise control.ControlError(f"protocol version {message.version}; this relay speaks {control.VERSION}")
        if channel.greeted:
            raise control.ControlError("a second Hello")
        channel.greeted = True
        before = self.channels.get(channel.node)
        if before is not None:
            before.close("replaced", "the node opened a newer channel")
        self.channels[channel.node] = channel
        self.counters["channels"] += 1
        channel.send(control.Welcome(self.name, channel.observed))
        if message.revocations < self.registry.revocations.number:
            channel.outbox.mark_revocations()
        channel.outbox.mark_everything(self.registry, tuple(self.channels), channel.node)
        for other in self.channels.values():
            if other is not channel:
                other.outbox.mark_presence(channel.node, True)
                other.kick()
        if message.announcement:
            self._announce(channel, message.announcement)
        log.info("node here", node=channel.node, observed=channel.observed)

    def _announce(self, channel: Channel, signed: bytes) -> None:
        known = self.registry.nodes.get(channel.node)
        if known is not None and known.signed == signed:
            return  # the same one again, after a reconnect
        try:
            opened = self.registry.accept(signed, now_s=time.time())
        except Stale as error:
            self.counters["announcement-stale"] += 1
            channel.send(control.AnnouncementRefused(error.message, self.registry.known_sequence(channel.node)))
            return
        except IsthmusError as error:
            self.counters["announcement-refused"] += 1
            channel.send(control.AnnouncementRefused(error.message))
            return
        # Signed with the certificate's key: after a renewal this is the certificate that the channel stands for.
        channel.serial = self.registry.nodes[channel.node].serial
        channel.expires_s = self.registry.nodes[channel.node].expires_s
        for other in self.channels.values():
            if other.node != opened.node:
                other.outbox.mark(opened.node)
                other.kick()

    def _connect(self, channel: Channel, message: control.Connect) -> None:
        peer = self.channels.get(message.node)
        if peer is None:
            code = "absent" if message.node in self.registry.nodes else "unknown-node"
            self._refuse(
                channel, message.request, code, f"node {message.node[:80]} has no channel to relay {self.name}"
            )
        elif message.mode is control.Mode.REVERSE:
            self._reverse(channel, peer, message.request)
        else:
            self._relayed(channel, peer, message.request)

    def _reverse(self, channel: Channel, peer: Channel, request: int) -> None:
        known = self.registry.nodes.get(channel.node)
        addresses = known.announcement.addresses if known else ()
        if not addresses:
            self._refuse(channel, request, "no-address", f"node {channel.node} announced no address to be dialled")
            return
        peer.send(control.ReversePlease(channel.node, addresses))
        channel.send(control.Asked(request))
        self.counters["reverse-asked"] += 1

    def _relayed(self, channel: Channel, peer: Channel, request: int) -> None:
        try:
            pair = self.tickets.issue(channel.node, peer.node, time.monotonic())
        except PairRefused as error:
            self._refuse(channel, request, error.reason_code, error.message)
            return
        valid_s = self.limits.pairing_s
        channel.send(control.Ticket(request, peer.node, pair.tickets["asker"], valid_s))
        peer.send(control.Ticket(0, channel.node, pair.tickets["peer"], valid_s))
        self.counters["tickets"] += 1

    def _refuse(self, channel: Channel, request: int, code: str, reason: str) -> None:
        self.counters[f"connect-{code}"] += 1
        channel.send(control.Refused(request, code, reason))

    def _brought_revocations(self, signed: bytes) -> None:
        try:
            if self.adopt_revocations(signed):
                for call in self._revocations_changed:
                    call(signed)
        except IsthmusError as error:
            raise control.ControlError(f"a revocation list that is none: {error.message}") from error

    def _no_hello(self, channel: Channel) -> None:
        if not channel.greeted:
            self.counters["no-hello"] += 1
            channel.close("no-hello", "no Hello came")

    def _left(self, channel: Channel) -> None:
        if not channel.greeted:
            return
        self.counters[f"channel-{channel.why or 'broken'}"] += 1
        if self.channels.get(channel.node) is not channel:
            return
        del self.channels[channel.node]
        log.info("node gone", node=channel.node, why=channel.why)
        for other in self.channels.values():
            other.outbox.mark_presence(channel.node, False)
            other.kick()

    def _watch_half(self, pair: Pair, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()

        def readable() -> None:
            loop.remove_reader(sock.fileno())
            try:
                waiting = bool(sock.recv(1, socket.MSG_PEEK))
            except BlockingIOError:
                self._watch_half(pair, sock)
                return
            except OSError:
                waiting = False
            if not waiting:  # bytes stay in the socket, bounded by its receive buffer; an end is final
                self.counters["half-left"] += 1
                self._drop(pair.number)

        loop.add_reader(sock.fileno(), readable)

    def _join(self, pair: Pair, asker: socket.socket, peer: socket.socket) -> None:
        assert self._joiner is not None
        try:
            asker.send(ACCEPTED, socket.MSG_DONTWAIT)
            peer.send(ACCEPTED, socket.MSG_DONTWAIT)
        except OSError:
            self.counters["half-broken"] += 1
            self.tickets.forget(pair.number)
            asker.close()
            peer.close()
            return
        self.counters["joined"] += 1
        self._joiner.join(pair.number, asker, peer)

    def _pair_ended(self, number: int, to_peer: int, to_asker: int, why: str) -> None:
        self.counters["bytes"] += to_peer + to_asker
        self.counters[f"pair-{why}"] += 1
        self.tickets.forget(number)

    def _expire_pairs(self) -> None:
        for pair in self.tickets.expire(time.monotonic()):
            self.counters["pairing-timeout"] += 1
            self._drop_half(pair.number, f"node {pair.node('peer')} did not come within {self.limits.pairing_s:.0f} s")

    def _expire_certificates(self, now_s: float) -> None:
        """An expired certificate ends no channel, for the issuer may be down; after the grace no list names it."""
        self.registry.expire(now_s)
        for channel in list(self.channels.values()):
            if now_s > channel.expires_s + identity.GRACE_S:
                channel.close("certificate", "the certificate expired long ago")

    def _end_pairs(self, node: str) -> None:
        assert self._joiner is not None
        for pair in self.tickets.forget_node(node):
            if pair.stage is Stage.JOINED:
                self._joiner.abort(pair.number)
            else:
                self._drop_half(pair.number, "the other node is revoked")

    def _drop(self, number: int) -> None:
        self.tickets.forget(number)
        self._drop_half(number, "the other half left")

    def _drop_half(self, number: int, reason: str) -> None:
        half = self._halves.pop(number, None)
        if half is not None:
            asyncio.get_running_loop().remove_reader(half[1].fileno())
            refuse_half(half[1], reason)


def _ssl(writer: asyncio.StreamWriter) -> ssl.SSLObject:
    found: ssl.SSLObject = writer.get_extra_info("ssl_object")
    return found


def _expiry_s(writer: asyncio.StreamWriter) -> float:
    return identity.expiry_s(identity.load_certificate(_ssl(writer).getpeercert(binary_form=True) or b""))


async def _flush(writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(1.0):
            writer.close()
            await writer.wait_closed()
    except (OSError, TimeoutError):
        pass
