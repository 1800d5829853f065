"""The interception plan as nftables commands, in nft's own language. Pure: nothing here runs anything.

Not in libnftables-json(5): nft 1.0.6 (Debian 12) silently drops the policy of a ``ct timeout`` object given as JSON.

One table ``inet isthmus``; exceptions and ranges are sets, so ten thousand of either cost one look-up. Priorities:
NAT at -190, after conntrack (-200) and before every NAT chain that others make (iptables and kube-proxy -100,
firewalld -90): the first NAT chain that binds a connection wins, and a connection that ours returns is still theirs.
TPROXY marks at -140, after mangle rules of others (-150), so that none of them changes the mark before it is used.
"""

from collections.abc import Iterable
from typing import Any

from isthmus.model.marks import INTERCEPTION_MASK, OWN, TO_SOCKET
from isthmus.plan.interception import Handover, InterceptionPlan

TABLE = "isthmus"
FAMILY_TABLE = f"inet {TABLE}"
PRIORITY_UNTRACK = -300
PRIORITY_NAT = -190
PRIORITY_TO_SOCKET = -140

UDP_TIMEOUT_S = 200
"""How long conntrack keeps a silent redirected UDP flow: longer than the proxy's sessions live (180 s)."""

Elements = dict[str, dict[str, str]]
"""Set name to its elements: the text of each element to its comment ('': none)."""

_IP = {4: "ip", 6: "ip6"}
_OWN = f"meta mark & {OWN:#x} == {OWN:#x}"
_TO_SOCKET = f"meta mark set meta mark & {0xFFFFFFFF ^ INTERCEPTION_MASK:#x} | {TO_SOCKET:#x}"
_BOTH = "meta l4proto { tcp, udp }"
_BRIDGED = 'meta iifkind "bridge" return comment "bridged packets lose their socket on the way"'


def structure(plan: InterceptionPlan) -> list[str]:
    """The table with everything but the elements of its sets, as one block that ``nft -f`` reads."""
    lines = [f"table {FAMILY_TABLE} {{"]
    for version in plan.versions():
        lines += _objects(version, plan.udp_timeout)
    lines += _nat_chains(plan)
    if plan.handover is Handover.TPROXY:
        lines += _tproxy_chains(plan)
    if plan.handover is Handover.TPROXY or plan.preserved:
        lines += _to_socket_chain(plan)
    return [*lines, "}"]


def elements(plan: InterceptionPlan) -> Elements:
    """What the sets hold."""
    found: Elements = {}
    for version in plan.versions():
        found[f"exceptions{version}"] = plan.exceptions(version)
        found[f"ranges{version}"] = dict.fromkeys(plan.taken(version), "")
        found[f"preserved{version}"] = {
            f"{end.address} . {end.port}": "" for end in plan.preserved if (":" in end.address) == (version == 6)
        }
    return found


def add_elements(name: str, items: dict[str, str]) -> str:
    """The command that adds ``items`` to a set."""
    listed = ", ".join(f'{text} comment "{note}"' if note else text for text, note in items.items())
    return f"add element {FAMILY_TABLE} {name} {{ {listed} }}"


def delete_elements(name: str, items: Iterable[str]) -> str:
    """The command that takes ``items`` out of a set."""
    return f"delete element {FAMILY_TABLE} {name} {{ {', '.join(items)} }}"


def element_text(raw: Any) -> tuple[str, str]:
    """(text, comment) of an element as ``nft -j`` lists it: the inverse of what ``add_elements`` writes."""
    comment = ""
    if isinstance(raw, dict) and "elem" in raw:
        comment = raw["elem"].get("comment", "")
        raw = raw["elem"]["val"]
    if isinstance(raw, dict) and "prefix" in raw:
        return f"{raw['prefix']['addr']}/{raw['prefix']['len']}", comment
    if isinstance(raw, dict) and "concat" in raw:
        return " . ".join(map(str, raw["concat"])), comment
    return str(raw), comment


