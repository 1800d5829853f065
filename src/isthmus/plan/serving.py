"""What a node serves: one value a service, computed by plan/services.py, read by the proxy, DNS and explain.

These values cross from the control process to the workers (wire/worker.py), so they hold nothing but data.
"""

from enum import IntEnum, StrEnum

import msgspec

from isthmus.model.cluster import Protocol


class ServiceKind(StrEnum):
    """How a service is reached."""

    CLUSTER_IP = "cluster-ip"
    HEADLESS = "headless"
    EXTERNAL_NAME = "external-name"


class Balance(StrEnum):
    """How one of several equal endpoints is chosen (annotation ``isthmus.dev/balance``)."""

    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    LEAST_CONNECTIONS = "least-connections"
    CLIENT_HASH = "client-hash"


class Distance(IntEnum):
    """How far an endpoint is from this node. Smaller is nearer."""

    SAME_NODE = 0
    SAME_SITE = 1
    ANYWHERE = 2


class Member(msgspec.Struct, frozen=True):
    """One endpoint as this node sees it; its identity is (node, address), for pod ranges of sites overlap.

    ``ports`` maps a service port's name to the endpoint's port. ``visible_address`` is what DNS answers for a headless
    service: the real address where this node can route to it, else a virtual one (``virtual``) that is intercepted.
    """

    node: str
    address: str
    distance: Distance
    ports: dict[str, int]
    hostname: str = ""
    pod: str = ""
    visible_address: str = ""
    virtual: bool = False
    ready: bool = True


class PortPlan(msgspec.Struct, frozen=True):
    """A service port that is served: TCP or UDP."""

    port: int
    name: str = ""
    protocol: Protocol = Protocol.TCP


class ServicePlan(msgspec.Struct, frozen=True):
    """One service as this node serves it.

    ``ignored`` is the reason for which the service is not intercepted ('' where it is): an opt-out label by its full
    text. An ignored service is still answered by DNS. ``prefer``: members no farther than this are the first tier, all
    equal; after them the rest by distance (ANYWHERE: one tier). ``local_only`` never leaves the node
    (internalTrafficPolicy: Local).
    """

    namespace: str
    name: str
    kind: ServiceKind
    cluster_ips: tuple[str, ...] = ()
    external_name: str = ""
    ports: tuple[PortPlan, ...] = ()
    members: tuple[Member, ...] = ()
    balance: Balance = Balance.ROUND_ROBIN
    prefer: Distance = Distance.ANYWHERE
    local_only: bool = False
    affinity_s: int | None = None
    preserve_client_address: bool = False
    ignored: str = ""
    publish_not_ready: bool = False
    origin: str = ""

    @property
    def full_name(self) -> str:
        """``NAMESPACE/NAME``."""
        return f"{self.namespace}/{self.name}"
