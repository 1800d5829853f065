"""The interception plan as iptables rules and ipset entries. Pure: nothing here runs anything.

The shape is that of kernel/nft_rules.py: a jump from PREROUTING and one from OUTPUT into our chain of each table, both
first. NAT is always there; raw and mangle are used with TPROXY, and mangle for answers for a preserved client.
"""

import msgspec

from isthmus.model.marks import INTERCEPTION_MASK, OWN, TO_SOCKET
from isthmus.plan.interception import CHAIN, Handover, InterceptionPlan

CHAIN_OUT = f"{CHAIN}-OUT"
CHAINS = (CHAIN, CHAIN_OUT)
TABLES = ("raw", "mangle", "nat")
ROOT_COMMENT = "isthmus root chain"

_OWN = f"-m mark --mark {OWN:#x}/{OWN:#x}"
_TO_SOCKET = f"{TO_SOCKET:#x}/{INTERCEPTION_MASK:#x}"
_BRIDGED = '-m physdev --physdev-is-in -m comment --comment "bridged packets lose their socket on the way" -j RETURN'


class TableRules(msgspec.Struct, frozen=True):
    """One table: each of our chains with its rules, and the chain that each hook jumps to."""

    chains: dict[str, tuple[str, ...]]
    jumps: dict[str, str]


def exceptions_set(version: int) -> str:
    return f"isthmus-exceptions{version}"


def preserved_set(version: int) -> str:
    return f"isthmus-preserved{version}"


def sets(plan: InterceptionPlan) -> dict[str, dict[str, str]]:
    """Set name to its entries: text of the entry to its comment. Empty where ipset is not used."""
    if not plan.use_ipset:
        return {}
    found: dict[str, dict[str, str]] = {}
    for version in plan.versions():
        found[exceptions_set(version)] = plan.exceptions(version)
        found[preserved_set(version)] = {
            f"{end.address},tcp:{end.port}": "" for end in plan.preserved if (":" in end.address) == (version == 6)
        }
    return found


def tables(plan: InterceptionPlan, version: int) -> dict[str, TableRules]:
    """Table name to its rules, for one IP version; tables that hold nothing of ours are left out."""
    if version not in plan.versions():
        return {}
    found = {"nat": _nat(plan, version)}
    if plan.handover is Handover.TPROXY:
        found["raw"] = _raw(plan, version)
    if plan.handover is Handover.TPROXY or plan.preserved:
        found["mangle"] = _mangle(plan, version)
    return found


def exception_rule(address: str, comment: str) -> str:
    """The rule that returns one address, where ipset is not used."""
    return f'-d {address}/{128 if ":" in address else 32} -m comment --comment "{comment}" -j RETURN'


def _nat(plan: InterceptionPlan, version: int) -> TableRules:
    address = plan.address(version)
    target = f"{address}:{plan.port}" if version == 4 else f"[{address}]:{plan.port}"
    taken = [
        _service(text, protocol, f"{protocol} service proxy", f"DNAT --to-destination {target}")
        for text in plan.taken(version)
        for protocol in ("tcp", "udp")
    ]
    return TableRules({CHAIN: (*_returns(plan, version), *taken)}, {"PREROUTING": CHAIN, "OUTPUT": CHAIN})


def _raw(plan: InterceptionPlan, version: int) -> TableRules:
    """Untracked packets pass by every NAT rule, so nobody changes the destination of what goes to a socket."""
    untrack = _each(plan, version, "service proxy", "CT --notrack")
    answers = [
        f'-s {text} -p {protocol} {_OWN} -m comment --comment "answers of transparent sockets" -j CT --notrack'
        for text in plan.taken(version)
        for protocol in ("tcp", "udp")
    ]
    returns = _returns(plan, version)
    return TableRules(
        {CHAIN: (*_bridged(plan), *returns, *untrack), CHAIN_OUT: (*answers, *returns, *untrack)},
        {"PREROUTING": CHAIN, "OUTPUT": CHAIN_OUT},
    )


def _mangle(plan: InterceptionPlan, version: int) -> TableRules:
    mark = f"MARK --set-xmark {_TO_SOCKET}"
    answers = [rule for match in _preserved(plan, version) for rule in (f"{match} -j {mark}", f"{match} -j ACCEPT")]
    if plan.handover is Handover.DNAT:
        return TableRules({CHAIN: tuple(answers)}, {"PREROUTING": CHAIN})
    tproxy = f"TPROXY --on-port {plan.port} --on-ip {plan.address(version)} --tproxy-mark {_TO_SOCKET}"
    returns = _returns(plan, version)
    marked = [
        _service(text, protocol, "service proxy", verdict)
        for text in plan.taken(version)
        for protocol in ("tcp", "udp")
        for verdict in (mark, "ACCEPT")
    ]
    arriving = (*answers, *_bridged(plan), *returns, *_each(plan, version, "service proxy", tproxy))
    return TableRules({CHAIN: arriving, CHAIN_OUT: (*returns, *marked)}, {"PREROUTING": CHAIN, "OUTPUT": CHAIN_OUT})


def _preserved(plan: InterceptionPlan, version: int) -> list[str]:
    tail = '-m socket --transparent -m comment --comment "answers for a preserved client"'
    if plan.use_ipset:
        return [f"-p tcp -m set --match-set {preserved_set(version)} src,src {tail}"]
    ends = sorted(end for end in plan.preserved if (":" in end.address) == (version == 6))
    return [f"-s {end.address} -p tcp -m tcp --sport {end.port} {tail}" for end in ends]


def _bridged(plan: InterceptionPlan) -> list[str]:
    return [_BRIDGED] if plan.bridge_netfilter else []


def _returns(plan: InterceptionPlan, version: int) -> list[str]:
    rules = [f'{_OWN} -m comment --comment "own traffic" -j RETURN']
    if plan.use_ipset:
        note = '-m comment --comment "ignored services and own addresses"'
        return [*rules, f"-m set --match-set {exceptions_set(version)} dst {note} -j RETURN"]
    return rules + [exception_rule(*item) for item in sorted(plan.exceptions(version).items())]


def _each(plan: InterceptionPlan, version: int, comment: str, target: str) -> list[str]:
    return [_service(text, protocol, comment, target) for text in plan.taken(version) for protocol in ("tcp", "udp")]


def _service(network: str, protocol: str, comment: str, target: str) -> str:
    return f'-d {network} -p {protocol} -m comment --comment "{comment}" -j {target}'
