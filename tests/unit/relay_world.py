"""A real relay with its authority, and real nodes' control clients, on loopback in one event loop."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from isthmus.link.control import ControlClient
from isthmus.model.settings import RelayAddress, RelaySettings
from isthmus.relay import authority
from isthmus.relay.authority import Authority
from isthmus.relay.keystore import KeyStore
from isthmus.relay.run import Service
from isthmus.wire.announcement import Announcement
from isthmus.wire.identity import Holder, Role
from isthmus.wire.ticket import AnswerReader, preamble
from isthmus.wire.tls import TlsFiles
from isthmus.wire.worker import Dial, DialFailed, NeedConnection


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def eventually(condition: Callable[[], object], deadline_s: float = 20.0) -> object:
    """Poll until the condition is true; fail after the deadline."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline_s} s"
        await asyncio.sleep(0.01)
    return value


class Recorder:
    """What a control client told, in order."""

    def __init__(self) -> None:
        self.announced: list[Announcement] = []
        self.gone: list[tuple[str, str]] = []
        self.dials: list[Dial] = []
        self.failed: list[DialFailed] = []
        self.lists: list[frozenset[str]] = []
        self.changes = 0

    def peer_announced(self, peer: Announcement) -> None:
        self.announced.append(peer)

    def peer_gone(self, node: str, reason: str) -> None:
        self.gone.append((node, reason))

    def relays_changed(self) -> None:
        self.changes += 1

    def dial(self, message: Dial) -> None:
        self.dials.append(message)

    def announcement_signed(self, signed: bytes) -> None:
        pass

    def dial_failed(self, message: DialFailed) -> None:
        self.failed.append(message)

    def revoked(self, signed: bytes, serials: frozenset[str]) -> None:
        self.lists.append(serials)


class World:
    """One authority, relays, nodes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority: Authority = authority.init(directory / "ca", "test", now_s=time.time())
        self.stop = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    def settings(self, name: str = "relay", **changes: object) -> RelaySettings:
        where = self.directory / name
        values = {
            "name": name,
            "listen": f"127.0.0.1:{free_port()}",
            "state_directory": str(where / "state"),
            "run_directory": str(where / "run"),
            "ca_directory": str(self.directory / "ca"),
        }
        return RelaySettings(**(values | changes))  # type: ignore[arg-type]

    async def relay(self, name: str = "relay", **changes: object) -> "RunningRelay":
        running = RunningRelay(self.settings(name, **changes), self.authority)
        await running.start()
        return running

    def credentials(self, node: str, life_s: float = 3600.0, role: Role = Role.NODE) -> TlsFiles:
        """Files of a fresh certificate, straight from the authority."""
        store = KeyStore(self.directory / "nodes" / node)
        store.prepare()
        key = store.pending_key()
        made = self.authority.issue_local(key, (Holder(role, node),), now_s=time.time(), life_s=life_s)
        return store.install(made, self.authority.certificate).files

    def node(self, name: str, *relays: "RunningRelay", **announced: object) -> "RunningNode":
        addresses = [RelayAddress(relay.settings.name, relay.settings.listen) for relay in relays]
        node = RunningNode(name, addresses)
        node.client.use(self.credentials(name))
        content = {"addresses": (f"192.0.2.{len(self.tasks) + 1}:20006",), "site": "home"} | announced
        node.client.announce(Announcement(name, 1, 0.0, **content))  # type: ignore[arg-type]
        node.task = asyncio.create_task(node.client.run(node.stop))
        self.tasks.append(node.task)
        return node


class RunningRelay:
    """A relay service that can be stopped and started again on its port."""

    def __init__(self, settings: RelaySettings, found: Authority | None) -> None:
        self.settings = settings
        self.authority = found if settings.issuer else None
        self.host, port = settings.listen.rsplit(":", 1)
        self.port = int(port)

    async def start(self) -> None:
        self.stop = asyncio.Event()
        self.service = Service(self.settings, authority=self.authority)
        self.task = asyncio.create_task(self.service.run(self.stop))
        await eventually(lambda: self._door_is_open() or self.task.done())
        if self.task.done():
            self.task.result()

    def _door_is_open(self) -> bool:
        return self.service._door is not None and self.service._door._open

    async def end(self) -> None:
        self.stop.set()
        await self.task

    @property
    def counters(self) -> dict[str, int]:
        return dict(self.service.counters)

    async def dial(self, ticket: bytes) -> socket.socket:
        """Present a ticket as a data worker does; returns the joined socket. Raises TicketRefused."""
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, (self.host, self.port))
            await loop.sock_sendall(sock, preamble(ticket))
            answer = AnswerReader()
            while data := await loop.sock_recv(sock, answer.missing_bytes):
                if answer.feed(data):
                    return sock
            raise EOFError("the relay closed the connection without an answer")
        except BaseException:
            sock.close()
            raise


class RunningNode:
    """A node's control client and what it told."""

    def __init__(self, name: str, relays: list[RelayAddress]) -> None:
        self.name = name
        self.told = Recorder()
        self.client = ControlClient(name, relays, self.told, rng=random.Random(1))
        self.stop = asyncio.Event()
        self.task: asyncio.Task[None]

    @property
    def connected(self) -> bool:
        return all(relay.connected for relay in self.client.relays())

    def sees(self, node: str) -> bool:
        """Whether a relay says that the node is there, and its announcement came."""
        here = any(node in relay.present for relay in self.client.relays())
        return here and any(peer.node == node for peer in self.client.peers())

    async def end(self) -> None:
        self.stop.set()
        await self.task

    def _answered(self, request: int) -> list[Dial]:
        return [dial for dial in self.told.dials if dial.request == request]

    async def pair_with(self, other: "RunningNode", relay: RunningRelay) -> tuple[socket.socket, socket.socket]:
        """Ask for a relayed connection, and dial as both workers would."""
        request = len(self.told.dials) + 1_000
        self.client.need(NeedConnection(request, other.name, "relayed", relay.settings.name))
        before = len(other.told.dials)
        await eventually(lambda: other.told.dials[before:] and self._answered(request))
        mine, theirs = self._answered(request)[0], other.told.dials[before]
        a, b = await asyncio.gather(relay.dial(bytes.fromhex(mine.ticket)), relay.dial(bytes.fromhex(theirs.ticket)))
        return a, b


@contextlib.asynccontextmanager
async def world(directory: Path) -> AsyncIterator[World]:
    """A world; nodes that still run are ended after it."""
    made = World(directory)
    try:
        yield made
    finally:
        for task in made.tasks:
            task.cancel()
        await asyncio.gather(*made.tasks, return_exceptions=True)
