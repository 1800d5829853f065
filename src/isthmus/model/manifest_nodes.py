"""Node, Pod and Namespace objects (core/v1) from manifests."""

import msgspec

from isthmus.model import checks, labels
from isthmus.model.cluster import Namespace, Node, Object, Pod, Source
from isthmus.model.manifest_meta import Meta
from isthmus.model.reading import Reading
from isthmus.model.yamltext import Path, Value

FINISHED = ("Succeeded", "Failed")
"""Phases of a pod whose address may belong to another pod by now."""


class RawNodeSpec(msgspec.Struct):
    pod_cidr: str = msgspec.field(name="podCIDR", default="")
    pod_cidrs: list[str] = msgspec.field(name="podCIDRs", default_factory=list)


class RawNodeAddress(msgspec.Struct):
    type: str
    address: str


class RawNodeStatus(msgspec.Struct):
    addresses: list[RawNodeAddress] = []


class RawNode(msgspec.Struct):
    spec: RawNodeSpec = msgspec.field(default_factory=RawNodeSpec)
    status: RawNodeStatus = msgspec.field(default_factory=RawNodeStatus)


class RawPodSpec(msgspec.Struct, rename="camel"):
    node_name: str = ""
    host_network: bool = False


class RawPodIp(msgspec.Struct):
    ip: str


class RawPodStatus(msgspec.Struct):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    pod_ips: list[RawPodIp] = msgspec.field(name="podIPs", default_factory=list)


class RawPod(msgspec.Struct):
    spec: RawPodSpec = msgspec.field(default_factory=RawPodSpec)
    status: RawPodStatus = msgspec.field(default_factory=RawPodStatus)


def read_node(value: Value, meta: Meta, reading: Reading) -> tuple[Object, ...]:
    """The Node. Raises Unusable."""
    raw = reading.decode(value, RawNode)
    paths: list[tuple[Path, str]] = [(("spec", "podCIDRs", i), text) for i, text in enumerate(raw.spec.pod_cidrs)]
    if not paths and raw.spec.pod_cidr:
        paths = [(("spec", "podCIDR"), raw.spec.pod_cidr)]
    ranges = tuple(reading.check(path, text, checks.network) for path, text in paths)
    internal = _addresses(raw, "InternalIP", reading)
    external = _addresses(raw, "ExternalIP", reading)
    site = labels.site_of(meta.labels)
    reading.stop_if_failed()
    source = Source("", reading.line)
    return (Node(meta.name, internal, external, ranges, site, meta.labels, meta.annotations, source),)


def _addresses(raw: RawNode, kind: str, reading: Reading) -> tuple[str, ...]:
    return tuple(
        reading.check(("status", "addresses", index, "address"), one.address, checks.endpoint_address)
        for index, one in enumerate(raw.status.addresses)
        if one.type == kind
    )


def read_pod(value: Value, meta: Meta, reading: Reading) -> tuple[Object, ...]:
    """The Pod; one that has finished has no addresses. Raises Unusable."""
    raw = reading.decode(value, RawPod)
    paths: list[tuple[Path, str]] = [
        (("status", "podIPs", index, "ip"), one.ip) for index, one in enumerate(raw.status.pod_ips)
    ]
    if not paths and raw.status.pod_ip:
        paths = [(("status", "podIP"), raw.status.pod_ip)]
    addresses = tuple(reading.check(path, text, checks.endpoint_address) for path, text in paths)
    if raw.spec.node_name:
        reading.check(("spec", "nodeName"), raw.spec.node_name, checks.subdomain)
    reading.stop_if_failed()
    pod = Pod(
        namespace=meta.namespace,
        name=meta.name,
        node=raw.spec.node_name,
        ips=() if raw.status.phase in FINISHED else addresses,
        host_network=raw.spec.host_network,
        labels=meta.labels,
        annotations=meta.annotations,
        source=Source("", reading.line),
    )
    return (pod,)


def read_namespace(_value: Value, meta: Meta, reading: Reading) -> tuple[Object, ...]:
    """The Namespace."""
    return (Namespace(meta.name, meta.labels, meta.annotations, Source("", reading.line)),)
