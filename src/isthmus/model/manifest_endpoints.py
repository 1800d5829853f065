"""EndpointSlice (discovery.k8s.io/v1) and legacy Endpoints (core/v1) objects from manifests."""

from collections.abc import Iterable

import msgspec

from isthmus.model import checks, labels
from isthmus.model.cluster import Endpoint, EndpointPort, EndpointSlice, Object, Protocol, Source
from isthmus.model.findings import Code
from isthmus.model.manifest_meta import Meta
from isthmus.model.manifest_services import PROTOCOLS
from isthmus.model.reading import Reading
from isthmus.model.yamltext import Path, Value

FAMILIES = ("IPv4", "IPv6")
NO_NODE = "the endpoint is not served: it names no node, and pod ranges of sites overlap"


class RawPort(msgspec.Struct):
    port: int | None = None
    name: str = ""
    protocol: str = "TCP"


class RawConditions(msgspec.Struct):
    ready: bool = True
    serving: bool | None = None
    terminating: bool = False


class RawTarget(msgspec.Struct):
    kind: str = ""
    name: str = ""


class RawEndpoint(msgspec.Struct, rename="camel"):
    addresses: list[str]
    conditions: RawConditions = msgspec.field(default_factory=RawConditions)
    hostname: str = ""
    node_name: str = ""
    zone: str = ""
    target_ref: RawTarget = msgspec.field(default_factory=RawTarget)


class RawSlice(msgspec.Struct, rename="camel"):
    address_type: str
    ports: list[RawPort] = []
    endpoints: list[RawEndpoint] = []


class RawAddress(msgspec.Struct, rename="camel"):
    ip: str
    hostname: str = ""
    node_name: str = ""
    target_ref: RawTarget = msgspec.field(default_factory=RawTarget)


class RawSubset(msgspec.Struct, rename="camel"):
    addresses: list[RawAddress] = []
    not_ready_addresses: list[RawAddress] = []
    ports: list[RawPort] = []


class RawEndpoints(msgspec.Struct):
    subsets: list[RawSubset] = []


def read_slice(value: Value, meta: Meta, reading: Reading) -> tuple[Object, ...]:
    """The EndpointSlice; none for one of names (FQDN) or without a service. Raises Unusable."""
    raw = reading.decode(value, RawSlice)
    reading.one_of(("addressType",), raw.address_type, (*FAMILIES, "FQDN"))
    reading.stop_if_failed()
    if raw.address_type == "FQDN":
        reading.note(("addressType",), "endpoints that are names (FQDN) are not served")
        return ()
    service = meta.labels.get(labels.SERVICE_NAME, "")
    if not service:
        text = "the slice belongs to no service, so it is not served"
        reading.warn(("metadata", "labels"), text, f"the label {labels.SERVICE_NAME}", Code.SLICE_WITHOUT_SERVICE)
        return ()
    reading.check(("metadata", "labels", labels.SERVICE_NAME), service, checks.label)
    ports = _ports(raw.ports, ("ports",), reading)
    endpoints = tuple(_endpoint(one, ("endpoints", i), raw, reading) for i, one in enumerate(raw.endpoints))
    reading.stop_if_failed()
    source = Source("", reading.line)
    return (EndpointSlice(meta.namespace, meta.name, service, ports, endpoints, source=source),)


def _endpoint(raw: RawEndpoint, path: Path, piece: RawSlice, reading: Reading) -> Endpoint:
    """One endpoint. Further addresses stand for the same thing (Kubernetes API), so the first serves."""
    if not raw.addresses:
        reading.fail((*path, "addresses"), "there is none", "at least one address")
    for index, text in enumerate(raw.addresses):
        where = (*path, "addresses", index)
        canonical = reading.check(where, text, checks.endpoint_address)
        if checks.family(canonical) != piece.address_type:
            reading.fail(where, f"{text!r} is not {piece.address_type}", f"an {piece.address_type} address")
    _check_place(raw.node_name, raw.hostname, path, reading)
    serving = raw.conditions.serving
    return Endpoint(
        address=checks.address(raw.addresses[0]) if not reading.failed else "",
        node=raw.node_name,
        hostname=raw.hostname,
        pod=raw.target_ref.name if raw.target_ref.kind == "Pod" else "",
        ready=raw.conditions.ready,
        zone=raw.zone,
        serving=raw.conditions.ready if serving is None else serving,
        terminating=raw.conditions.terminating,
    )


def _check_place(node: str, hostname: str, path: Path, reading: Reading) -> None:
    if hostname:
        reading.check((*path, "hostname"), hostname, checks.label)
    if node:
        reading.check((*path, "nodeName"), node, checks.subdomain)
    else:
        reading.warn((*path, "nodeName"), NO_NODE, "the name of the endpoint's node", Code.ENDPOINT_WITHOUT_NODE)


def _ports(raws: Iterable[RawPort], path: Path, reading: Reading) -> tuple[EndpointPort, ...]:
    ports = []
    names: set[str] = set()
    for index, raw in enumerate(raws):
        where = (*path, index)
        if raw.port is None:
            reading.note((*where, "port"), "a port without a number is not served")
            continue
        reading.check((*where, "port"), raw.port, checks.port)
        reading.one_of((*where, "protocol"), raw.protocol, PROTOCOLS)
        if raw.name in names:
            reading.fail((*where, "name"), f"{raw.name!r} stands twice", "each name once")
        names.add(raw.name)
        protocol = Protocol(raw.protocol) if raw.protocol in PROTOCOLS else Protocol.TCP
        ports.append(EndpointPort(raw.port, raw.name, protocol))
    return tuple(ports)


def read_endpoints(value: Value, meta: Meta, reading: Reading) -> tuple[Object, ...]:
    """One EndpointSlice for each subset and family, named ``NAME#SUBSET-FAMILY``. Raises Unusable."""
    raw = reading.decode(value, RawEndpoints)
    slices: list[Object] = []
    for index, subset in enumerate(raw.subsets):
        slices += _subset(subset, index, meta, reading)
    reading.stop_if_failed()
    return tuple(slices)


def _subset(subset: RawSubset, index: int, meta: Meta, reading: Reading) -> list[Object]:
    path: Path = ("subsets", index)
    ports = _ports(subset.ports, (*path, "ports"), reading)
    found = [
        _address(raw, (*path, field, number), reading, ready=ready)
        for field, raws, ready in (
            ("addresses", subset.addresses, True),
            ("notReadyAddresses", subset.not_ready_addresses, False),
        )
        for number, raw in enumerate(raws)
    ]
    slices: list[Object] = []
    for family in FAMILIES:
        members = tuple(one for one in found if checks.family(one.address) == family)
        if members:
            name = f"{meta.name}#{index}-{family.lower()}"
            source = Source("", reading.line)
            slices.append(EndpointSlice(meta.namespace, name, meta.name, ports, members, legacy=True, source=source))
    return slices


def _address(raw: RawAddress, path: Path, reading: Reading, *, ready: bool) -> Endpoint:
    address = reading.check((*path, "ip"), raw.ip, checks.endpoint_address)
    _check_place(raw.node_name, raw.hostname, path, reading)
    pod = raw.target_ref.name if raw.target_ref.kind == "Pod" else ""
    return Endpoint(address, raw.node_name, raw.hostname, pod, ready, serving=ready)
