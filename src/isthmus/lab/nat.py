"""The four NAT types as nftables rules of a router, for UDP and TCP, IPv4 and IPv6. Pure: settings in, rules out.

In the terms of RFC 4787 (UDP; RFC 5382 says the same of TCP):

| type                 | mapping (4.1)              | filtering (5)              |
|----------------------|----------------------------|----------------------------|
| full-cone            | endpoint-independent       | endpoint-independent       |
| restricted-cone      | endpoint-independent       | address-dependent          |
| port-restricted-cone | endpoint-independent       | address-and-port-dependent |
| symmetric            | address-and-port-dependent | address-and-port-dependent |

How: connection tracking alone filters by address and port, and ``fully-random`` alone maps by address and port. An
endpoint-independent mapping is remembered in two maps (``outward`` and ``inward``), written when a packet leaves and
timed by the outward packets only (REQ-6); a wider filter is a dnat through ``inward``, for anyone (full cone) or for
addresses in ``contacted`` (restricted cone). What else arrives from outside is dropped before connection tracking
confirms it: a confirmed entry would take the tuple and change the mapping of the flow that comes after.
"""

from dataclasses import dataclass

from isthmus.lab.labfile import Nat, NatType

TABLE = "lab_nat"

# Ports for a source whose own port is another source's mapping already (no port overloading, REQ-3). Apart from what
# clients use by themselves, so that two of them rarely meet.
_OTHER_PORTS = "20000-29999"

# Says in postrouting, where the interface of arrival is not known, that a packet came from inside.
_HAIRPIN, _HAIRPIN_SET = "meta mark 0x1", "meta mark set 0x1"


@dataclass(frozen=True)
class _Family:
    """An address family, and whether nft can hold address and port in one value of a map.

    nft 1.0.6 (Debian 12) gives up on maps that join an IPv6 address with anything else, so IPv6 keeps the two in two
    maps, and leaves the endpoint-independent choice of a port to the kernel, which keeps the source's own port: two
    sources behind one NAT that use the same port share it (no NAT of IPv6 in the field is better defined).
    """

    name: str
    address_type: str
    joined: bool


_IPV4 = _Family("ip", "ipv4_addr", joined=True)
_IPV6 = _Family("ip6", "ipv6_addr", joined=False)


def nat_ruleset(nat: Nat, wan_v4: str, wan_v6: str = "") -> str:
    """Return the ``nft -f`` text for a router with interfaces ``wan`` and ``lan`` and these addresses outside."""
    tables = [_table(nat, _IPV4, wan_v4)]
    if wan_v6:
        tables.append(_table(nat, _IPV6, wan_v6))
    return "\n".join(tables)


def nat_sysctls(nat: Nat) -> dict[str, str]:
    """Connection tracking times of the router, so that a mapping ends with its last flow."""
    udp, tcp = str(nat.udp_timeout_s), str(nat.tcp_timeout_s)
    return {
        "net/netfilter/nf_conntrack_udp_timeout": udp,
        "net/netfilter/nf_conntrack_udp_timeout_stream": udp,
        "net/netfilter/nf_conntrack_tcp_timeout_established": tcp,
    }


def _table(nat: Nat, family: _Family, wan: str) -> str:
    symmetric = nat.type is NatType.SYMMETRIC
    chains = [
        "" if symmetric else _memory(family),
        _chain("prerouting", "nat", "prerouting", "dstnat", _inward_rules(nat, family, wan)),
        _chain("postrouting", "nat", "postrouting", "srcnat", _outward_rules(nat, family, wan)),
        "" if symmetric else _chain("learn", "filter", "postrouting", "srcnat + 10", _learn_rules(nat, family)),
        _chain("input", "filter", "input", "filter", _guard_rules("input")),
        _chain("forward", "filter", "forward", "filter", _guard_rules("forward")),
    ]
    return f"table {family.name} {TABLE} {{\n" + "\n".join(filter(None, chains)) + "\n}\n"


def _chain(name: str, kind: str, hook: str, priority: str, rules: list[str]) -> str:
    body = "\n".join(f"    {rule}" for rule in rules)
    return f"  chain {name} {{\n    type {kind} hook {hook} priority {priority}; policy accept;\n{body}\n  }}"


