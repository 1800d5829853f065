"""The process ``isthmus relay``: settings in, a served port out, until it is told to stop."""

import asyncio
import contextlib
import ipaddress
import os
import resource
import socket
import ssl
import time
from collections import Counter
from pathlib import Path
from typing import Any

import structlog

from isthmus import __version__
from isthmus.files import make_private_directory
from isthmus.model.errors import IsthmusError, UsageError
from isthmus.model.settings import RelaySettings
from isthmus.relay.authority import Authority
from isthmus.relay.channel import Channel
from isthmus.relay.credentials import Credentials, Snapshot, State
from isthmus.relay.door import STRANGERS, Door
from isthmus.relay.enrol import split_address
from isthmus.relay.issuer import Issuer
from isthmus.relay.keystore import KeyStore, Stored
from isthmus.relay.server import Limits, Relay
from isthmus.relay.status import SOCKET_NAME, ChannelRow, RelayReport, StatusSocket, open_descriptors
from isthmus.wire import control, enrolment, identity, tls
from isthmus.wire.identity import Holder, Role
from isthmus.wire.registry import Registry

log = structlog.get_logger(__name__)

WATCH_S = 0.5
DESCRIPTORS_KEPT = 64  # files, the authority, status
RETRY_OWN_S = 1.0


class Service:
    """One relay process. With an authority it also issues; without one it is enrolled like a node."""

    def __init__(self, settings: RelaySettings, *, authority: Authority | None, relays: bool = True) -> None:
        """``relays`` False: only the issuer (``isthmus ca serve``)."""
        self._settings = settings
        self._authority = authority
        self._relays = relays
        self._life_s = settings.certificate_hours * 3600
        self.counters: Counter[str] = Counter()
        self._store = KeyStore(Path(settings.state_directory) / "identity")
        self._context: ssl.SSLContext | None = None
        self._stored: Stored | None = None
        self._error = ""
        self._relay: Relay | None = None
        self._door: Door | None = None
        self._started_s = time.time()
        self._ready = asyncio.Event()
        self._credentials = Credentials(
            self._store,
            Holder(Role.RELAY, settings.name),
            issuers=[settings.issuer_address] if settings.issuer_address else [],
            token=self._token,
            changed=self._use,
            revoked=self._list_came,
            poll_revocations=lambda: True,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``. Raises IsthmusError where the port cannot be had."""
        make_private_directory(Path(self._settings.state_directory))
        run_directory = Path(self._settings.run_directory)
        make_private_directory(run_directory)
        listener = listen(self._settings.listen)
        status = StatusSocket(run_directory / SOCKET_NAME, self.report)
        try:
            await status.open()
            async with asyncio.TaskGroup() as tasks:
                stopped = tasks.create_task(stop.wait(), name="stop")
                own = tasks.create_task(self._keep_own(stop), name="own-certificate")
                ready = tasks.create_task(self._ready.wait(), name="ready")
                await asyncio.wait((stopped, ready), return_when=asyncio.FIRST_COMPLETED)
                ready.cancel()
                if not stop.is_set():
                    await self._serve(listener, tasks, stop)
                own.cancel()
        finally:
            listener.close()
            await status.close()

    async def _serve(self, listener: socket.socket, tasks: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        assert self._stored is not None
        issuer = self._issuer()
        if self._relays:
            ranges = [ipaddress.ip_network(text) for text in self._settings.service_cidrs]
            registry = Registry(self._stored.authority, service_ranges=ranges)
            self._relay = Relay(self._settings.name, registry, self._limits(), self.counters)
            self._relay.on_revocations(self._keep_list)
            if signed := self._store.revocations():
                self._relay.adopt_revocations(signed)
            tasks.create_task(self._relay.run(stop), name="relay")
        if self._authority is not None:
            self._read_list()
            tasks.create_task(self._watch(stop), name="watch-revocations")
        self._door = Door(
            listener,
            context=lambda: self._context,
            on_control=self._relay.serve_control if self._relay else None,
            on_enrol=issuer.serve if issuer else None,
            on_ticket=self._relay.take_ticket if self._relay else None,
            counters=self.counters,
            strangers=min(STRANGERS, _descriptor_limit() // 4),
        )
        self._door.open()
        log.info("relay listens", name=self._settings.name, listen=self._settings.listen, issuer=issuer is not None)
        await stop.wait()
        await self._door.close()
        log.info("relay stops", name=self._settings.name)

    def report(self) -> RelayReport:
        """The relay's state, for a person."""
        own, relay = self._own(), self._relay
        return RelayReport(
            name=self._settings.name,
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_s,
            listen=self._settings.listen,
            issuer=self._authority is not None,
            state=own.state,
            serial=own.serial,
            expires_at=own.expires_s,
            error=own.error,
            nodes=[self._row(relay, channel) for channel in relay.channels.values()] if relay else [],
            announced=len(relay.registry.nodes) if relay else 0,
            joined=relay.tickets.joined if relay else 0,
            pending=relay.tickets.pending if relay else 0,
            strangers=self._door.strangers if self._door else 0,
            revocation_list=relay.registry.revocations.number if relay else 0,
            revoked=len(relay.registry.revoked_serials) if relay else 0,
            descriptors=open_descriptors(),
            counters=dict(sorted(self.counters.items())),
        )

    async def metrics(self) -> dict[str, dict[str, Any]]:
        """The numbers of the report, for a scraper: ``isthmus_relay_NAME`` and ``isthmus_relay_events{reason}``."""
        now = self.report()
        numbers = {
            "nodes": len(now.nodes),
            "announced": now.announced,
            "joined": now.joined,
            "pending": now.pending,
            "strangers": now.strangers,
            "revoked": now.revoked,
            "descriptors": now.descriptors,
            "certificate_ends": now.expires_at,
        }
        return {"relay": {**numbers, "events": now.counters}}

    @staticmethod
    def _row(relay: Relay, channel: Channel) -> ChannelRow:
        streams = relay.tickets.streams_of(channel.node)
        return ChannelRow(channel.node, channel.observed, channel.serial, channel.since_s, streams)

    def _own(self) -> Snapshot:
        if self._authority is None:
            return self._credentials.snapshot()
        if self._stored is None:
            return Snapshot(State.NONE, error=self._error)
        expires_s = identity.expiry_s(self._stored.certificate)
        state = State.EXPIRED if time.time() > expires_s else State.VALID
        return Snapshot(state, self._stored.serial, expires_s, error=self._error)

    async def _keep_own(self, stop: asyncio.Event) -> None:
        """Keep our own certificate valid: from the authority beside us, or like a node."""
        if self._authority is None:
            if (stored := self._credentials.load()) is not None:
                self._use(stored)
            await self._credentials.run(stop)
            return
        while not stop.is_set():
            pause_s = RETRY_OWN_S
            try:
                stored = await asyncio.to_thread(self._issue_own, self._authority)
                self._use(stored)
                pause_s = max(RETRY_OWN_S, identity.renewal_time_s(stored.certificate) - time.time())
                self._error = ""
            except IsthmusError as error:
                self._error = str(error)
                log.error("own certificate not issued", error=str(error))
                if self._stored is None:
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await stop.wait()

    def _issue_own(self, authority: Authority) -> Stored:
        self._store.prepare()
        name = self._settings.name
        roles = (Role.RELAY, Role.ISSUER) if self._relays else (Role.ISSUER,)
        holders = tuple(Holder(role, name) for role in roles)
        key = self._store.pending_key()
        certificate = authority.issue_local(key, holders, now_s=time.time(), life_s=self._life_s)
        return self._store.install(certificate, authority.certificate)

    def _use(self, stored: Stored) -> None:
        self._stored = stored
        self._context = tls.server_context(stored.files, (control.ALPN, enrolment.ALPN), client_optional=True)
        self._ready.set()

    def _issuer(self) -> Issuer | None:
        if self._authority is None:
            return None
        return Issuer(self._authority, life_s=self._life_s, counters=self.counters)

    def _limits(self) -> Limits:
        spare = _descriptor_limit() * 3 // 4 - DESCRIPTORS_KEPT
        return Limits(
            streams_per_node=self._settings.streams_per_node,
            pairs=max(16, spare // 3),
            pairing_s=self._settings.pairing_timeout_s,
            outbox_bytes=self._settings.waiting_bytes,
            channels=max(16, spare // 4),
        )

    async def _watch(self, stop: asyncio.Event) -> None:
        """`isthmus node revoke` replaces one file. Looking at it twice a second costs less than a watcher thread."""
        assert self._authority is not None
        seen = _stamp(self._authority.revocation_file)
        while not stop.is_set():
            now = _stamp(self._authority.revocation_file)
            if now != seen:
                seen = now
                self._read_list()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await stop.wait()

    def _read_list(self) -> None:
        assert self._authority is not None
        try:
            signed = self._authority.revocations()
            if self._relay is not None and self._relay.adopt_revocations(signed):
                self._store.keep_revocations(signed)
        except IsthmusError as error:
            log.error("revocation list not read", error=str(error))

    def _list_came(self, signed: bytes) -> None:
        """Our issuer answered with a newer list."""
        if self._relay is not None:
            self._relay.adopt_revocations(signed)

    def _keep_list(self, signed: bytes) -> None:
        """A node brought a newer list; ours may be an older one after a restart from a backup."""
        with contextlib.suppress(IsthmusError):
            self._store.keep_revocations(signed)

    def _token(self) -> str:
        path = Path(self._settings.token_file or Path(self._settings.state_directory) / "token")
        try:
            return path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""


def listen(address: str) -> socket.socket:
    """A bound, non-blocking socket; ``[::]`` takes IPv4 too. Raises UsageError."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise UsageError(
            f"could not listen on {address}: {error.strerror}", hint="set `listen` to a free address of this machine"
        ) from error
    return sock


def open_authority(settings: RelaySettings) -> Authority | None:
    """The authority beside this relay; None where the settings say that the issuer is elsewhere. Raises."""
    return Authority(Path(settings.ca_directory)) if settings.issuer else None


def _descriptor_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)