def _objects(version: int, udp_timeout: bool) -> list[str]:
    address = "ipv4_addr" if version == 4 else "ipv6_addr"
    policy = f"policy = {{ unreplied: {UDP_TIMEOUT_S}, replied: {UDP_TIMEOUT_S} }}"
    timeout = [f"ct timeout udp{version} {{ protocol udp; l3proto {_IP[version]}; {policy}; }}"]
    return [
        *(timeout if udp_timeout else ()),
        f"set exceptions{version} {{ type {address}; }}",
        f"set ranges{version} {{ type {address}; flags interval; }}",
        f"set preserved{version} {{ type {address} . inet_service; }}",
    ]


def _nat_chains(plan: InterceptionPlan) -> list[str]:
    rules = _returns(plan)
    for version in plan.versions():
        ip, dnat = _IP[version], f"dnat {_IP[version]} to {_target(plan, version)}"
        timeout = f"ct timeout set udp{version} " if plan.udp_timeout else ""
        rules += [
            f'{ip} daddr @ranges{version} meta l4proto tcp {dnat} comment "tcp service proxy"',
            f'{ip} daddr @ranges{version} meta l4proto udp {timeout}{dnat} comment "udp service proxy"',
        ]
    root = ['jump isthmus comment "isthmus root chain"']
    return [
        *_chain("isthmus", rules),
        *_chain("prerouting", root, "nat hook prerouting", PRIORITY_NAT),
        *_chain("output", root, "nat hook output", PRIORITY_NAT),
    ]


def _tproxy_chains(plan: InterceptionPlan) -> list[str]:
    """Untrack first, so that no NAT chain of others changes the destination; then mark what leaves a process here."""
    untrack, mark, answers = _returns(plan), _returns(plan), []
    for version in plan.versions():
        ip = _IP[version]
        untrack.append(f'{ip} daddr @ranges{version} {_BOTH} notrack comment "service proxy"')
        mark.append(f'{ip} daddr @ranges{version} {_BOTH} {_TO_SOCKET} comment "service proxy"')
        answers.append(f'{_OWN} {ip} saddr @ranges{version} {_BOTH} notrack comment "answers of transparent sockets"')
    jump = 'jump untrack comment "isthmus untrack chain"'
    return [
        *_chain("untrack", untrack),
        *_chain("untrack-in", [_BRIDGED, jump], "filter hook prerouting", PRIORITY_UNTRACK),
        *_chain("untrack-out", [*answers, jump], "filter hook output", PRIORITY_UNTRACK),
        *_chain("mark-out", mark, "route hook output", PRIORITY_TO_SOCKET),
    ]


def _to_socket_chain(plan: InterceptionPlan) -> list[str]:
    rules = [
        f"{_IP[version]} saddr . tcp sport @preserved{version} socket transparent 1 {_TO_SOCKET} accept"
        ' comment "answers for a preserved client"'
        for version in plan.versions()
    ]
    if plan.handover is Handover.TPROXY:
        rules += [_BRIDGED, *_returns(plan)]
        for version in plan.versions():
            ip, tproxy = _IP[version], f"tproxy {_IP[version]} to {_target(plan, version)}"
            rules.append(f'{ip} daddr @ranges{version} {_BOTH} {tproxy} {_TO_SOCKET} accept comment "service proxy"')
    return _chain("to-socket", rules, "filter hook prerouting", PRIORITY_TO_SOCKET)


def _returns(plan: InterceptionPlan) -> list[str]:
    rules = [f'{_OWN} return comment "own traffic"']
    for version in plan.versions():
        note = 'comment "ignored services and own addresses"'
        rules.append(f"{_IP[version]} daddr @exceptions{version} return {note}")
    return rules


def _target(plan: InterceptionPlan, version: int) -> str:
    address = plan.address(version)
    return f"{address}:{plan.port}" if version == 4 else f"[{address}]:{plan.port}"


def _chain(name: str, rules: list[str], hook: str = "", priority: int = 0) -> list[str]:
    head = [f"type {hook} priority {priority}; policy accept;"] if hook else []
    return [f"chain {name} {{", *head, *rules, "}"]
