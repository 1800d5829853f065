"""Which packets are handed to the proxy, and what the kernel must hold for it. The rule table: docs/interception.md.

``decide`` is the decision for one packet; ``InterceptionPlan`` is the same decision as data, rendered by kernel/nft.py
and kernel/iptables.py. Rules go by the destination, so the proxy's own connections would come back to it wherever an
endpoint or an upstream lies in one of the ranges; therefore every socket of ours carries a mark, and marked packets
pass. A mark, not a list of destinations: the same address may have to be taken from a pod and let through from us.
"""

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network

import msgspec

from isthmus.model.cluster import Protocol
from isthmus.model.errors import NotSupported
from isthmus.model.marks import INTERCEPTION_MASK, OWN
from isthmus.model.settings import Backend, InterceptSettings, OriginalDestination
from isthmus.plan.serving import ServicePlan
from isthmus.plan.verdict import Because, Verdict

Network = IPv4Network | IPv6Network

CHAIN = "ISTHMUS"
"""The chain that both jumps lead to, in upper case for iptables and in lower case for nftables."""

MAX_COMMENT_BYTES = 127
"""nftables keeps at most 128 bytes of an element's comment, the closing zero among them."""


class Handover(StrEnum):
    """How the kernel hands an intercepted packet to the proxy's socket."""

    DNAT = "dnat"
    TPROXY = "tproxy"


class Action(StrEnum):
    """What happens to a packet."""

    INTERCEPT = "intercept"  # it goes to the proxy
    RETURN = "return"  # a rule of ours says: not ours
    LEAVE = "leave"  # no rule of ours concerns it


class Ignored(msgspec.Struct, frozen=True):
    """A service that opted out, and why (``plan/optout.py``)."""

    namespace: str
    name: str
    reason: str = ""

    @property
    def comment(self) -> str:
        """The comment of its element, as long as nftables allows."""
        return fit_comment(f"ignore {self.namespace}/{self.name} service")


class Preserved(msgspec.Struct, frozen=True, order=True):
    """An endpoint of this node that is to see its clients' addresses. TCP only."""

    address: str
    port: int


class Capabilities(msgspec.Struct, frozen=True):
    """What this kernel can do for interception, as kernel/probe.py found by trying. Each text says why not ('': can).

    ``original_destination`` is why SO_ORIGINAL_DST must not be called; ``udp_timeout`` why nftables cannot set
    conntrack's time limit of single flows. ``bridge_netfilter`` is a state: bridges ask the IP hooks.
    """

    nftables: str = ""
    iptables: str = ""
    ipset: str = ""
    tproxy: str = ""
    ipv6: str = ""
    bridge_redirect: str = ""
    udp_timeout: str = ""
    original_destination: str = ""
    bridge_netfilter: bool = True


class InterceptionPlan(msgspec.Struct, frozen=True):
    """What the kernel must hold. ``ignored`` and ``preserved`` change often, the rest hardly ever.

    An empty ``address_v4`` or ``address_v6`` leaves that family alone. ``own`` are addresses of this node that lie in
    one of the ranges. ``notes`` say what was chosen and why, for ``status``.
    """

    backend: Backend
    handover: Handover
    device: str
    address_v4: str
    address_v6: str
    port: int
    service_ranges: tuple[str, ...] = ()
    virtual_ranges: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    ignored: dict[str, Ignored] = {}
    preserved: frozenset[Preserved] = frozenset()
    use_ipset: bool = True
    bridge_netfilter: bool = True
    redirect_bridged: bool = True
    udp_timeout: bool = True
    notes: tuple[Because, ...] = ()

    def address(self, version: int) -> str:
        """Where intercepted packets of that IP version go, '' where they are left alone."""
        return self.address_v4 if version == 4 else self.address_v6

    def taken(self, version: int) -> tuple[str, ...]:
        """All ranges of one IP version, overlaps merged, in order."""
        networks = [ip_network(text) for text in (*self.service_ranges, *self.virtual_ranges)]
        if version == 4:
            return tuple(map(str, collapse_addresses(n for n in networks if isinstance(n, IPv4Network))))
        return tuple(map(str, collapse_addresses(n for n in networks if isinstance(n, IPv6Network))))

    def versions(self) -> tuple[int, ...]:
        """The IP versions that have both a range and an address to send it to."""
        return tuple(version for version in (4, 6) if self.address(version) and self.taken(version))

    def exceptions(self, version: int) -> dict[str, str]:
        """Address to comment: everything inside or outside the ranges that a rule of ours returns."""
        found = {address: "own address" for address in self.own if version_of(address) == version}
        for address, service in self.ignored.items():
            if version_of(address) == version and address not in found:
                found[address] = service.comment
        return found


