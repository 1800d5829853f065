"""Answers of bridged endpoints to a preserved client, led to the node instead of across the bridge to the client.

The proxy connects to an endpoint of this node from the client's own address. Endpoint and client may be ports of one
bridge; then the endpoint's answer goes straight to the client, which knows nothing of it. One own table,
``bridge isthmus``, learns each such connection when its first packet leaves the node through a bridge (it carries the
mark FROM_CLIENT), and turns frames of the opposite direction to the bridge's own hardware address. Other connections
of the same endpoint are left alone.
"""

import json

import msgspec
from pyroute2.netlink.exceptions import NetlinkError

from isthmus.kernel.netlink import attribute, route_netlink
from isthmus.kernel.nft_rules import TABLE, element_text
from isthmus.kernel.run import run
from isthmus.model.errors import NotSupported
from isthmus.model.marks import FROM_CLIENT, INTERCEPTION_MASK

FAMILY_TABLE = f"bridge {TABLE}"
FLOW_LIFE_S = 86_400
CLOSED_LIFE_S = 120
MAX_FLOWS = 65_536
PRIORITY = -310
"""Before br_netfilter (0) and before bridge rules of others (-300 and later)."""

RULES = 6
"""Two that learn and one that leads, for each IP version."""

_ADDRESS = {4: "ipv4_addr", 6: "ipv6_addr"}
_IP = {4: "ip", 6: "ip6"}


class BridgeState(msgspec.Struct, frozen=True):
    """Endpoint addresses and the hardware address of the bridge each is behind; ``whole``: every rule is there."""

    bridges: dict[str, str]
    whole: bool = True


class Bridge:
    """Reads and changes the table ``bridge isthmus``."""

    def read(self) -> BridgeState | None:
        """None where the table does not exist."""
        if not self._exists():
            return None
        bridges: dict[str, str] = {}
        rules = 0
        for item in json.loads(run(["nft", "-j", "list", "table", "bridge", TABLE]))["nftables"]:
            rules += "rule" in item
            for key, value in item.get("map", {}).get("elem", []):
                bridges[element_text(key)[0]] = value
        return BridgeState(bridges, rules == RULES)

    def replace(self, bridges: dict[str, str]) -> None:
        """Lead answers of these endpoints to these hardware addresses. Connections learnt so far are kept."""
        lines = structure() if not self._exists() else []
        for version in (4, 6):
            lines.append(f"flush map {FAMILY_TABLE} bridges{version}")
            items = [f"{text} : {mac}" for text, mac in bridges.items() if (":" in text) == (version == 6)]
            if items:
                lines.append(f"add element {FAMILY_TABLE} bridges{version} {{ {', '.join(items)} }}")
        run(["nft", "-f", "-"], "\n".join(lines) + "\n")

    def remove(self) -> bool:
        """Delete the table; False where there was none."""
        if not self._exists():
            return False
        run(["nft", "-f", "-"], f"add table {FAMILY_TABLE}\ndelete table {FAMILY_TABLE}\n")
        return True

    def _exists(self) -> bool:
        try:
            listed = json.loads(run(["nft", "-j", "list", "tables", "bridge"]))["nftables"]
        except NotSupported:
            return False
        return any(item.get("table", {}).get("name") == TABLE for item in listed)


def structure() -> list[str]:
    """The table, without elements."""
    lines = [f"table {FAMILY_TABLE} {{"]
    learn: list[str] = []
    lead: list[str] = []
    for version in (4, 6):
        ip, address = _IP[version], _ADDRESS[version]
        lines += [
            f"map bridges{version} {{ type {address} : ether_addr; }}",
            f"set flows{version} {{ type {address} . inet_service . {address} . inet_service;"
            f" flags dynamic,timeout; size {MAX_FLOWS}; }}",
        ]
        sent = f"{ip} daddr . tcp dport . {ip} saddr . tcp sport"
        mark = f"meta mark & {INTERCEPTION_MASK:#x} == {FROM_CLIENT:#x}"
        ended = "tcp flags & (fin | rst) != 0"
        learn += [
            f"{mark} {ended} update @flows{version} {{ {sent} timeout {CLOSED_LIFE_S}s }} accept",
            f"{mark} update @flows{version} {{ {sent} timeout {FLOW_LIFE_S}s }} accept",
        ]
        answered = f"{ip} saddr . tcp sport . {ip} daddr . tcp dport @flows{version}"
        lead.append(
            f"{answered} ether daddr set {ip} saddr map @bridges{version} meta pkttype set host accept"
            ' comment "answers for a preserved client"'
        )
    return [
        *lines,
        f"chain output {{ type filter hook output priority {PRIORITY}; policy accept;",
        *learn,
        "}",
        f"chain prerouting {{ type filter hook prerouting priority {PRIORITY}; policy accept;",
        *lead,
        "}",
        "}",
    ]


def bridges_of(addresses: frozenset[str]) -> dict[str, str]:
    """For each address that a bridge of this namespace leads to: the bridge's hardware address. Others are left out."""
    found: dict[str, str] = {}
    with route_netlink() as netlink:
        bridges = {link["index"]: str(attribute(link, "IFLA_ADDRESS")) for link in netlink.get_links(kind="bridge")}
        for address in sorted(addresses):
            try:
                route = next(iter(netlink.route("get", dst=address)))
            except (NetlinkError, StopIteration):
                continue  # no route: the endpoint is not there yet
            mac = bridges.get(attribute(route, "RTA_OIF"))
            if mac is not None:
                found[address] = mac
    return found
