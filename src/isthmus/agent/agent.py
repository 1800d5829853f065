"""The control process: store, plans, kernel, identity, relays and workers, put together.

Level, not edge: events mark keys as dirty in the work queue; one task works on them and retries what fails. At the
start and every period everything is compared again, so start-up is the same code.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Iterable
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path

import msgspec
import structlog

from isthmus import __version__
from isthmus.agent.alone import hold_alone
from isthmus.agent.answers import Answers
from isthmus.agent.api import LocalApi
from isthmus.agent.identity import NodeIdentity
from isthmus.agent.interceptor import Interceptor
from isthmus.agent.metrics import Metrics
from isthmus.agent.peers import Peers
from isthmus.agent.queue import WorkQueue
from isthmus.agent.serving import Serving
from isthmus.agent.troubles import Troubles
from isthmus.agent.workers import WorkerProcess
from isthmus.files import make_private_directory, read_if_there, write_private
from isthmus.kernel.addresses import local_addresses, reachable_addresses
from isthmus.link.control import ControlClient
from isthmus.model.cluster import Key
from isthmus.model.errors import IsthmusError
from isthmus.model.settings import AgentSettings
from isthmus.plan.nodes import NodeFacts
from isthmus.plan.serving import ServiceKind
from isthmus.plan.virtual import VirtualRecord
from isthmus.store.change import Change
from isthmus.store.directory import DirectoryStore
from isthmus.wire import worker
from isthmus.wire.announcement import Announcement
from isthmus.wire.local import QUESTIONS, SOCKET_NAME
from isthmus.wire.tls import TlsFiles

log = structlog.get_logger(__name__)

COMPARE_EVERY_S = 10.0
START_S = 10.0
VIRTUAL_FILE = "virtual.msgpack"
OFFLINE_FILE = "store.msgpack"

_virtual_decoder = msgspec.msgpack.Decoder(tuple[VirtualRecord, ...])


class Work(StrEnum):
    """What the work queue holds; a peer is ``peer:NAME``."""

    INTERCEPTION = "interception"
    VIRTUAL = "virtual"
    ANNOUNCEMENT = "announcement"
    PEER = "peer:"


class Agent:
    """One node's agent. ``run`` serves until ``stop``; everything is on one event loop."""

    def __init__(self, settings: AgentSettings, token: str = "") -> None:
        self.settings = settings
        self.started_at = time.time()
        self.state = Path(settings.state_directory)
        self.boot_id = ""
        self.troubles = Troubles()
        self.change = Change()
        self.changed_at = 0.0
        self._excepted: set[Key] = set()
        self.queue: WorkQueue[str] = WorkQueue(time.monotonic)
        make_private_directory(self.state)
        self._alone = hold_alone(self.state)
        self.serving = Serving(settings, self._publish, time.time, self._virtual_records())
        self.interceptor = Interceptor(settings, self.state)
        self.data = WorkerProcess("data", "isthmus.agent.data_worker", self._data_config, self._welcome, self._heard)
        self.dns = WorkerProcess("dns", "isthmus.dns.worker", self._dns_config, self._welcome_dns, self._heard)
        ranges = [ip_network(text) for text in settings.intercept.service_cidrs]
        self.control = ControlClient(settings.node, settings.relays, self, service_ranges=ranges)
        self.identity = NodeIdentity(
            settings,
            changed=self._credentials,
            revocations=self.control.adopt_revocations,
            has_channel=lambda: any(relay.connected for relay in self.control.relays()),
            token=token,
        )
        self.peers = Peers(settings, self.data.send, self.control.relays, time.time)
        self.workers = (self.data, self.dns)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``, then take the interception out and end the workers."""
        self.boot_id = (await asyncio.to_thread(Path(self.settings.boot_id_file).read_text)).strip()
        await self.interceptor.probe(self.boot_id)
        stores = DirectoryStore(self.settings.store, self.state / OFFLINE_FILE).changes(stop)
        self._take(await anext(stores))
        gc.collect()
        gc.freeze()  # the cluster stays: walking it again and again would hold up changes
        self.identity.start()
        log.info("agent starts", version=__version__, services=len(self.serving.plans))
        async with asyncio.TaskGroup() as tasks:
            for process in self.workers:
                tasks.create_task(process.run(stop), name=f"worker {process.name}")
            tasks.create_task(self._follow(stores), name="store")
            tasks.create_task(self._work(), name="work")
            tasks.create_task(self._compare(stop), name="compare")
            tasks.create_task(self.identity.run(stop), name="identity")
            tasks.create_task(self.control.run(stop), name="relays")
            tasks.create_task(self._serve(stop), name="api")
            await stop.wait()
            self.queue.close()
        log.info("agent stopped")

    async def _serve(self, stop: asyncio.Event) -> None:
        """Once the workers listen: intercept, then answer on the socket and for the scraper."""
        ready = asyncio.gather(*(process.ready.wait() for process in self.workers))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ready, START_S)
        self.interceptor.active = True
        await self._attempt(Work.INTERCEPTION)
        answers = Answers(self)
        by_name = {name: answers.by_name(name) for name in QUESTIONS}
        api = LocalApi(Path(self.settings.run_directory) / SOCKET_NAME, by_name)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(api.run(stop), name="socket")
            if self.settings.metrics:
                tasks.create_task(Metrics(self.settings.metrics, answers.counters).run(stop), name="metrics")
        await asyncio.to_thread(self.interceptor.remove)

    # The store.

    async def _follow(self, stores: AsyncIterator[Change]) -> None:
        async for change in stores:
            self._take(change)

    def _take(self, change: Change) -> None:
        self.change, self.changed_at = change, time.time()
        before = self.serving.me
        nodes = self.serving.change((*change.put, *change.moved), change.dropped)
        for name in nodes:
            self._known(name)
        if self.serving.me != before:
            self.queue.add(Work.ANNOUNCEMENT)
            self._rank_all()

    def _publish(self, message: worker.PutService | worker.DropService) -> None:
        for process in self.workers:
            process.send(message)
        if self.serving.exceptional.keys() != self._excepted or (
            isinstance(message, worker.PutService) and (message.plan.ignored or message.plan.preserve_client_address)
        ):
            self._excepted = set(self.serving.exceptional)
            self.queue.add(Work.INTERCEPTION)
        if isinstance(message, worker.DropService) or message.plan.kind is ServiceKind.HEADLESS:
            self.queue.add(Work.VIRTUAL)

    def _virtual_records(self) -> tuple[VirtualRecord, ...]:
        """Allocations of an earlier run; without them pods would meet other endpoints behind the same address."""
        try:
            data = read_if_there(self.state / VIRTUAL_FILE)
            return _virtual_decoder.decode(data) if data else ()
        except (IsthmusError, msgspec.DecodeError) as error:
            self.troubles.put("virtual.unreadable", "warning", f"{self.state / VIRTUAL_FILE} cannot be used: {error}")
            return ()

    # The workers.

    def _data_config(self) -> bytes:
        return msgspec.json.encode(
            worker.DataConfig(self.settings, self.interceptor.handover, self.interceptor.by_record)
        )

    def _dns_config(self) -> bytes:
        settings = self.settings
        return msgspec.json.encode(
            worker.DnsConfig(
                listen=self.interceptor.addresses,
                dns=settings.dns,
                local_networks=(*settings.intercept.service_cidrs, *settings.virtual_cidrs),
            )
        )

    def _welcome_dns(self) -> Iterable[worker.ToWorker]:
        yield from self.serving.everything()
        yield worker.Synced()

    def _welcome(self) -> Iterable[worker.ToWorker]:
        if credentials := self.identity.message(self.control.registry):
            yield credentials
        yield self._own_announcement()
        yield from self.peers.everything()
        yield from self.serving.everything()
        yield worker.Synced()

    def _heard(self, message: worker.FromWorker) -> None:
        match message:
            case worker.NeedConnection():
                self.control.need(message)
            case worker.PathReport():
                if self.peers.report(message):
                    self.queue.add(Work.PEER + message.node)
            case worker.Heard(node, signed):
                self.control.accept(signed, f"link with {node}")
            case worker.Trouble(code, text):
                self.troubles.put(code, "warning", text)
            case _:
                pass

    # The other nodes; these are the events of ControlClient.

    def peer_announced(self, peer: Announcement) -> None:
        """As in ControlEvents."""
        self.peers.announced(peer)
        hosts = tuple(address.rpartition(":")[0].strip("[]") for address in peer.addresses)
        self.serving.announce(peer.node, NodeFacts(peer.site, peer.pod_cidrs, hosts))
        self._known(peer.node)

    def peer_gone(self, node: str, reason: str) -> None:
        """As in ControlEvents."""
        log.info("node is gone", peer=node, reason=reason)
        self.peers.gone(node, reason)
        self.serving.announce(node, None)

    def relays_changed(self) -> None:
        """As in ControlEvents."""
        self._rank_all()

    def announcement_signed(self, signed: bytes) -> None:
        """As in ControlEvents."""
        self.data.send(self._own_announcement())

    def _own_announcement(self) -> worker.Announce:
        signed = self.control.signed_announcement
        return worker.Announce((signed,) if signed else ())

    def dial(self, message: worker.Dial) -> None:
        """As in ControlEvents."""
        self.data.send(message)

    def dial_failed(self, message: worker.DialFailed) -> None:
        """As in ControlEvents."""
        self.data.send(message)

    def revoked(self, signed: bytes, serials: frozenset[str]) -> None:
        """As in ControlEvents."""
        self.identity.adopt_revocations(signed)
        self._send_credentials()

    def _known(self, node: str) -> None:
        self.peers.put_facts(node, self.serving.nodes.get(node))
        self.queue.add(Work.PEER + node)

    def _rank_all(self) -> None:
        for name in self.peers.names():
            self.queue.add(Work.PEER + name)

    # Identity.

    def _credentials(self, files: TlsFiles) -> None:
        self.control.use(files)
        self._send_credentials()
        self.queue.add(Work.ANNOUNCEMENT)

    def _send_credentials(self) -> None:
        if message := self.identity.message(self.control.registry):
            self.data.send(message)

    async def _announce(self) -> None:
        """Say who we are. ``addresses`` of the settings win over the Node object's, these over the interfaces'."""
        me, settings = self.serving.me, self.settings
        stored = self.serving.cluster.nodes.get(settings.node)
        addresses = settings.addresses or ((*stored.internal_ips, *stored.external_ips) if stored else ())
        if not addresses:
            addresses = await asyncio.to_thread(reachable_addresses, settings.intercept.device, me.pod_cidrs)
        self.peers.addresses = tuple(_with_port(address, settings.link_port) for address in addresses)
        self.control.announce(
            Announcement(settings.node, 0, 0.0, me.site, self.peers.addresses, me.pod_cidrs, self.boot_id)
        )

    # The work queue.

    async def _compare(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self.queue.add(Work.ANNOUNCEMENT)
            self.serving.tidy()
            self._rank_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), COMPARE_EVERY_S)
            self.interceptor.suspect()
            self.queue.add(Work.INTERCEPTION)

    async def _work(self) -> None:
        while (key := await self.queue.get()) is not None:
            await self._attempt(key)
            self.queue.done(key)

    async def _attempt(self, key: str) -> None:
        code = f"agent.{key.partition(':')[0]}"
        try:
            await self._do(key)
        except (IsthmusError, OSError) as error:
            delay_s = self.queue.retry(key)
            log.error("work failed", key=key, error=str(error), delay_s=delay_s)
            self.troubles.put(code, "error", str(error))
        else:
            self.queue.forget(key)
            self.troubles.put(code, "error", "")

    async def _do(self, key: str) -> None:
        match key:
            case Work.INTERCEPTION:
                if self.interceptor.active:
                    await self._intercept()
            case Work.VIRTUAL:
                await asyncio.to_thread(self._save_virtual, self.serving.pool.records())
            case Work.ANNOUNCEMENT:
                await self._announce()
            case _:
                self.peers.rank(key.removeprefix(Work.PEER), self.serving.me)

    async def _intercept(self) -> None:
        await self.interceptor.apply(tuple(self.serving.exceptional.values()), await asyncio.to_thread(local_addresses))

    def _save_virtual(self, records: tuple[VirtualRecord, ...]) -> None:
        data = msgspec.msgpack.encode(records)
        if read_if_there(self.state / VIRTUAL_FILE) != data and (records or (self.state / VIRTUAL_FILE).exists()):
            write_private(self.state / VIRTUAL_FILE, data)


def _with_port(address: str, port: int) -> str:
    """HOST:PORT; an address that has a port already keeps it."""
    if address.startswith("[") or address.count(":") == 1:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
