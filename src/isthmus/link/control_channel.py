"""One control channel, to one relay: connects, says who we are, listens, asks, and connects again when it is lost."""

import asyncio
import contextlib
import random
import ssl
import time
from typing import TYPE_CHECKING

import msgspec
import structlog

from isthmus.model.errors import IsthmusError
from isthmus.model.settings import RelayAddress
from isthmus.plan.paths import is_private
from isthmus.wire import control, tls
from isthmus.wire.worker import Dial, DialFailed, NeedConnection

if TYPE_CHECKING:
    from isthmus.link.control import ControlClient

log = structlog.get_logger(__name__)

CONNECT_DEADLINE_S = 5.0
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 5.0
FIRST_PING_S = 1.0
ASK_DEADLINE_S = 5.0
MOST_ASKED = 4_096
READ_BYTES = 65_536
RTT_SMOOTHING = 0.3
RTT_NEWS = 0.2  # share by which the time must change before it is told
MOST_UNSENT_BYTES = 8 * 1024 * 1024
REVERSE_DIALS = 3


class RelayState(msgspec.Struct, frozen=True):
    """A relay as this node sees it. ``present``: nodes with a channel to it. ``streams``: its load, joined pairs."""

    name: str
    address: str
    site: str = ""
    connected: bool = False
    rtt_ms: float = 0.0
    observed: str = ""
    error: str = ""
    streams: int = 0
    present: frozenset[str] = frozenset()


