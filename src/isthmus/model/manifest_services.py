"""Service objects from manifests: core/v1 Service."""

import msgspec

from isthmus.model import checks, labels
from isthmus.model.cluster import Object, Protocol, Service, ServicePort, ServiceType, Source
from isthmus.model.findings import Code
from isthmus.model.manifest_meta import Meta
from isthmus.model.reading import Reading
from isthmus.model.yamltext import Path, Value

AFFINITY_S = 10_800
MAX_AFFINITY_S = 86_400
PROTOCOLS = tuple(protocol.value for protocol in Protocol)
TRAFFIC_DISTRIBUTIONS = ("PreferClose", "PreferSameZone", "PreferSameNode")


class RawPort(msgspec.Struct, rename="camel"):
    port: int
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str = 0
    node_port: int = 0


class RawClientIp(msgspec.Struct, rename="camel"):
    timeout_seconds: int = AFFINITY_S


class RawAffinityConfig(msgspec.Struct):
    client_ip: RawClientIp = msgspec.field(name="clientIP", default_factory=RawClientIp)


class RawSpec(msgspec.Struct, rename="camel"):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: list[str] = msgspec.field(name="clusterIPs", default_factory=list)
    external_name: str = ""
    ports: list[RawPort] = []
    session_affinity: str = "None"
    session_affinity_config: RawAffinityConfig = msgspec.field(default_factory=RawAffinityConfig)
    internal_traffic_policy: str = "Cluster"
    traffic_distribution: str = ""
    publish_not_ready_addresses: bool = False


class RawService(msgspec.Struct):
    spec: RawSpec


def read_service(value: Value, meta: Meta, reading: Reading) -> tuple[Object, ...]:
    """The Service. Raises Unusable after recording why."""
    spec = reading.decode(value, RawService).spec
    reading.one_of(("spec", "type"), spec.type, tuple(kind.value for kind in ServiceType))
    reading.stop_if_failed()
    kind = ServiceType(spec.type)
    headless = kind is ServiceType.CLUSTER_IP and "None" in (spec.cluster_ip, *spec.cluster_ips)
    external = kind is ServiceType.EXTERNAL_NAME
    external_name = _external_name(spec, reading) if external else ""
    addresses = () if headless or external else _cluster_ips(spec, reading)
    ports = _ports(spec, reading, needed=not headless and not external)
    affinity_s = _affinity(spec, reading)
    reading.one_of(("spec", "internalTrafficPolicy"), spec.internal_traffic_policy, ("Cluster", "Local"))
    _check_wishes(spec, meta, reading)
    reading.stop_if_failed()
    _note_what_is_not_served(kind, addresses, headless or external, ports, reading)
    service = Service(
        namespace=meta.namespace,
        name=meta.name,
        type=kind,
        cluster_ips=addresses,
        headless=headless,
        external_name=external_name,
        ports=ports,
        labels=meta.labels,
        annotations=meta.annotations,
        client_ip_affinity_s=affinity_s,
        internal_traffic_policy=spec.internal_traffic_policy,
        traffic_distribution=spec.traffic_distribution,
        publish_not_ready_addresses=spec.publish_not_ready_addresses,
        source=Source("", reading.line),
    )
    return (service,)


def _external_name(spec: RawSpec, reading: Reading) -> str:
    return reading.check(("spec", "externalName"), spec.external_name, checks.host)


def _cluster_ips(spec: RawSpec, reading: Reading) -> tuple[str, ...]:
    """``clusterIPs``, which must begin with ``clusterIP`` where both stand; one address a family."""
    paths: list[tuple[Path, str]] = [(("spec", "clusterIPs", i), text) for i, text in enumerate(spec.cluster_ips)]
    if not paths and spec.cluster_ip:
        paths = [(("spec", "clusterIP"), spec.cluster_ip)]
    found = tuple(reading.check(path, text, checks.endpoint_address) for path, text in paths)
    if reading.failed:
        return found
    if spec.cluster_ip and reading.check(("spec", "clusterIP"), spec.cluster_ip, checks.address) != found[0]:
        reading.fail(("spec", "clusterIPs", 0), f"{found[0]!r} is not spec.clusterIP", repr(spec.cluster_ip))
    if len({checks.family(address) for address in found}) != len(found):
        reading.fail(("spec", "clusterIPs"), "two addresses are of one family", "at most one IPv4 and one IPv6")
    return found


