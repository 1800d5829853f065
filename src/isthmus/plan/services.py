"""From a Service and its EndpointSlices to the plan that proxy, DNS and explain share. Pure.

The agent asks in this order for each service that model/index.py names::

    wanted = wanted_virtual(service, slices, nodes, me)
    findings = pool.want(service.key, wanted, now_s)       # plan/virtual.py
    plan = plan_service(service, slices, nodes, me, pool.addresses)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address

from isthmus.model import labels
from isthmus.model.cluster import Endpoint, EndpointPort, EndpointSlice, Protocol, Service, ServicePort, ServiceType
from isthmus.model.findings import Code, Finding, Severity
from isthmus.plan.nodes import Me, NodeFacts
from isthmus.plan.optout import OptOut, opt_out
from isthmus.plan.serving import Balance, Distance, Member, PortPlan, ServiceKind, ServicePlan
from isthmus.plan.virtual import MemberKey, Visibility, visibility

SERVED = frozenset({Protocol.TCP, Protocol.UDP})
PREFER = {"same-node": Distance.SAME_NODE, "same-site": Distance.SAME_SITE, "anywhere": Distance.ANYWHERE}
TRAFFIC_DISTRIBUTION = {
    "PreferSameNode": Distance.SAME_NODE,
    "PreferSameZone": Distance.SAME_SITE,
    "PreferClose": Distance.SAME_SITE,
}


def plan_service(
    service: Service,
    slices: Sequence[EndpointSlice],
    nodes: Mapping[str, NodeFacts],
    me: Me,
    virtual: Mapping[MemberKey, str],
) -> ServicePlan:
    """What this node serves for ``service``.

    ``slices`` are those of the service (``Cluster.slices_of``), ``virtual`` the addresses allocated by plan/virtual.py.
    Members are ordered by node and address. An endpoint without a node is left out: its address means nothing alone.
    A member of a headless service that needs a virtual address and has none is not visible (``visible_address`` '').
    """
    kind = service_kind(service)
    verdict = opt_out(service)
    ignored = verdict.because.text if verdict.action is OptOut.IGNORE else ""
    visible = _visible(service, bool(ignored), nodes, me, virtual)
    return ServicePlan(
        namespace=service.namespace,
        name=service.name,
        kind=kind,
        cluster_ips=service.cluster_ips,
        external_name=service.external_name,
        ports=tuple(PortPlan(port.port, port.name, port.protocol) for port in _served_ports(service)),
        members=() if kind is ServiceKind.EXTERNAL_NAME else _members(service, slices, nodes, me, visible),
        balance=balance_of(service),
        prefer=preference_of(service),
        local_only=service.internal_traffic_policy == "Local",
        affinity_s=service.client_ip_affinity_s,
        preserve_client_address=service.annotations.get(labels.PRESERVE_CLIENT_ADDRESS) == "true",
        ignored=ignored,
        publish_not_ready=service.publish_not_ready_addresses,
        origin=f"{service.key} in {service.source.file}" if service.source.file else str(service.key),
    )


def wanted_virtual(
    service: Service, slices: Sequence[EndpointSlice], nodes: Mapping[str, NodeFacts], me: Me
) -> tuple[MemberKey, ...]:
    """The members that need a virtual address here: those of a headless service that this node cannot route to."""
    if service_kind(service) is not ServiceKind.HEADLESS or opt_out(service).action is OptOut.IGNORE:
        return ()
    return tuple(
        key for key in sorted(_gather(service, slices)) if visibility(*key, nodes, me).action is Visibility.VIRTUAL
    )


def outside_ranges(service: Service, ranges: Sequence[IPv4Network | IPv6Network]) -> tuple[Finding, ...]:
    """A warning for each cluster address in none of the service ``ranges``: the kernel leaves it alone."""
    if opt_out(service).action is OptOut.IGNORE:
        return ()
    return tuple(
        Finding(
            Severity.WARNING,
            Code.NOT_IN_RANGE,
            f"{address} is in no service range, so it is not intercepted",
            service.source.file,
            service.source.line,
            "spec.clusterIP",
            "a range that holds it in the setting intercept.service-cidrs",
            str(service.key),
        )
        for address in service.cluster_ips
        if not any(_holds(network, address) for network in ranges)
    )


def _holds(network: IPv4Network | IPv6Network, address: str) -> bool:
    return ip_address(address) in network


def service_kind(service: Service) -> ServiceKind:
    """How the service is reached; NodePort and LoadBalancer services by their cluster address."""
    if service.type is ServiceType.EXTERNAL_NAME:
        return ServiceKind.EXTERNAL_NAME
    return ServiceKind.HEADLESS if service.headless else ServiceKind.CLUSTER_IP


def balance_of(service: Service) -> Balance:
    """The annotation, else round robin."""
    value = labels.known_value(service.annotations, labels.BALANCE, labels.SERVICE_ANNOTATIONS)
    return Balance(value) if value else Balance.ROUND_ROBIN


def preference_of(service: Service) -> Distance:
    """The annotation, else ``internalTrafficPolicy: Local``, else ``trafficDistribution``, else anywhere."""
    value = labels.known_value(service.annotations, labels.PREFER, labels.SERVICE_ANNOTATIONS)
    if value:
        return PREFER[value]
    if service.internal_traffic_policy == "Local":
        return Distance.SAME_NODE
    return TRAFFIC_DISTRIBUTION.get(service.traffic_distribution, Distance.ANYWHERE)


def distance_to(node: str, nodes: Mapping[str, NodeFacts], me: Me) -> Distance:
    """How far ``node`` is. Nodes whose site is not known are far: a shared absence is not a shared site."""
    if node == me.node:
        return Distance.SAME_NODE
    facts = nodes.get(node)
    if me.site and facts and facts.site == me.site:
        return Distance.SAME_SITE
    return Distance.ANYWHERE


def _served_ports(service: Service) -> Iterable[ServicePort]:
    return (port for port in service.ports if port.protocol in SERVED)


class _Gathered:
    """One member while its slices are read: the first slice that has it names it, every slice adds its ports."""

    __slots__ = ("endpoint", "ports", "ready", "serving")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.ports: dict[str, int] = {}
        self.ready = False
        self.serving = False

    def add(self, endpoint: Endpoint, ports: Mapping[str, int]) -> None:
        self.ports.update(ports)
        self.ready |= endpoint.ready
        self.serving |= endpoint.serving and endpoint.terminating


def _gather(service: Service, slices: Sequence[EndpointSlice]) -> dict[MemberKey, _Gathered]:
    """Members by (node, address). A cluster-IP service has only those that carry one of its ports."""
    wanted = {(port.name, port.protocol) for port in _served_ports(service)}
    gathered: dict[MemberKey, _Gathered] = {}
    for piece in slices:
        ports = _matching_ports(piece.ports, wanted)
        if not ports and not service.headless:
            continue
        for endpoint in piece.endpoints:
            if endpoint.node:
                key = (endpoint.node, endpoint.address)
                gathered.setdefault(key, _Gathered(endpoint)).add(endpoint, ports)
    return gathered


def _matching_ports(ports: Iterable[EndpointPort], wanted: set[tuple[str, Protocol]]) -> dict[str, int]:
    return {port.name: port.port for port in ports if (port.name, port.protocol) in wanted}


def _members(
    service: Service,
    slices: Sequence[EndpointSlice],
    nodes: Mapping[str, NodeFacts],
    me: Me,
    visible: Callable[[MemberKey], tuple[str, bool]],
) -> tuple[Member, ...]:
    """While no member is ready, those that still serve while they terminate count as ready, as in Kubernetes."""
    gathered = _gather(service, slices)
    any_ready = any(one.ready for one in gathered.values())
    members = []
    for key in sorted(gathered):
        one = gathered[key]
        shown, virtual = visible(key)
        member = Member(
            node=key[0],
            address=key[1],
            distance=distance_to(key[0], nodes, me),
            ports=one.ports,
            hostname=one.endpoint.hostname,
            pod=one.endpoint.pod,
            visible_address=shown,
            virtual=virtual,
            ready=one.ready or (not any_ready and one.serving),
        )
        members.append(member)
    return tuple(members)


def _visible(
    service: Service, ignored: bool, nodes: Mapping[str, NodeFacts], me: Me, virtual: Mapping[MemberKey, str]
) -> Callable[[MemberKey], tuple[str, bool]]:
    """By member: the address DNS answers, and whether it is virtual. Only headless services have any."""
    if not service.headless:
        return lambda _key: ("", False)
    if ignored:
        return lambda key: (key[1], False)

    def show(key: MemberKey) -> tuple[str, bool]:
        if visibility(*key, nodes, me).action is Visibility.REAL:
            return key[1], False
        return virtual.get(key, ""), True

    return show
