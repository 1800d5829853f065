"""The control channels of a node: one to every relay, kept up; what they bring, checked and handed on.

Runs in the agent's control process, on asyncio. Announcements and revocations may come over any channel and are
believed for their signatures alone. A relay is believed about who is connected to it and about tickets, nothing else.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from isthmus.files import read_private
from isthmus.link.control_channel import RelayChannel, RelayState
from isthmus.model.errors import IsthmusError
from isthmus.model.settings import RelayAddress
from isthmus.wire import announcement, control, identity
from isthmus.wire.announcement import Announcement, Network
from isthmus.wire.registry import Registry
from isthmus.wire.tls import TlsFiles, client_context
from isthmus.wire.worker import Dial, DialFailed, NeedConnection

log = structlog.get_logger(__name__)

EXPIRE_EVERY_S = 10.0
REANNOUNCE_S = 3_600.0


class ControlEvents(Protocol):
    """What the control channels tell. Called on the event loop; must not block or raise."""

    def peer_announced(self, peer: Announcement) -> None:
        """A node's announcement is new or newer."""

    def peer_gone(self, node: str, reason: str) -> None:
        """A node is revoked, or its certificate ended."""

    def relays_changed(self) -> None:
        """A relay was reached or lost, somebody came to it or left it, or its round-trip time changed: rank again."""

    def announcement_signed(self, signed: bytes) -> None:
        """Our own announcement was signed anew: for the links."""

    def dial(self, message: Dial) -> None:
        """For the data worker."""

    def dial_failed(self, message: DialFailed) -> None:
        """For the data worker."""

    def revoked(self, signed: bytes, serials: frozenset[str]) -> None:
        """A newer revocation list: keep it, and close what its serials name."""


class ControlClient:
    """All control channels of one node."""

    def __init__(
        self,
        node: str,
        relays: Sequence[RelayAddress],
        events: ControlEvents,
        *,
        service_ranges: Sequence[Network] = (),
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.node = node
        self.events = events
        self.registry: Registry | None = None
        self._ranges = tuple(service_ranges)
        self._clock = clock
        self._content: Announcement | None = None
        self._certificate: identity.Certificate | None = None
        self._key: identity.Key | None = None
        self._sequence = 0
        self._pending_list = b""
        rng = rng or random.Random()
        self._channels = {relay.name: RelayChannel(relay, self, rng) for relay in relays}
        self.signed_announcement = b""

    def use(self, files: TlsFiles) -> None:
        """Credentials are new: handshakes from now on use them, and the announcement is signed anew.

        Open channels stay. Raises IsthmusError when the files cannot be used.
        """
        certificate = identity.load_certificate(_read(files.certificate_file))
        key = identity.load_key(_read(files.key_file))
        authority = identity.load_certificate(_read(files.ca_file))
        context = client_context(files, (control.ALPN,))
        self._certificate, self._key = certificate, key
        if self.registry is None:
            self.registry = Registry(authority, service_ranges=self._ranges)
            if self._pending_list:
                self.adopt_revocations(self._pending_list)
        for channel in self._channels.values():
            channel.use(context)
        self._sign()

    def announce(self, content: Announcement) -> None:
        """Say this of us from now on; ``sequence`` and ``issued_s`` are filled in. Raises AnnouncementError."""
        announcement.check_content(_filled(content, 1, self._clock()), self._ranges)
        if self._content is not None and _filled(content, 0, 0.0) == _filled(self._content, 0, 0.0):
            return
        self._content = content
        self._sign()

    def adopt_revocations(self, signed: bytes, *, came_by: str = "") -> None:
        """Take a signed list from anywhere (file, issuer, channel); a newer one is told on. Raises IdentityError."""
        if self.registry is None:
            self._pending_list = signed
            return
        gone = self.registry.adopt(signed)
        if gone is None:
            return
        for node in gone:
            self.events.peer_gone(node, "revoked")
        self.events.revoked(signed, self.registry.revoked_serials)
        for name, channel in self._channels.items():
            if name != came_by:
                channel.send(control.Revocations(signed))

    def need(self, wanted: NeedConnection) -> None:
        """The data worker wants a connection; ``dial`` or ``dial_failed`` follows, or the peer's dialling (reverse)."""
        channel = self._channels.get(wanted.relay)
        if channel is None or not channel.connected:
            reason = f"no control channel to relay {wanted.relay or '(none)'}"
            self.events.dial_failed(DialFailed(wanted.request, wanted.node, reason))
            return
        channel.ask(wanted)

    def relays(self) -> list[RelayState]:
        """The relays as they are now."""
        return [channel.state() for channel in self._channels.values()]

    def peers(self) -> list[Announcement]:
        """The newest announcement of every other node."""
        known = self.registry.nodes.values() if self.registry else ()
        return [one.announcement for one in known if one.announcement.node != self.node]

    async def run(self, stop: asyncio.Event) -> None:
        """Keep all channels until ``stop``."""
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(channel.run(), name=f"relay {name}") for name, channel in self._channels.items()
            ]
            running.append(tasks.create_task(self._tidy(), name="announcements"))
            await stop.wait()
            for task in running:
                task.cancel()

    # From the channels.

    def accept(self, signed: Sequence[bytes], relay: str) -> None:
        """Announcements that a relay forwarded, or that came over a link; ``relay`` names either for the log."""
        if self.registry is None:
            return
        for one in signed:
            try:
                opened = self.registry.accept(one, now_s=self._clock())
            except announcement.Stale:
                continue
            except IsthmusError as error:
                log.warning("announcement refused", relay=relay, error=str(error))
                continue
            if opened.node != self.node:
                self.events.peer_announced(opened)

    def known_sequence_is(self, known: int) -> None:
        """A relay knows a higher number of ours (our clock went back): go beyond it."""
        if known >= self._sequence:
            self._sequence = known
            self._sign()

    def _sign(self) -> None:
        if self._content is None or self._certificate is None or self._key is None:
            return
        now_s = self._clock()
        self._sequence = max(self._sequence + 1, int(now_s * 1_000))
        filled = _filled(self._content, self._sequence, now_s)
        self.signed_announcement = announcement.seal(filled, self._certificate, self._key)
        self.events.announcement_signed(self.signed_announcement)
        for channel in self._channels.values():
            channel.send(control.Announce(self.signed_announcement))

    async def _tidy(self) -> None:
        signed_s = time.monotonic()
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            if self.registry is not None:
                for node in self.registry.expire(self._clock()):
                    self.events.peer_gone(node, "its certificate ended")
            if time.monotonic() - signed_s > REANNOUNCE_S:
                signed_s = time.monotonic()
                self._sign()


def _read(path: str) -> bytes:
    """A credential file's bytes."""
    return read_private(Path(path))


def _filled(content: Announcement, sequence: int, issued_s: float) -> Announcement:
    return msgspec.structs.replace(content, sequence=sequence, issued_s=issued_s)
