"""Netfilter rules as Docker and kube-proxy leave them on a node, for both flavours of iptables."""

import re

from kernel_node import sh

_SERVICES = (  # cluster address suffix, protocol, port, endpoint port; 80 is intercepted, so its endpoint leads nowhere
    ("API", "1", "tcp", 443, ":6443"),
    ("DNS", "10", "udp", 53, ":6443"),
    ("WEB", "80", "tcp", 80, "DEAD:8080"),
    ("LOG", "80", "udp", 514, "DEAD:8080"),
)

_NAT = """*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
{chains}-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s {pods} ! -o br0 -j MASQUERADE
-A DOCKER -i br0 -j RETURN
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE
{services}-A KUBE-SERVICES -m comment --comment "service nodeports; last" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"""

_FILTER = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -j DOCKER-USER
-A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o br0 -j DOCKER
-A FORWARD -i br0 ! -o br0 -j ACCEPT
-A FORWARD -i br0 -o br0 -j ACCEPT
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -j RETURN
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""

_MANGLE = """*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
-A PREROUTING -j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000
-A OUTPUT -j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
"""


_NATIVE = """table inet site_firewall {
    set blocked { type ipv4_addr; elements = { 203.0.113.9 comment "not ours" } }
    chain input { type filter hook input priority filter; policy accept; ip saddr @blocked counter drop; }
    chain early { type nat hook prerouting priority dstnat + 5; policy accept; tcp dport 8443 redirect to :443; }
}
"""

_SETTINGS = "net.(bridge|netfilter.nf_conntrack_udp|ipv[46].conf.*(rp_filter|forward))"


def foreign_rules(version: int) -> str:
    """The text for iptables-restore (4) or ip6tables-restore (6)."""
    prefix, pods, end, dead = (
        ("10.96.0.", "172.17.0.0/16", "172.17.0.3", "172.17.0.99")
        if version == 4
        else ("fd00:10:96::", "fd00:17::/64", "fd00:17::3", "fd00:17::99")
    )
    chains, rules = "", ""
    for name, suffix, protocol, port, target in _SERVICES:
        address, _, target_port = target.partition(":")
        to = dead if address else end
        shown = f"{to}:{target_port}" if version == 4 else f"[{to}]:{target_port}"
        service, separate = f"KUBE-SVC-{name}XXXXXXXXXX", f"KUBE-SEP-{name}YYYYYYYYYY"
        chains += f":{separate} - [0:0]\n:{service} - [0:0]\n"
        rules += (
            f"-A {separate} -s {to} -m comment --comment default/{name.lower()} -j KUBE-MARK-MASQ\n"
            f"-A {separate} -p {protocol} -m comment --comment default/{name.lower()} -m {protocol}"
            f" -j DNAT --to-destination {shown}\n"
            f"-A KUBE-SERVICES -d {prefix}{suffix} -p {protocol} -m comment"
            f' --comment "default/{name.lower()} cluster IP" -m {protocol} --dport {port} -j {service}\n'
            f"-A {service} ! -s {pods} -j KUBE-MARK-MASQ\n"
            f"-A {service} -m comment --comment default/{name.lower()} -j {separate}\n"
        )
    return _NAT.format(chains=chains, services=rules, pods=pods) + _FILTER + _MANGLE


def lay(namespace: str, flavour: str) -> None:
    """Load the rules with one flavour of iptables ("legacy", "nft"); with "" none."""
    if flavour:
        sh(f"iptables-{flavour}-restore", namespace, foreign_rules(4))
        sh(f"ip6tables-{flavour}-restore", namespace, foreign_rules(6))
        if flavour == "nft":
            sh("nft -f -", namespace, _NATIVE)


def listing(namespace: str) -> str:
    """Everything that could have been touched, without counters, dates, handles and what carries our tag."""
    parts = [
        sh("for t in iptables ip6tables; do $t-legacy-save; $t-nft-save; done 2>/dev/null", namespace),
        sh("nft list ruleset", namespace),
        sh("ipset save", namespace),
        sh(
            "ip rule; ip -6 rule; ip -o link; ip -o addr; ip route show table all; ip -6 route show table all",
            namespace,
        ),
        sh(
            f"sysctl -a 2>/dev/null | grep -E '{_SETTINGS}'",
            namespace,
        ),
    ]
    text = re.sub(r"\[\d+:\d+\]|counter packets \d+ bytes \d+", "", "\n".join(parts))
    # Tables of iptables-nft are compared as iptables-nft-save prints them, where our lines can be told by their words.
    text = re.sub(r"(?ms)^table (inet|bridge) isthmus \{.*?^\}\n", "", text)
    text = re.sub(r"(?ms)^table ip6? (raw|mangle|nat|filter) \{.*?^\}\n", "", text)
    lines = [line for line in text.splitlines() if not re.search(r"(?i)isthmus|^#|proto 169", line)]
    return "\n".join(line.rstrip() for line in lines)