class Packet(msgspec.Struct, frozen=True):
    """What the decision depends on. ``protocol`` is a number of IANA's list; ``mark`` the packet's mark."""

    destination: str
    protocol: int
    mark: int = 0


TCP, UDP = 6, 17


def decide(packet: Packet, plan: InterceptionPlan) -> Verdict[Action]:
    """Return what happens to a packet that arrives from outside (PREROUTING) or leaves a process here (OUTPUT).

    First rule that matches wins; order and names follow docs/interception.md.
    """
    for rule in RULES:
        verdict = rule(packet, plan)
        if verdict is not None:
            return verdict
    because = Because(f"{packet.destination} is in no service range and no virtual range", setting=_SERVICE)
    return Verdict(Action.LEAVE, "not-in-range", because)


_SERVICE = "intercept.service-cidrs"
_VIRTUAL = "virtual-cidrs"


def _family_off(packet: Packet, plan: InterceptionPlan) -> Verdict[Action] | None:
    version = version_of(packet.destination)
    if version in plan.versions():
        return None
    because = Because(f"nothing of IPv{version} is intercepted", setting=_SERVICE)
    return Verdict(Action.LEAVE, "family-off", because)


def _own_traffic(packet: Packet, _plan: InterceptionPlan) -> Verdict[Action] | None:
    if packet.mark & INTERCEPTION_MASK & OWN == 0:
        return None
    return Verdict(Action.RETURN, "own-traffic", Because(f"a socket of ours sent it (mark {packet.mark:#x})"))


def _own_address(packet: Packet, plan: InterceptionPlan) -> Verdict[Action] | None:
    if packet.destination not in plan.own:
        return None
    return Verdict(Action.RETURN, "own-address", Because(f"{packet.destination} is this node's own", setting=_SERVICE))


def _ignored_service(packet: Packet, plan: InterceptionPlan) -> Verdict[Action] | None:
    service = plan.ignored.get(packet.destination)
    if service is None:
        return None
    name = f"Service {service.namespace}/{service.name}"
    text = f"ignore {service.namespace}/{service.name} service"
    return Verdict(Action.RETURN, "ignored-service", Because(text, object=name, setting=service.reason))


def _service_range(packet: Packet, plan: InterceptionPlan) -> Verdict[Action] | None:
    return _in_range(packet, plan, plan.service_ranges, "service-range", _SERVICE)


def _virtual_range(packet: Packet, plan: InterceptionPlan) -> Verdict[Action] | None:
    return _in_range(packet, plan, plan.virtual_ranges, "virtual-range", _VIRTUAL)


def _in_range(
    packet: Packet, plan: InterceptionPlan, ranges: Iterable[str], rule: str, setting: str
) -> Verdict[Action] | None:
    inside = next((text for text in ranges if _contains(text, packet.destination)), None)
    if inside is None:
        return None
    if packet.protocol not in (TCP, UDP):
        text = f"only TCP and UDP are intercepted, this is protocol {packet.protocol}"
        return Verdict(Action.LEAVE, "other-protocol", Because(text))
    target = plan.address(version_of(packet.destination))
    return Verdict(
        Action.INTERCEPT,
        rule,
        Because(f"{packet.destination} is in {inside}, sent to {target} port {plan.port}", setting=setting),
    )


RULES: tuple[Callable[[Packet, InterceptionPlan], Verdict[Action] | None], ...] = (
    _family_off,
    _own_traffic,
    _own_address,
    _ignored_service,
    _service_range,
    _virtual_range,
)


