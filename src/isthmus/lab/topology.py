"""What a lab consists of, computed from its file: namespaces, bridges, veth pairs, addresses, routes. Pure.

                          internet (namespace)
              public bridge             access bridge
             203.0.113.0/24            198.51.100.0/24
              /     |     \\              /         \\
          host    node    node       router      router        a NAT each
                                       | lan       | lan       192.168.1.0/24 behind every one of them
                                     node        node
                                       | docker0   | docker0   172.17.0.0/16 on every one of them
                                     pods        pods

Addresses are from the documentation ranges (RFC 5737, RFC 3849), or private and overlapping, as they are in the field.
"""

import hashlib
import ipaddress
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

from isthmus.lab.labfile import LabFile, Node, Pod, Site

PUBLIC_V4, PUBLIC_V6 = IPv4Network("203.0.113.0/24"), IPv6Network("2001:db8:a::/64")
ACCESS_V4, ACCESS_V6 = IPv4Network("198.51.100.0/24"), IPv6Network("2001:db8:b::/64")
LAN_V4, LAN_V6 = IPv4Network("192.168.1.0/24"), IPv6Network("fd00:c0a8:1::/64")
PODS_V4, PODS_V6 = IPv4Network("172.17.0.0/16"), IPv6Network("fd00:ac11::/64")
FIRST_NODE, FIRST_HOST, FIRST_ROUTER = 11, 101, 11

Address = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network


class DoesNotFit(ValueError):
    """A value of the lab file contradicts another; ``path`` leads to it."""

    def __init__(self, path: tuple[str | int, ...], problem: str) -> None:
        super().__init__(problem)
        self.path = path


class Role(StrEnum):
    """What a namespace stands for."""

    INTERNET = "internet"
    ROUTER = "router"
    NODE = "node"
    HOST = "host"
    POD = "pod"


@dataclass(frozen=True)
class Place:
    """A network namespace. ``label`` is what the user calls it; ``addresses`` lead with the IPv4 one."""

    namespace: str
    role: Role
    label: str
    site: str = ""
    node: str = ""
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    pod_bridge: str = ""


@dataclass(frozen=True)
class Bridge:
    """A bridge in a namespace, with the addresses of that namespace on it (with prefix lengths)."""

    namespace: str
    name: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class End:
    """One end of a veth pair: a port of bridge ``master``, or an interface with addresses."""

    namespace: str
    name: str
    addresses: tuple[str, ...] = ()
    master: str = ""


@dataclass(frozen=True)
class Veth:
    """A cable."""

    near: End
    far: End


@dataclass(frozen=True)
class Route:
    """A route in a namespace."""

    namespace: str
    destination: str
    gateway: str


@dataclass
class Topology:
    """All of it, in the order in which it is made."""

    lab: str
    places: list[Place] = field(default_factory=list)
    bridges: list[Bridge] = field(default_factory=list)
    veths: list[Veth] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)

    def of(self, role: Role) -> list[Place]:
        """Return the places with ``role``."""
        return [place for place in self.places if place.role is role]


def prefix(lab: str) -> str:
    """What the namespaces of ``lab`` begin with; names of labs hold no '-', so no two labs share a prefix."""
    return f"isthmus-{lab}-"


def port_name(namespace: str, interface: str) -> str:
    """A bridge port's name: always the same for the same cable, and within the kernel's 15 characters."""
    return "veth" + hashlib.sha256(f"{namespace}/{interface}".encode()).hexdigest()[:8]


def plan_topology(lab: LabFile) -> Topology:
    """Return the topology of ``lab``. Raises DoesNotFit."""
    return _Planner(lab).plan()