def _memory(family: _Family) -> str:
    port, address, flags = "inet_proto . inet_service", family.address_type, "flags dynamic,timeout; size 65535;"
    contacted = f"  set contacted {{ type {port} . {address}; {flags} }}"
    if not family.joined:
        return (
            f"  map inward_address {{ type {port} : {address}; {flags} }}\n"
            f"  map inward_port {{ type {port} : inet_service; {flags} }}\n{contacted}"
        )
    return (
        f"  map outward {{ type inet_proto . {address} . inet_service : {address} . inet_service; {flags} }}\n"
        f"  map inward {{ type {port} : {address} . inet_service; {flags} }}\n"
        f"  set taken {{ type {port}; {flags} }}\n{contacted}"
    )


def _inward_rules(nat: Nat, family: _Family, wan: str) -> list[str]:
    """Destination NAT of what conntrack does not know yet: the filtering behaviour."""
    if nat.type not in (NatType.FULL_CONE, NatType.RESTRICTED_CONE) and not nat.hairpin:
        return []
    contacted = f"meta l4proto . th dport . {family.name} saddr @contacted "
    known = contacted if nat.type is NatType.RESTRICTED_CONE else ""
    to_inside = "dnat to meta l4proto . th dport map @inward_address : meta l4proto . th dport map @inward_port"
    if family.joined:
        to_inside = f"dnat {family.name} to meta l4proto . th dport map @inward"
    rules = []
    if nat.type in (NatType.FULL_CONE, NatType.RESTRICTED_CONE):
        rules.append(f'iifname "wan" meta l4proto {{ tcp, udp }} {known}{to_inside}')
    if nat.hairpin and nat.type is not NatType.SYMMETRIC:
        rules.append(f'iifname "lan" {family.name} daddr {wan} meta l4proto {{ tcp, udp }} {_HAIRPIN_SET} {to_inside}')
    return rules


def _outward_rules(nat: Nat, family: _Family, wan: str) -> list[str]:
    """Source NAT: the mapping behaviour. Hairpinned packets carry the outside address too (REQ-9)."""
    leaving = 'oifname "wan"'
    if nat.type is NatType.SYMMETRIC:
        return [f"{leaving} meta l4proto {{ tcp, udp }} snat to {wan} fully-random", f"{leaving} snat to {wan}"]
    rules = []
    for out in [leaving] + ([f'oifname "lan" {_HAIRPIN}'] if nat.hairpin else []):
        same = f"snat {family.name} to meta l4proto . {family.name} saddr . th sport map @outward"
        other = f"snat to {wan}:{_OTHER_PORTS} fully-random"
        if family.joined:
            rules.append(f"{out} meta l4proto {{ tcp, udp }} {same}")
            rules.append(f"{out} meta l4proto {{ tcp, udp }} meta l4proto . th sport @taken {other}")
        rules.append(f"{out} snat to {wan}")
    return rules


def _learn_rules(nat: Nat, family: _Family) -> list[str]:
    """Remember the mapping of what leaves, after source NAT; every outward packet renews it, answers too."""
    rules = []
    for protocol, timeout_s in (("udp", nat.udp_timeout_s), ("tcp", nat.tcp_timeout_s)):
        for direction in ("original", "reply"):
            out = f'oifname "wan" ct direction {direction} meta l4proto {protocol}'
            rules += [f"{out} {update}" for update in _updates(family, direction, f"timeout {timeout_s}s")]
    return rules


def _updates(family: _Family, direction: str, timeout: str) -> list[str]:
    address, port = f"ct {direction} {family.name} saddr", f"ct {direction} proto-src"
    outer = "meta l4proto . th sport"
    contacted = f"update @contacted {{ {outer} . {family.name} daddr {timeout} }}"
    if not family.joined:
        return [
            f"update @inward_address {{ {outer} {timeout} : {address} }}",
            f"update @inward_port {{ {outer} {timeout} : {port} }}",
            contacted,
        ]
    return [
        f"update @outward {{ meta l4proto . {address} . {port} {timeout} : {family.name} saddr . th sport }}",
        f"update @inward {{ {outer} {timeout} : {address} . {port} }}",
        f"update @taken {{ {outer} {timeout} }}",
        contacted,
    ]


def _guard_rules(hook: str) -> list[str]:
    if hook == "input":
        errors = "meta l4proto { icmp, icmpv6 } accept"
        return ['iifname "wan" ct state established,related accept', f'iifname "wan" {errors}', 'iifname "wan" drop']
    return [
        'iifname "wan" ct state established,related accept',
        'iifname "wan" ct status dnat accept',
        'iifname "wan" drop',
    ]
