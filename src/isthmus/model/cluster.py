"""Values of the cluster model: what the manifests say, typed, with the place each object came from.

Addresses are canonical text (``str(ipaddress.ip_address(x))``); ports are host-order integers. Field names follow the
Kubernetes API (core/v1, discovery.k8s.io/v1) in snake case.
"""

from enum import StrEnum

import msgspec


class Protocol(StrEnum):
    """Transport protocols of a service port; SCTP is parsed and reported, not served."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class ServiceType(StrEnum):
    """``spec.type`` of a Service."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_NAME = "ExternalName"


class Source(msgspec.Struct, frozen=True):
    """Where an object stands: file name relative to the store, and the first line of its document (from 1)."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "unknown"


class Key(msgspec.Struct, frozen=True, order=True):
    """Kind, namespace ('' for cluster-scoped objects) and name: what the work queue and the indices go by."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        where = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind} {where}"


class ServicePort(msgspec.Struct, frozen=True):
    """One entry of ``spec.ports``; ``name`` is '' where the manifest gives none."""

    port: int
    name: str = ""
    protocol: Protocol = Protocol.TCP
    target_port: int | str = 0
    node_port: int = 0


class Service(msgspec.Struct, frozen=True):
    """A Service. ``cluster_ips`` is empty for headless and ExternalName services."""

    namespace: str
    name: str
    type: ServiceType = ServiceType.CLUSTER_IP
    cluster_ips: tuple[str, ...] = ()
    headless: bool = False
    external_name: str = ""
    ports: tuple[ServicePort, ...] = ()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    client_ip_affinity_s: int | None = None
    internal_traffic_policy: str = "Cluster"
    traffic_distribution: str = ""
    publish_not_ready_addresses: bool = False
    source: Source = Source()

    @property
    def key(self) -> Key:
        return Key("Service", self.namespace, self.name)


class EndpointPort(msgspec.Struct, frozen=True):
    """A port of an EndpointSlice; ``name`` matches the service port's name."""

    port: int
    name: str = ""
    protocol: Protocol = Protocol.TCP


class Endpoint(msgspec.Struct, frozen=True):
    """One address behind a service. Without ``node`` it is reported and not served, for ranges of sites overlap.

    ``serving`` tells of an endpoint that is not ready only because it terminates.
    """

    address: str
    node: str = ""
    hostname: str = ""
    pod: str = ""
    ready: bool = True
    zone: str = ""
    serving: bool = True
    terminating: bool = False


class EndpointSlice(msgspec.Struct, frozen=True):
    """An EndpointSlice, or one subset and family of a legacy Endpoints object (``NAME#SUBSET-FAMILY``)."""

    namespace: str
    name: str
    service: str
    ports: tuple[EndpointPort, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    legacy: bool = False
    source: Source = Source()

    @property
    def key(self) -> Key:
        return Key("EndpointSlice", self.namespace, self.name)


class Node(msgspec.Struct, frozen=True):
    """A Node. ``site`` is the label ``isthmus.dev/site``, else ``topology.kubernetes.io/zone``, else ''."""

    name: str
    internal_ips: tuple[str, ...] = ()
    external_ips: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    site: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    source: Source = Source()

    @property
    def key(self) -> Key:
        return Key("Node", "", self.name)


class Pod(msgspec.Struct, frozen=True):
    """A Pod, as far as the network is concerned."""

    namespace: str
    name: str
    node: str = ""
    ips: tuple[str, ...] = ()
    host_network: bool = False
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    source: Source = Source()

    @property
    def key(self) -> Key:
        return Key("Pod", self.namespace, self.name)


class Namespace(msgspec.Struct, frozen=True):
    """A Namespace."""

    name: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    source: Source = Source()

    @property
    def key(self) -> Key:
        return Key("Namespace", "", self.name)


Object = Service | EndpointSlice | Node | Pod | Namespace
