"""What the local API answers: the values of wire/local.py, from what the agent, its workers and the kernel say now."""

import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from isthmus import __version__
from isthmus.agent.rules import rule_rows
from isthmus.agent.workers import WorkerSilent
from isthmus.model.errors import IsthmusError
from isthmus.model.findings import Finding
from isthmus.plan.paths import PathKind
from isthmus.plan.queries import relevant
from isthmus.plan.serving import Member, ServicePlan
from isthmus.store.change import Origin
from isthmus.wire.local import (
    EndpointRow,
    EndpointState,
    Facts,
    LinkRow,
    PeerStatus,
    RelayStatus,
    RuleRow,
    ServiceRow,
    Status,
    StoreStatus,
    TroubleRow,
)

if TYPE_CHECKING:
    from isthmus.agent.agent import Agent

Arguments = dict[str, str]
_states = msgspec.msgpack.Decoder(list[EndpointState])
MAX_TEXTS = 100


class Answers:
    """One method a question of the local API."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent

    def by_name(self, name: str) -> Callable[[Arguments], Awaitable[Any]]:
        """The method that answers ``name``."""
        method: Callable[[Arguments], Awaitable[Any]] = getattr(self, name)
        return method

    async def status(self, _: Arguments) -> Status:
        """How the node is."""
        agent = self._agent
        interception = await agent.interceptor.status()
        troubles = agent.troubles.rows(
            self._identity_trouble(),
            *self._worker_troubles(),
            TroubleRow("interception.failed", "error", interception.error) if interception.error else None,
            findings=self._findings(),
        )
        links = await self._links()
        return Status(
            node=agent.settings.node,
            site=agent.serving.me.site,
            version=__version__,
            pid=os.getpid(),
            started_at=agent.started_at,
            boot_id=agent.boot_id,
            healthy=not any(row.severity == "error" for row in troubles),
            store=self._store(),
            interception=interception,
            identity=agent.identity.status(),
            workers=[process.status() for process in agent.workers],
            relays=[
                RelayStatus(one.name, one.address, one.connected, one.rtt_ms, one.observed, one.error)
                for one in agent.control.relays()
            ],
            peers=with_connections(agent.peers.rows(), links),
            counters=await self.counters(),
            troubles=troubles,
        )

    async def services(self, _: Arguments) -> list[ServiceRow]:
        """One row a service."""
        return [_service_row(plan) for plan in self._agent.serving.plans.values()]

    async def endpoints(self, _: Arguments) -> list[EndpointRow]:
        """One row an endpoint of a service."""
        known: dict[tuple[str, str, str], list[EndpointState]] = {}
        for state in await self._endpoint_states() or ():
            known.setdefault((state.service, state.node, state.address), []).append(state)
        return [
            _endpoint_row(plan, member, known.get((plan.full_name, member.node, member.address), []))
            for plan in self._agent.serving.plans.values()
            for member in plan.members
        ]

    async def links(self, _: Arguments) -> list[LinkRow]:
        """One row a connection to another node, and one for each peer without any."""
        links = await self._links()
        rows = [_link_row(link) for link in links]
        linked = {row.node for row in rows}
        for peer in self._agent.peers.rows():
            if peer.node not in linked:
                path = peer.paths[0] if peer.paths else "none"
                rows.append(LinkRow(peer.node, path.split(" ")[0], "", "", "no connection", 0, 0, 0, 0.0, ""))
        return rows

    async def rules(self, _: Arguments) -> list[RuleRow]:
        """One row a rule or element of ours in the kernel."""
        return rule_rows(await self._agent.interceptor.read(), self._agent.interceptor.plan)

    async def connections(self, _: Arguments) -> Any:
        """The intercepted connections that are open."""
        return msgspec.msgpack.decode(await self._agent.data.ask("connections"))

    async def facts(self, arguments: Arguments) -> Facts:
        """What ``trace`` needs."""
        agent, serving = self._agent, self._agent.serving
        destination, namespace = arguments.get("destination", ""), arguments.get("namespace", "")
        services = relevant(serving.plans.values(), destination, namespace)
        names = {plan.full_name for plan in services}
        states = await self._endpoint_states()
        cluster = serving.cluster
        keys = [key for key in cluster.services if f"{key.namespace}/{key.name}" in names]
        stored = [cluster.services[key] for key in keys] + [piece for key in keys for piece in cluster.slices_of(key)]
        return Facts(
            me=serving.me,
            own=agent.peers.own(serving.me),
            now_s=time.time(),
            settings=agent.settings,
            services=services,
            pods=tuple(pod for pod in cluster.pods.values() if pod.node == agent.settings.node),
            nodes=dict(serving.nodes),
            peers=agent.peers.facts(),
            interception=await agent.interceptor.status(),
            planned=agent.interceptor.plan,
            rules=await self._or_none(self.rules({})),
            endpoints=None if states is None else tuple(state for state in states if state.service in names),
            links=await self._or_none(self.links({})),
            identity=agent.identity.status(),
            places={str(thing.key): str(thing.source) for thing in (*stored, *cluster.nodes.values())},
        )

    async def counters(self) -> dict[str, dict[str, Any]]:
        """Everything that is counted, by area; a worker that is silent is left out."""
        counted: dict[str, dict[str, Any]] = {"store": msgspec.to_builtins(self._agent.change.counters)}
        for area, process in (("data", self._agent.data), ("dns", self._agent.dns)):
            try:
                counted[area] = msgspec.msgpack.decode(await process.ask("counters"))
            except WorkerSilent:
                continue
        return counted

    async def _endpoint_states(self) -> list[EndpointState] | None:
        try:
            return _states.decode(await self._agent.data.ask("endpoints"))
        except WorkerSilent:
            return None

    async def _links(self) -> list[dict[str, Any]]:
        try:
            links: list[dict[str, Any]] = msgspec.msgpack.decode(await self._agent.data.ask("links"))
        except WorkerSilent:
            return []
        return links

    async def _or_none(self, question: Awaitable[list[Any]]) -> tuple[Any, ...] | None:
        try:
            return tuple(await question)
        except IsthmusError:
            return None

    def _store(self) -> StoreStatus:
        agent, cluster = self._agent, self._agent.serving.cluster
        findings = self._findings()
        problems = [str(finding) for finding in findings if finding.is_problem]
        notes = [str(finding) for finding in findings if not finding.is_problem]
        objects = {
            "service": len(cluster.services),
            "node": len(cluster.nodes),
            "pod": len(cluster.pods),
            "namespace": len(cluster.namespaces),
        }
        offline = agent.change.origin is Origin.OFFLINE_COPY
        path = agent.settings.store
        return StoreStatus(path, objects, problems[:MAX_TEXTS], notes[:MAX_TEXTS], offline, agent.changed_at)

    def _identity_trouble(self) -> TroubleRow | None:
        """A node that nothing tells where to enrol may live alone; with other nodes about, it should be known."""
        agent = self._agent
        trouble = agent.identity.trouble()
        if trouble is None:
            return None
        code, severity, text = trouble
        if agent.settings.relays or agent.settings.issuer:
            return TroubleRow(code, severity, text)
        return TroubleRow(code, "warning", f"{text}; other nodes cannot be reached") if agent.serving.nodes else None

    def _findings(self) -> list[Finding]:
        """What reading and planning found."""
        planned = self._agent.serving.findings.values()
        return [*self._agent.change.findings, *(finding for findings in planned for finding in findings)]

    def _worker_troubles(self) -> list[TroubleRow]:
        return [
            TroubleRow(f"worker.{process.name}", "error", f"the {process.name} worker is {status.state}")
            for process in self._agent.workers
            if (status := process.status()).state != "ready"
        ]


def with_connections(peers: list[PeerStatus], links: list[dict[str, Any]]) -> list[PeerStatus]:
    """The peers with their open connections counted, and the ways in use before the others."""
    used: dict[str, list[str]] = {}
    for link in links:
        way = f"{link['kind']} {link['address']}" if link["kind"] == PathKind.DIRECT else link["kind"]
        used.setdefault(link["peer"], []).append(way)
    return [_in_use_first(peer, tuple(used.get(peer.node, ()))) for peer in peers]


def _in_use_first(peer: PeerStatus, ways: tuple[str, ...]) -> PeerStatus:
    paths = sorted(peer.paths, key=lambda path: not path.startswith(ways))
    return msgspec.structs.replace(peer, connections=len(ways), paths=paths)


def _service_row(plan: ServicePlan) -> ServiceRow:
    shown = [plan.external_name] if plan.external_name else [m.visible_address for m in plan.members]
    return ServiceRow(
        namespace=plan.namespace,
        name=plan.name,
        kind=plan.kind,
        addresses=list(plan.cluster_ips) or [address for address in shown if address],
        ports=[f"{port.port}/{port.protocol}" for port in plan.ports],
        endpoints=len(plan.members),
        ready=sum(member.ready for member in plan.members),
        balance=plan.balance,
        state=f"ignored: {plan.ignored}" if plan.ignored else "served",
        origin=plan.origin,
    )


def _endpoint_row(plan: ServicePlan, member: Member, states: list[EndpointState]) -> EndpointRow:
    return EndpointRow(
        namespace=plan.namespace,
        name=plan.name,
        node=member.node,
        address=member.address,
        visible_address=member.visible_address,
        ports=[f"{name}={port}" if name else str(port) for name, port in member.ports.items()],
        distance=member.distance.name.lower().replace("_", "-"),
        ready=member.ready,
        resting=any(state.rest_s > 0 for state in states),
        connections=sum(state.connections for state in states),
        pod=member.pod,
    )


def _link_row(link: dict[str, Any]) -> LinkRow:
    return LinkRow(
        node=link["peer"],
        path=link["kind"],
        address=link["address"],
        relay=link["relay"],
        state=link["state"],
        streams=link["streams"],
        bytes_out=link["sent_bytes"],
        bytes_in=link["received_bytes"],
        age_s=link["age_s"],
        tls=link["tls"],
    )