def plan_interception(
    settings: InterceptSettings,
    virtual_cidrs: Iterable[str],
    ignored: Mapping[str, Ignored],
    preserved: Iterable[Preserved],
    own_addresses: Iterable[str],
    capabilities: Capabilities,
) -> InterceptionPlan:
    """The desired state. ``ignored`` maps canonical addresses; ``own_addresses`` are all addresses of this node.

    NotSupported where the backend that was asked for, or every backend, is missing.
    """
    backend, why_backend = _backend(settings.backend, capabilities)
    handover, why_handover = _handover(settings.original_destination, capabilities)
    service_ranges, virtual_ranges = _canonical(settings.service_cidrs), _canonical(virtual_cidrs)
    ranges = [ip_network(text) for text in (*service_ranges, *virtual_ranges)]
    own = {str(ip_address(text)) for text in (*own_addresses, settings.address_v4, settings.address_v6) if text}
    notes = [why_backend, why_handover]
    if capabilities.ipv6:
        notes.append(Because(f"IPv6 is left alone: {capabilities.ipv6}"))
    if backend is Backend.IPTABLES and capabilities.ipset:
        notes.append(Because(f"one RETURN rule for each ignored service: {capabilities.ipset}"))
    return InterceptionPlan(
        backend=backend,
        handover=handover,
        device=settings.device,
        address_v4=settings.address_v4,
        address_v6="" if capabilities.ipv6 else settings.address_v6,
        port=settings.port,
        service_ranges=service_ranges,
        virtual_ranges=virtual_ranges,
        own=tuple(sorted(text for text in own if any(ip_address(text) in network for network in ranges))),
        ignored=dict(ignored),
        preserved=frozenset(preserved),
        use_ipset=not capabilities.ipset,
        bridge_netfilter=backend is Backend.IPTABLES and capabilities.bridge_netfilter,
        redirect_bridged=not capabilities.bridge_redirect,
        udp_timeout=backend is Backend.NFTABLES and not capabilities.udp_timeout,
        notes=tuple(notes),
    )


def ignored_addresses(services: Iterable[ServicePlan]) -> dict[str, Ignored]:
    """The addresses of all services that opted out. Of two services with one address the first by name counts."""
    found: dict[str, Ignored] = {}
    for service in sorted((s for s in services if s.ignored), key=lambda s: s.full_name):
        for address in service.cluster_ips:
            found.setdefault(str(ip_address(address)), Ignored(service.namespace, service.name, service.ignored))
    return found


def preserved_endpoints(services: Iterable[ServicePlan], node: str) -> frozenset[Preserved]:
    """The endpoints on ``node`` of services that are to see their clients' addresses (TCP ports)."""
    return frozenset(
        Preserved(member.address, member.ports[port.name])
        for service in services
        if service.preserve_client_address and not service.ignored
        for member in service.members
        if member.node == node
        for port in service.ports
        if port.protocol is Protocol.TCP and port.name in member.ports
    )


def fit_comment(text: str) -> str:
    """``text`` as every backend keeps it: printable, without quotes, and '...' for the end of what is too long."""
    raw = "".join(c if c.isprintable() and c not in "\"'\\" else "_" for c in text).encode()
    if len(raw) <= MAX_COMMENT_BYTES:
        return raw.decode()
    return raw[: MAX_COMMENT_BYTES - 3].decode(errors="ignore") + "..."


def version_of(address: str) -> int:
    """4 or 6, by the text alone."""
    return 6 if ":" in address else 4


def _backend(wanted: Backend, capabilities: Capabilities) -> tuple[Backend, Because]:
    why_not = {Backend.NFTABLES: capabilities.nftables, Backend.IPTABLES: capabilities.iptables}
    if wanted is not Backend.AUTO:
        if why_not[wanted]:
            raise NotSupported(
                f"intercepting with {wanted}: {why_not[wanted]}",
                hint="set intercept.backend to auto, or load its modules",
            )
        return wanted, Because(f"{wanted} was asked for", setting="intercept.backend")
    if not capabilities.nftables:
        return Backend.NFTABLES, Because("nftables works here")
    if not capabilities.iptables:
        return Backend.IPTABLES, Because(f"iptables, because nftables is missing: {capabilities.nftables}")
    raise NotSupported(
        f"intercepting: neither nftables ({capabilities.nftables}) nor iptables ({capabilities.iptables}) works here",
        hint="the kernel needs nf_tables or ip_tables with NAT, and nft or iptables must be installed",
    )


def _handover(wanted: OriginalDestination, capabilities: Capabilities) -> tuple[Handover, Because]:
    setting = "intercept.original-destination"
    hangs = capabilities.original_destination
    if wanted is OriginalDestination.TPROXY:
        if capabilities.tproxy:
            raise NotSupported(
                f"handing over with TPROXY: {capabilities.tproxy}", hint=f"set {setting} to auto, or load its modules"
            )
        return Handover.TPROXY, Because("TPROXY was asked for", setting=setting)
    if not hangs:
        return Handover.DNAT, Because("DNAT, the original destination by SO_ORIGINAL_DST")
    if capabilities.tproxy:
        text = f"DNAT, the original destination by conntrack's record: {hangs}; and no TPROXY: {capabilities.tproxy}"
        return Handover.DNAT, Because(text, setting=setting)
    return Handover.TPROXY, Because(f"TPROXY: {hangs}", setting=setting)


def _canonical(ranges: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(ip_network(text)) for text in ranges))


def _contains(network: str, address: str) -> bool:
    return ip_address(address) in ip_network(network)
