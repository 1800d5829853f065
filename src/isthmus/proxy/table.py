"""From an intercepted destination to the service port that it means. Changes cost what they change, nothing more."""

from collections.abc import Iterator

from msgspec import structs

from isthmus.plan.admission import OwnEndpoints, own_endpoints
from isthmus.plan.balance import Candidate, Pool, of_family
from isthmus.plan.serving import Member, PortPlan, ServiceKind, ServicePlan
from isthmus.proxy.counters import ServiceCounters
from isthmus.wire.local import EndpointState

# (address, port, "TCP" or "UDP"): plain text hashes faster than an enum.
Destination = tuple[str, int, str]


class Served:
    """One service port at one address, with the state of its endpoint choice. ``pool`` is made at first use."""

    __slots__ = ("_pool", "counters", "plan", "port")

    def __init__(self, plan: ServicePlan, port: PortPlan, counters: ServiceCounters) -> None:
        self.plan = plan
        self.port = port
        self.counters = counters
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The endpoints to choose from."""
        if self._pool is None:
            self._pool = Pool(self.plan, self.port)
        return self._pool

    def resting(self, now_s: float) -> dict[Candidate, float]:
        """Who rests, and for how many seconds still."""
        return self._pool.resting(now_s) if self._pool is not None else {}

    def states(self, now_s: float) -> Iterator[EndpointState]:
        """The endpoints that are used or rest."""
        if self._pool is None:
            return
        rests, active = self._pool.resting(now_s), self._pool.active()
        for each in rests.keys() | active.keys():
            yield EndpointState(
                service=self.plan.full_name,
                service_port=self.port.port,
                protocol=self.port.protocol.value,
                node=each.node,
                address=each.address,
                port=each.port,
                rest_s=round(rests.get(each, 0.0), 3),
                connections=active.get(each, 0),
            )

    def update(self, plan: ServicePlan, port: PortPlan) -> None:
        """The service changed; what the choice remembers stays."""
        self.plan, self.port = plan, port
        if self._pool is not None:
            self._pool.update(plan, port)


class _Record:
    """What one service has put into the table."""

    __slots__ = ("counters", "own", "plan", "served")

    def __init__(self, plan: ServicePlan, counters: ServiceCounters) -> None:
        self.plan = plan
        self.counters = counters
        self.served: dict[Destination, Served] = {}
        self.own: OwnEndpoints | None = None


class Table:
    """The services of this node by destination and by name."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.version = 0  # grows with every change
        self._services: dict[str, _Record] = {}
        self._destinations: dict[Destination, dict[str, Served]] = {}

    def put(self, plan: ServicePlan) -> None:
        """A service is new or changed."""
        self.version += 1
        name = plan.full_name
        record = self._services.get(name)
        if record is None:
            record = self._services[name] = _Record(plan, ServiceCounters())
        before, record.served = record.served, {}
        record.plan, record.own = plan, None
        for destination, served_plan, port in _destinations(plan):
            served = before.pop(destination, None) or record.served.get(destination)
            if served is None:
                served = Served(served_plan, port, record.counters)
            else:
                served.update(served_plan, port)
            record.served[destination] = served
            self._destinations.setdefault(destination, {})[name] = served
        for destination in before:
            self._forget(destination, name)

    def drop(self, namespace: str, name: str) -> None:
        """A service is gone; one that is not known is no error."""
        self.version += 1
        record = self._services.pop(f"{namespace}/{name}", None)
        if record is not None:
            for destination in record.served:
                self._forget(destination, f"{namespace}/{name}")

    def find(self, address: str, port: int, protocol: str) -> Served | None:
        """What is served there. Where two services claim one destination, the first by name has it."""
        claims = self._destinations.get((address, port, protocol))
        if claims is None:
            return None
        return next(iter(claims.values())) if len(claims) == 1 else claims[min(claims)]

    def plan(self, namespace: str, name: str) -> ServicePlan | None:
        """The plan of a service."""
        record = self._services.get(f"{namespace}/{name}")
        return record.plan if record else None

    def own_endpoints(self, namespace: str, name: str) -> OwnEndpoints:
        """The endpoints of a service that live on this node; worked out once a change."""
        record = self._services.get(f"{namespace}/{name}")
        if record is None:
            return frozenset()
        if record.own is None:
            record.own = own_endpoints(record.plan, self.node)
        return record.own

    def counters(self) -> Iterator[tuple[str, ServiceCounters]]:
        """Of every service that was ever used."""
        return ((name, record.counters) for name, record in self._services.items() if record.counters.connections)

    def resting(self, now_s: float) -> Iterator[tuple[str, int, str, float]]:
        """(service, service port, ADDRESS:PORT on NODE, seconds) of the endpoints that rest."""
        for name, record in self._services.items():
            for served in record.served.values():
                for each, rest_s in served.resting(now_s).items():
                    yield name, served.port.port, f"{each.address}:{each.port} on {each.node}", rest_s

    def states(self, now_s: float) -> Iterator[EndpointState]:
        """What is remembered of endpoints, one row a service port and endpoint."""
        for record in self._services.values():
            for served in record.served.values():
                yield from served.states(now_s)

    def __len__(self) -> int:
        return len(self._services)

    def _forget(self, destination: Destination, name: str) -> None:
        claims = self._destinations[destination]
        del claims[name]
        if not claims:
            del self._destinations[destination]


def _destinations(plan: ServicePlan) -> Iterator[tuple[Destination, ServicePlan, PortPlan]]:
    """What the service answers to: its cluster addresses, or its members' virtual addresses with their own ports."""
    if plan.ignored:
        return
    if plan.kind is ServiceKind.CLUSTER_IP:
        for address in plan.cluster_ips:
            members = of_family(plan, address)
            for port in plan.ports:
                yield (address, port.port, port.protocol.value), members, port
    elif plan.kind is ServiceKind.HEADLESS:
        for member in plan.members:
            if member.virtual and member.visible_address:
                yield from _member_destinations(plan, member)


def _member_destinations(plan: ServicePlan, member: Member) -> Iterator[tuple[Destination, ServicePlan, PortPlan]]:
    """A virtual address stands for one pod, so readiness and policy do not pass it over, as at its own."""
    alone = structs.replace(plan, members=(member,), local_only=False, publish_not_ready=True, affinity_s=None)
    for port in plan.ports:
        number = member.ports.get(port.name)
        if number is not None:
            own = PortPlan(port=number, name=port.name, protocol=port.protocol)
            yield (member.visible_address, number, port.protocol.value), alone, own