class RelayChannel:
    """Keeps one relay's channel."""

    def __init__(self, relay: RelayAddress, client: "ControlClient", rng: random.Random) -> None:
        self.relay = relay
        self._client = client
        self._rng = rng
        self._context: ssl.SSLContext | None = None
        self._usable = asyncio.Event()
        self._at_once = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._welcomed = False
        self._present: set[str] = set()
        self._observed = ""
        self._error = ""
        self._rtt_ms = 0.0
        self._told_rtt_ms = 0.0
        self._streams = 0
        self._failures = 0
        self._pings: dict[int, float] = {}
        self._number = 0
        self._asked: dict[int, tuple[NeedConnection, float]] = {}

    @property
    def connected(self) -> bool:
        """Whether the relay has welcomed us."""
        return self._welcomed

    def use(self, context: ssl.SSLContext) -> None:
        """For handshakes from now on."""
        self._context = context
        self._usable.set()
        self._at_once.set()  # what was refused with the old credentials may be welcome with these

    def state(self) -> RelayState:
        """The relay now."""
        return RelayState(
            self.relay.name,
            self.relay.address,
            self.relay.site,
            self._welcomed,
            round(self._rtt_ms, 3),
            self._observed,
            self._error,
            self._streams,
            frozenset(self._present),
        )

    def send(self, message: control.FromNode) -> None:
        """Send if the channel is up; everything that matters is said again when it comes up."""
        if self._writer is None or not self._welcomed:
            return
        if self._writer.transport.get_write_buffer_size() > MOST_UNSENT_BYTES:
            self._writer.transport.abort()  # the relay does not read
            return
        self._writer.write(control.pack(message))

    def ask(self, wanted: NeedConnection) -> None:
        """Ask the relay for tickets or for the peer's dialling."""
        mode = control.Mode.REVERSE if wanted.kind == "reverse" else control.Mode.RELAYED
        if len(self._asked) >= MOST_ASKED:
            self._failed(wanted, f"{MOST_ASKED} questions to relay {self.relay.name} wait for an answer")
            return
        self._number += 1
        self._asked[self._number] = (wanted, time.monotonic())
        self.send(control.Connect(self._number, wanted.node, mode))

    async def run(self) -> None:
        """Connect, serve, connect again; ends only by being cancelled."""
        while True:
            await self._usable.wait()
            try:
                await self._session()
            except (OSError, EOFError, TimeoutError) as error:
                self._lost(str(error) or "the connection broke")
            except IsthmusError as error:
                self._lost(str(error))
            except BaseExceptionGroup as group:
                fault = _only_expected(group)
                self._lost(str(fault) or "the connection broke")
            self._at_once.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._at_once.wait()

    def _pause_s(self) -> float:
        """0.1 s at first, at most 5 s; with jitter, so that nodes do not come back to a relay all at once."""
        base_s = min(LAST_RETRY_S, FIRST_RETRY_S * 1.5 ** (self._failures - 1))
        return base_s * self._rng.uniform(0.75, 1.25)

    async def _session(self) -> None:
        host, port = _split(self.relay.address)
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            reader, writer = await asyncio.open_connection(
                host, port, ssl=self._context, server_hostname="isthmus", ssl_handshake_timeout=CONNECT_DEADLINE_S
            )
        try:
            registry = self._client.registry
            assert registry is not None
            tls.check_peer(
                writer.get_extra_info("ssl_object"),
                wanted=self.relay.name,
                kind="relay",
                revoked=registry.revoked_serials,
            )
            self._writer = writer
            hello = control.Hello(
                control.VERSION, self._client.node, self._client.signed_announcement, registry.revocations.number
            )
            writer.write(control.pack(hello))
            async with asyncio.TaskGroup() as tasks:
                pinging = tasks.create_task(self._ping(), name=f"ping {self.relay.name}")
                try:
                    await self._listen(reader)
                finally:
                    pinging.cancel()
        finally:
            self._writer = None
            writer.transport.abort()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        messages = control.RelayReader()
        while True:
            async with asyncio.timeout(control.SILENCE_S):
                data = await reader.read(READ_BYTES)
            if not data:
                raise EOFError("the relay closed the channel")
            for message in messages.feed(data):
                self._received(message)

    async def _ping(self) -> None:
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            self._forget_unanswered()
            if self._welcomed:
                self._number += 1
                self._pings = {self._number: time.monotonic()}
                self.send(control.Ping(self._number))
                pause_s = min(control.PING_INTERVAL_S, max(FIRST_PING_S, pause_s * 2))
            else:
                pause_s = 0.05

    def _received(self, message: control.FromRelay) -> None:
        if isinstance(message, control.Welcome):
            self._welcome(message)
        elif isinstance(message, control.Announcements):
            self._client.accept(message.signed, self.relay.name)
        elif isinstance(message, control.Presence):
            self._presence(message)
        elif isinstance(message, control.Ticket):
            self._ticket(message)
        elif isinstance(message, control.ReversePlease):
            self._reverse(message)
        elif isinstance(message, control.Asked):
            self._asked.pop(message.request, None)
        elif isinstance(message, control.Refused):
            wanted = self._asked.pop(message.request, None)
            if wanted is not None:
                self._failed(wanted[0], message.reason)
        elif isinstance(message, control.AnnouncementRefused):
            self._announcement_refused(message)
        elif isinstance(message, control.Revocations):
            self._client.adopt_revocations(message.signed, came_by=self.relay.name)
        elif isinstance(message, control.Ping):
            self.send(control.Pong(message.number))
        elif isinstance(message, control.Pong):
            self._pong(message)
        elif isinstance(message, control.Goodbye):
            raise EOFError(f"the relay ended the channel: {message.reason}")

    def _welcome(self, message: control.Welcome) -> None:
        self._welcomed = True
        self._failures = 0
        self._error = ""
        self._observed = message.observed
        registry = self._client.registry
        if registry is not None and registry.signed_revocations:
            self.send(control.Revocations(registry.signed_revocations))
        if self._client.signed_announcement:
            self.send(control.Announce(self._client.signed_announcement))  # it may have changed since the Hello
        log.info("relay reached", relay=self.relay.name, observed=message.observed)
        self._client.events.relays_changed()

    def _presence(self, message: control.Presence) -> None:
        before = frozenset(self._present)
        if message.complete:
            self._present = set(message.present)
        else:
            self._present = (self._present | set(message.present)) - set(message.absent)
        if before != self._present:
            self._client.events.relays_changed()

    def _ticket(self, message: control.Ticket) -> None:
        if not message.request:
            self._dial(message.node, "relayed", self.relay.address, "server", message.ticket.hex(), 0)
            return
        wanted = self._asked.pop(message.request, None)
        if wanted is not None and wanted[0].node == message.node:
            self._dial(message.node, "relayed", self.relay.address, "client", message.ticket.hex(), wanted[0].request)

    def _reverse(self, message: control.ReversePlease) -> None:
        """The relay says who asks; TLS proves it. The addresses come from the signed announcement where we have it."""
        registry = self._client.registry
        known = registry.nodes.get(message.node) if registry else None
        if known is None:
            return  # nobody who could show a certificate that we know of
        addresses = sorted(known.announcement.addresses, key=is_private)
        for address in addresses[:REVERSE_DIALS]:
            self._dial(message.node, "reverse", address, "client", "", 0)

    def _announcement_refused(self, message: control.AnnouncementRefused) -> None:
        if message.known:
            self._client.known_sequence_is(message.known)
        else:
            self._error = f"the relay refused our announcement: {message.reason}"
            log.warning("own announcement refused", relay=self.relay.name, reason=message.reason)

    def _pong(self, message: control.Pong) -> None:
        sent_s = self._pings.pop(message.number, None)
        if sent_s is None:
            return
        rtt_ms = (time.monotonic() - sent_s) * 1_000
        self._rtt_ms = rtt_ms if not self._rtt_ms else self._rtt_ms + RTT_SMOOTHING * (rtt_ms - self._rtt_ms)
        self._streams = message.streams
        if abs(self._rtt_ms - self._told_rtt_ms) > RTT_NEWS * self._told_rtt_ms:
            self._told_rtt_ms = self._rtt_ms
            self._client.events.relays_changed()

    def _dial(self, node: str, kind: str, address: str, role: str, ticket: str, request: int) -> None:
        self._client.events.dial(Dial(node, address, kind, role, ticket, request))

    def _failed(self, wanted: NeedConnection, reason: str) -> None:
        self._client.events.dial_failed(DialFailed(wanted.request, wanted.node, reason))

    def _forget_unanswered(self) -> None:
        now_s = time.monotonic()
        late = [number for number, (_, asked_s) in self._asked.items() if now_s - asked_s > ASK_DEADLINE_S]
        for number in late:
            self._failed(self._asked.pop(number)[0], f"relay {self.relay.name} did not answer")

    def _lost(self, reason: str) -> None:
        self._failures += 1
        if self._welcomed or reason != self._error:
            log.warning("relay lost" if self._welcomed else "relay not reached", relay=self.relay.name, error=reason)
        was_connected, self._welcomed = self._welcomed, False
        self._error = reason
        self._present.clear()
        self._pings.clear()
        asked, self._asked = self._asked, {}
        for wanted, _ in asked.values():
            self._failed(wanted, f"relay {self.relay.name} was lost: {reason}")
        if was_connected:
            self._client.events.relays_changed()


def _only_expected(group: BaseExceptionGroup) -> BaseException:
    """The one fault of network or peer in a group; anything else is ours and is raised on."""
    _, unexpected = group.split((OSError, EOFError, TimeoutError, IsthmusError))
    if unexpected is not None:
        raise unexpected
    fault: BaseException = group
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    return fault


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(ValueError):
        return host.removeprefix("[").removesuffix("]"), int(port)
    raise IsthmusError(f"the address of a relay, {address!r}, is not HOST:PORT", hint="see the setting `relays`")
