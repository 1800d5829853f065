"""The lab file: what a user writes to describe a cluster on one machine. Every field is explained in docs/lab.md.

The structs only say what may stand in the file; defaults that depend on other fields (addresses, ranges) are filled in
by topology.py, references between objects are checked by loader.py.
"""

from enum import StrEnum

import msgspec

from isthmus.model.settings import RELAY_PORT, DnsSettings, InterceptSettings, ProxySettings, RelaySettings

LAB_NAME = r"[a-z0-9]{1,12}\Z"
OBJECT_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z"


class NatType(StrEnum):
    """The four classic types, each a pair of RFC 4787 behaviours (section 4.1: mapping, section 5: filtering)."""

    FULL_CONE = "full-cone"  # mapping and filtering endpoint-independent
    RESTRICTED_CONE = "restricted-cone"  # mapping endpoint-independent, filtering address-dependent
    PORT_RESTRICTED_CONE = "port-restricted-cone"  # mapping endpoint-independent, filtering address-and-port-dependent
    SYMMETRIC = "symmetric"  # mapping and filtering address-and-port-dependent


class ForeignSet(StrEnum):
    """Netfilter rules that other software leaves on a node (foreign.py)."""

    DOCKER = "docker"
    FLANNEL = "flannel"
    KUBE_PROXY = "kube-proxy"
    LIBVIRT = "libvirt"


class Iptables(StrEnum):
    """Which iptables a node's foreign rules are loaded with."""

    NFT = "nft"
    LEGACY = "legacy"


class Generate(StrEnum):
    """Objects the lab may write into the store beside the manifests."""

    NODES = "nodes"
    PODS = "pods"


class StoreMode(StrEnum):
    """How the manifests become the agents' store."""

    COPY = "copy"
    LINK = "link"


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Strict: a misspelt field is an error, not a default."""


class Nat(_Struct, frozen=True):
    """The NAT in front of a private site."""

    type: NatType = NatType.PORT_RESTRICTED_CONE
    hairpin: bool = False
    udp_timeout_s: int = 120
    tcp_timeout_s: int = 7440


class AgentOverrides(_Struct, frozen=True):
    """Settings of agents; the rest of agent.yaml follows from the lab file."""

    intercept: InterceptSettings = InterceptSettings()
    dns: DnsSettings = DnsSettings()
    proxy: ProxySettings = ProxySettings()
    virtual_cidrs: tuple[str, ...] = ()


class Site(_Struct, frozen=True):
    """A place with a network of its own: public, or private behind a NAT."""

    name: str
    public: bool = False
    nat: Nat | None = None
    lan: str = ""
    wan_address: str = ""


class Node(_Struct, frozen=True):
    """A machine of the cluster."""

    name: str
    site: str
    address: str = ""
    pod_cidr: str = ""
    bridge: str = ""
    foreign: tuple[ForeignSet, ...] = ()
    iptables: Iptables = Iptables.NFT
    agent: bool = True
    settings: AgentOverrides | None = None


class Serve(_Struct, frozen=True):
    """Ports of the lab's own echo server (server.py)."""

    http: tuple[int, ...] = ()
    tcp: tuple[int, ...] = ()
    udp: tuple[int, ...] = ()


class Pod(_Struct, frozen=True):
    """A network namespace behind a node's bridge; idle unless it serves or runs a command."""

    name: str
    node: str
    namespace: str = "default"
    address: str = ""
    serve: Serve | None = None
    command: tuple[str, ...] = ()


class Host(_Struct, frozen=True):
    """A machine of the public network that is no node: for relays, name servers, outsiders."""

    name: str
    address: str = ""
    command: tuple[str, ...] = ()


class Relay(_Struct, frozen=True):
    """``isthmus relay`` on a host or on a node of a public site. The first one is also the issuer of certificates."""

    name: str
    at: str
    port: int = RELAY_PORT


class RelayOverrides(_Struct, frozen=True):
    """Settings of relays; the rest of relay.yaml follows from the lab file."""

    streams_per_node: int = RelaySettings().streams_per_node
    pairing_timeout_s: float = RelaySettings().pairing_timeout_s
    waiting_bytes: int = RelaySettings().waiting_bytes
    certificate_hours: float = RelaySettings().certificate_hours


class LabFile(_Struct, frozen=True):
    """A lab file."""

    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    name: str = "lab"
    pods: tuple[Pod, ...] = ()
    hosts: tuple[Host, ...] = ()
    relays: tuple[Relay, ...] = ()
    manifests: str = ""
    store: StoreMode = StoreMode.COPY
    generate: tuple[Generate, ...] = ()
    dual_stack: bool = False
    agent: AgentOverrides = AgentOverrides()
    relay: RelayOverrides = RelayOverrides()
