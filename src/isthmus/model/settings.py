"""The agent's and the relay's settings: one YAML file each, every field with a default that users of the field know.

Documented in docs/settings.md; a test holds the page to this file.
"""

from enum import StrEnum

import msgspec

INTERCEPT_ADDRESS_V4 = "169.254.96.16"
INTERCEPT_ADDRESS_V6 = "fd00:a9fe:6010::16"
INTERCEPT_PORT = 40001
DNS_PORT = 53
LINK_PORT = 20006
RELAY_PORT = 20004


class Backend(StrEnum):
    """Which netfilter interface renders the interception."""

    AUTO = "auto"
    NFTABLES = "nftables"
    IPTABLES = "iptables"


class OriginalDestination(StrEnum):
    """How the proxy learns where an intercepted TCP connection was going."""

    AUTO = "auto"
    GETSOCKOPT = "so-original-dst"
    TPROXY = "tproxy"


class RelayAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A relay this node may use."""

    name: str
    address: str  # HOST:PORT; an IPv6 host in brackets
    site: str = ""


class InterceptSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Interception: what is taken, and where it is sent."""

    service_cidrs: tuple[str, ...] = ("10.96.0.0/12", "fd00:10:96::/112")
    address_v4: str = INTERCEPT_ADDRESS_V4
    address_v6: str = INTERCEPT_ADDRESS_V6
    port: int = INTERCEPT_PORT
    device: str = "isthmus0"
    backend: Backend = Backend.AUTO
    original_destination: OriginalDestination = OriginalDestination.AUTO


class DnsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Service names and what lies behind them."""

    domain: str = "cluster.local"
    upstreams: tuple[str, ...] = ()
    ttl_s: int = 30
    timeout_s: float = 2.0
    attempts: int = 2
    cache_entries: int = 10_000


class ProxySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Limits of the proxy."""

    connect_stagger_s: float = 0.25
    connect_timeout_s: float = 5.0
    rest_s: float = 10.0
    udp_idle_s: float = 180.0
    udp_sessions: int = 16_384
    drain_s: float = 5.0


class AgentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """``isthmus agent --config FILE``."""

    node: str = ""
    site: str = ""
    store: str = "/etc/isthmus/store"
    state_directory: str = "/var/lib/isthmus"
    run_directory: str = "/run/isthmus"
    boot_id_file: str = "/proc/sys/kernel/random/boot_id"
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    virtual_cidrs: tuple[str, ...] = ("240.96.0.0/16", "fd00:a9fe:6011::/112")
    link_port: int = LINK_PORT
    relays: tuple[RelayAddress, ...] = ()
    issuer: str = ""
    token_file: str = ""
    metrics: str = ""
    intercept: InterceptSettings = InterceptSettings()
    dns: DnsSettings = DnsSettings()
    proxy: ProxySettings = ProxySettings()


class RelaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """``isthmus relay --config FILE``."""

    name: str = "relay"
    listen: str = "0.0.0.0:20004"
    state_directory: str = "/var/lib/isthmus-relay"
    run_directory: str = "/run/isthmus-relay"
    issuer: bool = True
    ca_directory: str = "/var/lib/isthmus-ca"
    issuer_address: str = ""
    token_file: str = ""
    service_cidrs: tuple[str, ...] = ("10.96.0.0/12", "fd00:10:96::/112")
    streams_per_node: int = 1_024
    pairing_timeout_s: float = 5.0
    waiting_bytes: int = 262_144
    certificate_hours: float = 24.0
    metrics: str = ""
