"""Makes a topology real with netlink: every interface is created inside its namespace, none in the root's."""

import contextlib
import os
import socket
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from isthmus.lab.processes import in_namespace
from isthmus.lab.resident import NETNS_DIRECTORY, Resident, inside
from isthmus.lab.topology import Bridge, End, Place, Role, Topology, Veth
from isthmus.model.errors import IsthmusError, KernelError

# What forwards, and what a Debian node has by default: a namespace inherits settings of the host it happens to run on.
_COMMON = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "2",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    # Duplicate address detection holds an address back for a second; ours are distinct by construction.
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
_FORWARDING = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv6/conf/default/forwarding": "1"}


class LabNetworkError(IsthmusError):
    """A namespace, device, address, route or rule of the lab could not be made."""

    code = "lab.network"


def build(topology: Topology) -> None:
    """Create bridges, cables, addresses and routes in namespaces that exist. Raises LabNetworkError."""
    with _Netlinks(place.namespace for place in topology.places) as links:
        for place in topology.places:
            _start(links, place)
        for bridge in topology.bridges:
            _add_bridge(links, bridge)
        for veth in topology.veths:
            _add_veth(links, veth)
        for route in topology.routes:
            links.call(route.namespace, "route", "add", dst=route.destination, gateway=route.gateway)


def write_sysctls(namespace: str, values: Mapping[str, str]) -> None:
    """Set sysctls (paths under /proc/sys) of ``namespace``; those this kernel lacks are left out."""
    inside(namespace, lambda: _write_sysctls(values))


def _write_sysctls(values: Mapping[str, str]) -> None:
    for path, value in values.items():
        with contextlib.suppress(FileNotFoundError):
            (Path("/proc/sys") / path).write_text(value)


def run_in(namespace: str, command: list[str], stdin: str = "") -> str:
    """Run a tool to its end in ``namespace`` and return what it printed. Raises KernelError."""
    done = subprocess.run(in_namespace(namespace, command), input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"{' '.join(command)} in {namespace} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


class _Netlinks:
    """A resident with a netlink socket in every namespace, for the time of the build."""

    def __init__(self, namespaces: Iterable[str]) -> None:
        self._residents: dict[str, Resident] = {}
        self._sockets: dict[str, IPRoute] = {}
        self._indices: dict[str, dict[str, int]] = defaultdict(dict)
        try:
            for name in namespaces:
                self._residents[name] = Resident(name)
                self._sockets[name] = self._residents[name].call(IPRoute)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "_Netlinks":
        return self

    def __exit__(self, *_: object) -> None:
        for name, resident in self._residents.items():
            if name in self._sockets:
                resident.call(self._sockets[name].close)
            resident.close()

    def sysctls(self, namespace: str, values: Mapping[str, str]) -> None:
        self._residents[namespace].call(lambda: _write_sysctls(values))

    def call(self, namespace: str, what: str, command: str, **arguments: object) -> None:
        try:
            method = getattr(self._sockets[namespace], what)
            self._residents[namespace].call(lambda: method(command, **arguments))
        except NetlinkError as error:
            text = " ".join(f"{key}={value}" for key, value in arguments.items())
            raise LabNetworkError(f"{what} {command} {text} in {namespace}: {error.args[1]}") from error

    def index(self, namespace: str, name: str) -> int:
        known = self._indices[namespace]
        if name not in known:
            socket_there = self._sockets[namespace]
            found = self._residents[namespace].call(lambda: socket_there.link_lookup(ifname=name))
            if not found:
                raise LabNetworkError(f"there is no interface {name} in {namespace}")
            known[name] = found[0]
        return known[name]

    def up(self, namespace: str, name: str, addresses: Iterable[str]) -> None:
        index = self.index(namespace, name)
        self.call(namespace, "link", "set", index=index, state="up")
        for address in addresses:
            ip, _, length = address.partition("/")
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            self.call(namespace, "addr", "add", index=index, address=ip, prefixlen=int(length), family=family)


def _start(links: _Netlinks, place: Place) -> None:
    forwards = place.role in (Role.INTERNET, Role.ROUTER, Role.NODE)
    links.sysctls(place.namespace, _COMMON | (_FORWARDING if forwards else {}))
    links.up(place.namespace, "lo", ())


def _add_bridge(links: _Netlinks, bridge: Bridge) -> None:
    links.call(bridge.namespace, "link", "add", ifname=bridge.name, kind="bridge")
    links.up(bridge.namespace, bridge.name, bridge.addresses)


def _add_veth(links: _Netlinks, veth: Veth) -> None:
    near, far = veth.near, veth.far
    there = os.open(NETNS_DIRECTORY / far.namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        peer = {"ifname": far.name, "net_ns_fd": there}
        links.call(near.namespace, "link", "add", ifname=near.name, kind="veth", peer=peer)
    finally:
        os.close(there)
    for end in (far, near):
        _plug(links, end)


def _plug(links: _Netlinks, end: End) -> None:
    if end.master:
        master = links.index(end.namespace, end.master)
        links.call(end.namespace, "link", "set", index=links.index(end.namespace, end.name), master=master)
    links.up(end.namespace, end.name, end.addresses)


def etc_directory(namespace: str) -> Path:
    """Where ``ip netns exec`` finds the files that cover those of /etc in ``namespace``."""
    return Path("/etc/netns") / namespace