class _Planner:
    def __init__(self, lab: LabFile) -> None:
        self.lab = lab
        self.out = Topology(lab.name)
        self.internet = prefix(lab.name) + "internet"

    def plan(self) -> Topology:
        self._internet()
        for index, site in enumerate(site for site in self.lab.sites if not site.public):
            self._router(index, site)
        for index, host in enumerate(self.lab.hosts):
            number = self._number(("hosts", index, "address"), host.address, PUBLIC_V4, FIRST_HOST + index)
            place = self._attach(host.name, Role.HOST, "", number, PUBLIC_V4, PUBLIC_V6, self.internet, "public")
            self.out.places.append(place)
        counts: dict[str, int] = {}
        for index, node in enumerate(self.lab.nodes):
            counts[node.site] = counts.get(node.site, -1) + 1
            self._node(index, counts[node.site], node)
        self._routes_between_public_nodes()
        self._pods()
        self._check_unique()
        return self.out

    def _families(self, *pairs: tuple[Network, int]) -> tuple[str, ...]:
        """Addresses with prefix lengths: the number-th of each network, IPv6 only where the lab is dual-stack."""
        chosen = pairs if self.lab.dual_stack else [pair for pair in pairs if pair[0].version == 4]
        return tuple(f"{network[number]}/{network.prefixlen}" for network, number in chosen)

    def _internet(self) -> None:
        self.out.places.append(Place(self.internet, Role.INTERNET, "internet"))
        public = self._families((PUBLIC_V4, 1), (PUBLIC_V6, 1))
        access = self._families((ACCESS_V4, 1), (ACCESS_V6, 1))
        self.out.bridges.append(Bridge(self.internet, "public", public))
        self.out.bridges.append(Bridge(self.internet, "access", access))

    def _router(self, index: int, site: Site) -> None:
        at: tuple[str | int, ...] = ("sites", self.lab.sites.index(site), "wan-address")
        number = self._number(at, site.wan_address, ACCESS_V4, FIRST_ROUTER + index)
        name = f"{site.name}.router"
        place = self._attach(name, Role.ROUTER, site.name, number, ACCESS_V4, ACCESS_V6, self.internet, "access", "wan")
        self.out.places.append(place)
        lan = self._families((_lan(site), 1), (LAN_V6, 1))
        self.out.bridges.append(Bridge(place.namespace, "lan", lan))

    def _node(self, index: int, count: int, node: Node) -> None:
        site = next(site for site in self.lab.sites if site.name == node.site)
        v4, v6 = (PUBLIC_V4, PUBLIC_V6) if site.public else (_lan(site), LAN_V6)
        switch = (self.internet, "public") if site.public else (prefix(self.lab.name) + f"{site.name}.router", "lan")
        number = self._number(("nodes", index, "address"), node.address, v4, FIRST_NODE + count)
        place = self._attach(node.name, Role.NODE, node.site, number, v4, v6, *switch)
        pods_v4 = IPv4Network(node.pod_cidr or (f"10.244.{count + 1}.0/24" if site.public else str(PODS_V4)))
        pods_v6 = IPv6Network(f"2001:db8:244:{count + 1}::/64") if site.public else PODS_V6
        bridge = node.bridge or ("cni0" if site.public else "docker0")
        gateway = self._families((pods_v4, 1), (pods_v6, 1))
        self.out.bridges.append(Bridge(place.namespace, bridge, gateway))
        cidrs = (str(pods_v4), str(pods_v6)) if self.lab.dual_stack else (str(pods_v4),)
        self.out.places.append(
            Place(
                place.namespace,
                Role.NODE,
                node.name,
                node.site,
                node.name,
                place.addresses,
                pod_cidrs=cidrs,
                pod_bridge=bridge,
            )
        )

    def _attach(
        self,
        label: str,
        role: Role,
        site: str,
        number: int,
        v4: IPv4Network,
        v6: IPv6Network,
        switch: str,
        bridge: str,
        interface: str = "eth0",
    ) -> Place:
        """Plug a namespace into ``bridge`` of namespace ``switch``, with a default route to the first address there."""
        namespace = prefix(self.lab.name) + label
        addresses = self._families((v4, number), (v6, number))
        far = End(switch, port_name(namespace, interface), master=bridge)
        self.out.veths.append(Veth(End(namespace, interface, addresses), far))
        for gateway in self._families((v4, 1), (v6, 1)):
            address = ipaddress.ip_interface(gateway).ip
            self.out.routes.append(Route(namespace, "default" if address.version == 4 else "::/0", str(address)))
        bare = tuple(each.split("/")[0] for each in addresses)
        return Place(namespace, role, label, site, addresses=bare)

    def _routes_between_public_nodes(self) -> None:
        """Pod ranges of public nodes are real: every public node, and the internet's router, knows the way."""
        public = {site.name for site in self.lab.sites if site.public}
        nodes = [place for place in self.out.of(Role.NODE) if place.site in public]
        for here in [self.internet, *(place.namespace for place in nodes)]:
            for there in nodes:
                if there.namespace == here:
                    continue
                for cidr, gateway in zip(there.pod_cidrs, there.addresses, strict=True):
                    self.out.routes.append(Route(here, cidr, gateway))

    def _pods(self) -> None:
        used: dict[str, set[int]] = {}
        for pod in self.lab.pods:
            if pod.address:
                used.setdefault(pod.node, set()).add(int(ipaddress.IPv4Address(pod.address)))
        for index, pod in enumerate(self.lab.pods):
            node = next(place for place in self.out.of(Role.NODE) if place.label == pod.node)
            self._pod(index, pod, node, used.setdefault(pod.node, set()))

    def _pod(self, index: int, pod: Pod, node: Place, used: set[int]) -> None:
        v4 = IPv4Network(node.pod_cidrs[0])
        base = int(v4.network_address)
        free = next(number for number in range(2, v4.num_addresses) if base + number not in used)
        number = self._number(("pods", index, "address"), pod.address, v4, free)
        used.add(base + number)
        v6 = IPv6Network(node.pod_cidrs[1]) if self.lab.dual_stack else PODS_V6
        label = f"{pod.namespace}/{pod.name}"
        place = self._attach(
            f"{pod.namespace}.{pod.name}", Role.POD, node.site, number, v4, v6, node.namespace, node.pod_bridge
        )
        self.out.places.append(Place(place.namespace, Role.POD, label, node.site, node.label, place.addresses))

    def _number(self, path: tuple[str | int, ...], text: str, network: IPv4Network, default: int) -> int:
        """Return the position of ``text`` in ``network``."""
        if not text:
            return default
        address = ipaddress.IPv4Address(text)
        number = int(address) - int(network.network_address)
        if address not in network or number in (0, network.num_addresses - 1):
            raise DoesNotFit(path, f"{text} is not a host of {network}")
        if number == 1:
            raise DoesNotFit(path, f"{text} is the gateway of {network}")
        return number

    def _check_unique(self) -> None:
        seen: dict[str, str] = {}
        for place in self.out.places:
            if place.namespace in seen:
                raise DoesNotFit((), f"'{place.label}' and '{seen[place.namespace]}' need the same namespace name")
            seen[place.namespace] = place.label
        public = {site.name for site in self.lab.sites if site.public}
        owners: dict[tuple[str, str], str] = {}
        for place in self.out.places:
            scope = place.node if place.role is Role.POD else "" if place.site in public else place.site
            if place.role is Role.ROUTER:
                scope = ""
            for address in place.addresses:
                other = owners.setdefault((scope + ("/pods" if place.role is Role.POD else ""), address), place.label)
                if other != place.label:
                    raise DoesNotFit((), f"'{place.label}' and '{other}' have the same address {address}")


def _lan(site: Site) -> IPv4Network:
    return IPv4Network(site.lan) if site.lan else LAN_V4
