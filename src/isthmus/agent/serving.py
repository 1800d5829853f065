"""From what the store says to what the workers serve: the index, the node table, the virtual addresses, the plans.

Level, not edge: a change names the services that it touches, each is planned again, and only a plan that differs from
the one sent last is sent. Nothing here decides: plan/ does.
"""

from collections.abc import Callable, Iterable
from ipaddress import ip_network

from isthmus.model.cluster import Key, Node, Object, Service
from isthmus.model.findings import Finding
from isthmus.model.index import Cluster
from isthmus.model.settings import AgentSettings
from isthmus.plan.nodes import KnownNode, Me, NodeFacts, describe_me, merge_node
from isthmus.plan.services import outside_ranges, plan_service, wanted_virtual
from isthmus.plan.serving import ServicePlan
from isthmus.plan.virtual import VirtualPool, VirtualRecord
from isthmus.wire.worker import DropService, PutService

Publish = Callable[[PutService | DropService], None]


class Serving:
    """The plans of this node. ``publish`` gets every difference; ``now_s`` is wall clock, for virtual addresses."""

    def __init__(
        self,
        settings: AgentSettings,
        publish: Publish,
        now_s: Callable[[], float],
        virtual_records: Iterable[VirtualRecord] = (),
    ) -> None:
        self._settings = settings
        self._publish = publish
        self._now_s = now_s
        self.cluster = Cluster(settings.node)
        self.pool = VirtualPool(settings.virtual_cidrs, virtual_records, now_s=now_s())
        self.plans: dict[Key, ServicePlan] = {}
        self.exceptional: dict[Key, ServicePlan] = {}
        """The few plans that bear on the kernel's rules: opted out, or preserving client addresses."""
        self.nodes: dict[str, NodeFacts] = {}
        self.known: dict[str, KnownNode] = {}
        self.findings: dict[Key, tuple[Finding, ...]] = {}
        self._announced: dict[str, NodeFacts] = {}
        self._ranges = tuple(ip_network(text) for text in settings.intercept.service_cidrs)
        self._reserved = (*settings.intercept.service_cidrs, *settings.virtual_cidrs)
        self.me: Me = describe_me(settings.node, settings.site, settings.pod_cidrs, None)

    def change(self, put: Iterable[Object], dropped: Iterable[Key]) -> frozenset[str]:
        """Take in a change of the store; return the names of the nodes whose facts changed."""
        dirty: set[Key] = set()
        nodes: set[str] = set()
        for key in dropped:
            dirty |= self.cluster.drop(key)
            if key.kind == "Node":
                nodes.add(key.name)
        for thing in put:
            dirty |= self.cluster.put(thing)
            if isinstance(thing, Node):
                nodes.add(thing.name)
        changed = frozenset(name for name in nodes if self._learn(name))
        for name in changed:
            dirty |= self._touched_by(name)
        self._plan(dirty)
        return changed

    def announce(self, name: str, facts: NodeFacts | None) -> bool:
        """Take in what a node announced of itself (None: it is gone); return whether anything changed."""
        if facts is None:
            self._announced.pop(name, None)
        else:
            self._announced[name] = facts
        if not self._learn(name):
            return False
        self._plan(self._touched_by(name))
        return True

    def tidy(self) -> None:
        """Reclaim virtual addresses whose grace is over; services that had none are planned again."""
        if self.pool.expire(self._now_s()):
            self._plan(set(self.pool.short))

    def everything(self) -> Iterable[PutService]:
        """The full state for a worker that starts."""
        return (PutService(plan) for plan in self.plans.values())

    def _touched_by(self, name: str) -> set[Key]:
        if name == self.me.node:
            return set(self.cluster.services)
        return set(self.cluster.services_on(name))

    def _learn(self, name: str) -> bool:
        stored = self.cluster.nodes.get(name)
        if name == self.me.node:
            before, settings = self.me, self._settings
            self.me = describe_me(name, settings.site, settings.pod_cidrs, stored)
            return self.me != before
        known = merge_node(name, stored, self._announced.get(name), self.me, self._reserved)
        old = self.nodes.get(name)
        if known.facts is None:
            self.nodes.pop(name, None)
            self.known.pop(name, None)
        else:
            self.nodes[name] = known.facts
            self.known[name] = known
        return known.facts != old

    def _plan(self, keys: Iterable[Key]) -> None:
        for key in keys:
            service = self.cluster.services.get(key)
            if service is None:
                self._forget(key)
            else:
                self._plan_one(key, service)

    def _plan_one(self, key: Key, service: Service) -> None:
        slices = self.cluster.slices_of(key)
        wanted = wanted_virtual(service, slices, self.nodes, self.me)
        findings = (*self.pool.want(key, wanted, self._now_s()), *outside_ranges(service, self._ranges))
        if findings:
            self.findings[key] = findings
        else:
            self.findings.pop(key, None)
        plan = plan_service(service, slices, self.nodes, self.me, self.pool.addresses)
        if self.plans.get(key) != plan:
            self.plans[key] = plan
            if plan.ignored or plan.preserve_client_address:
                self.exceptional[key] = plan
            else:
                self.exceptional.pop(key, None)
            self._publish(PutService(plan))

    def _forget(self, key: Key) -> None:
        self.pool.want(key, (), self._now_s())
        self.findings.pop(key, None)
        self.exceptional.pop(key, None)
        if self.plans.pop(key, None) is not None:
            self._publish(DropService(key.namespace, key.name))
