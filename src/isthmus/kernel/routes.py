"""The way to transparent sockets: packets with our mark are looked up in our table, where every address is local.

One ip rule and one route for each IP version. Both carry our protocol number, and the rule our mark, mask and table,
so that they are recognised; the number keeps routing daemons from taking them for theirs.
"""

import errno
import socket
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from isthmus.kernel.netlink import attribute, refused, route_netlink
from isthmus.model.marks import INTERCEPTION_MASK, TO_SOCKET

ROUTE_PROTOCOL = 169
"""Ours; unused in /etc/iproute2/rt_protos."""
TABLE = 16_910
RULE_PRIORITY = 90
"""After the rule for the local table (0), before those of others (Tailscale 5210, Cilium 9 and 100, main 32766)."""

_LOCAL = 2  # RTN_LOCAL
_LOOPBACK = "lo"
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class Routes:
    """Reads, makes and removes the rule and the route of each IP version."""

    def read(self) -> frozenset[str]:
        """What is there of ``rule4``, ``route4``, ``rule6`` and ``route6``."""
        with route_netlink() as netlink:
            return frozenset(name for version in (4, 6) for name in _present(netlink, version))

    def apply(self, versions: tuple[int, ...]) -> tuple[str, ...]:
        """Have both for exactly these IP versions; what was changed, in words."""
        done: list[str] = []
        with route_netlink() as netlink:
            for version in (4, 6):
                present = _present(netlink, version)
                for name in (f"route{version}", f"rule{version}"):
                    if version in versions and name not in present:
                        _change(netlink, "add", name)
                        done.append(f"{_words(name)} made")
                    if version not in versions and name in present:
                        _change(netlink, "del", name)
                        done.append(f"{_words(name)} deleted")
        return tuple(done)

    def remove(self) -> bool:
        """Delete all of ours; False where there was nothing."""
        return bool(self.apply(()))


def _words(name: str) -> str:
    what = "rule" if name.startswith("rule") else "route"
    return f"IPv{name[-1]} {what} for marked packets (table {TABLE})"


def _present(netlink: Any, version: int) -> set[str]:
    found: set[str] = set()
    try:
        for rule in netlink.get_rules(family=_FAMILY[version]):
            if _is_ours(rule):
                found.add(f"rule{version}")
        for route in netlink.get_routes(family=_FAMILY[version], table=TABLE):
            if route["proto"] == ROUTE_PROTOCOL and route["type"] == _LOCAL:
                found.add(f"route{version}")
    except NetlinkError as error:
        if error.code not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
            raise refused(f"reading IPv{version} rules", error) from error
    return found


def _is_ours(rule: Any) -> bool:
    return bool(
        attribute(rule, "FRA_TABLE") == TABLE
        and attribute(rule, "FRA_FWMARK") == TO_SOCKET
        and attribute(rule, "FRA_FWMASK") == INTERCEPTION_MASK
    )


def _change(netlink: Any, verb: str, name: str) -> None:
    family = _FAMILY[int(name[-1])]
    try:
        if name.startswith("rule"):
            netlink.rule(
                verb,
                family=family,
                table=TABLE,
                priority=RULE_PRIORITY,
                fwmark=TO_SOCKET,
                fwmask=INTERCEPTION_MASK,
                protocol=ROUTE_PROTOCOL,
            )
        else:
            netlink.route(
                verb,
                family=family,
                table=TABLE,
                dst="0.0.0.0/0" if family == socket.AF_INET else "::/0",
                type="local",
                scope="host",
                oif=netlink.link_lookup(ifname=_LOOPBACK)[0],
                proto=ROUTE_PROTOCOL,
            )
    except NetlinkError as error:
        if error.code not in (errno.EEXIST, errno.ENOENT, errno.ESRCH):
            raise refused(f"{_words(name)}: {verb}", error) from error