def _ports(spec: RawSpec, reading: Reading, *, needed: bool) -> tuple[ServicePort, ...]:
    if needed and not spec.ports:
        reading.fail(("spec", "ports"), "there is none", "at least one port")
    ports = tuple(_port(raw, ("spec", "ports", index), reading) for index, raw in enumerate(spec.ports))
    reading.stop_if_failed()
    names: set[str] = set()
    numbers: set[tuple[int, Protocol]] = set()
    for index, port in enumerate(ports):
        path: Path = ("spec", "ports", index)
        if len(ports) > 1 and not port.name:
            reading.fail((*path, "name"), "it is missing", "a name, since the service has several ports")
        elif port.name in names:
            reading.fail((*path, "name"), f"{port.name!r} stands twice", "each name once")
        if (port.port, port.protocol) in numbers:
            reading.fail((*path, "port"), f"{port.port}/{port.protocol} stands twice", "each port and protocol once")
        names.add(port.name)
        numbers.add((port.port, port.protocol))
    return ports


def _port(raw: RawPort, path: Path, reading: Reading) -> ServicePort:
    reading.check((*path, "port"), raw.port, checks.port)
    if raw.name:
        reading.check((*path, "name"), raw.name, checks.label)
    reading.one_of((*path, "protocol"), raw.protocol, PROTOCOLS)
    protocol = Protocol(raw.protocol) if raw.protocol in PROTOCOLS else Protocol.TCP
    return ServicePort(raw.port, raw.name, protocol, raw.target_port, raw.node_port)


def _affinity(spec: RawSpec, reading: Reading) -> int | None:
    reading.one_of(("spec", "sessionAffinity"), spec.session_affinity, ("None", "ClientIP"))
    if spec.session_affinity != "ClientIP":
        return None
    timeout_s = spec.session_affinity_config.client_ip.timeout_seconds
    if not 0 < timeout_s <= MAX_AFFINITY_S:
        path = ("spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds")
        reading.fail(path, f"{timeout_s} is not allowed", f"seconds from 1 to {MAX_AFFINITY_S}")
    return timeout_s


def _check_wishes(spec: RawSpec, meta: Meta, reading: Reading) -> None:
    """Values that only Isthmus, or only a newer Kubernetes, gives a meaning to: a wrong one counts as absent."""
    for allowed, field, values in (
        (labels.SERVICE_LABELS, "labels", meta.labels),
        (labels.SERVICE_ANNOTATIONS, "annotations", meta.annotations),
    ):
        for name, choices in allowed.items():
            if name in values and values[name] not in choices:
                text = f"{values[name]!r} is not known, so it is not heeded"
                reading.warn(("metadata", field, name), text, f"one of {', '.join(choices)}")
    if spec.traffic_distribution and spec.traffic_distribution not in TRAFFIC_DISTRIBUTIONS:
        text = f"{spec.traffic_distribution!r} is not known, so it is not heeded"
        reading.warn(("spec", "trafficDistribution"), text, f"one of {', '.join(TRAFFIC_DISTRIBUTIONS)}")


def _note_what_is_not_served(
    kind: ServiceType, addresses: tuple[str, ...], needs_none: bool, ports: tuple[ServicePort, ...], reading: Reading
) -> None:
    if not addresses and not needs_none:
        reading.warn(
            ("spec", "clusterIP"),
            "it has no cluster address, so only its name is known",
            "an address of the service range, or None",
            Code.NOT_SERVED,
        )
    if kind in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER):
        reading.note(("spec", "type"), f"{kind} is served at its cluster address; node ports are not served yet")
    for index, port in enumerate(ports):
        if port.protocol is Protocol.SCTP:
            reading.note(("spec", "ports", index, "protocol"), f"port {port.port} is not served: SCTP")
