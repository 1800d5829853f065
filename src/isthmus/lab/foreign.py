"""Netfilter rules of other software on a node: what they leave there, and how to prove that nothing changed them.

The sets are the shapes that Docker, flannel, kube-proxy (iptables mode) and libvirt are known to leave, written for the
lab's own addresses. They are loaded with iptables-restore, legacy or nft, as the node's field ``iptables`` says.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from isthmus.lab.labfile import ForeignSet, Iptables
from isthmus.lab.network import run_in
from isthmus.lab.topology import Place

_DOCKER = """\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s {pods} ! -o {bridge} -j MASQUERADE
-A DOCKER -i {bridge} -j RETURN
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o {bridge} -j DOCKER
-A FORWARD -i {bridge} ! -o {bridge} -j ACCEPT
-A FORWARD -i {bridge} -o {bridge} -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i {bridge} ! -o {bridge} -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o {bridge} -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""

_FLANNEL = """\
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {pods} -d {cluster} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {cluster} -d {pods} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s {cluster} -d {pods} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {cluster} ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {cluster} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {cluster} -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"""

# The rules for default/kubernetes and kube-system/kube-dns: every kube-proxy has these two.
_KUBE_PROXY = """\
*mangle
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-LAB6443MASTER000 - [0:0]
:KUBE-SEP-LABDNS00TCP00000 - [0:0]
:KUBE-SEP-LABDNS00UDP00000 - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ERIFXISQEP7F7OF4 - [0:0]
:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
:KUBE-SVC-TCOU7JCQXEZGVUNU - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 \
-j KUBE-SVC-NPX46M4PTMTKRN6Y
-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m comment --comment "kube-system/kube-dns:dns cluster IP" -m udp --dport 53 \
-j KUBE-SVC-TCOU7JCQXEZGVUNU
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "kube-system/kube-dns:dns-tcp cluster IP" -m tcp \
--dport 53 -j KUBE-SVC-ERIFXISQEP7F7OF4
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" \
-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-NPX46M4PTMTKRN6Y ! -s {pods} -d 10.96.0.1/32 -p tcp -m comment \
--comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-MARK-MASQ
-A KUBE-SVC-NPX46M4PTMTKRN6Y -m comment --comment "default/kubernetes:https -> 203.0.113.11:6443" \
-j KUBE-SEP-LAB6443MASTER000
-A KUBE-SEP-LAB6443MASTER000 -s 203.0.113.11/32 -m comment --comment "default/kubernetes:https" -j KUBE-MARK-MASQ
-A KUBE-SEP-LAB6443MASTER000 -p tcp -m comment --comment "default/kubernetes:https" -m tcp \
-j DNAT --to-destination 203.0.113.11:6443
-A KUBE-SVC-TCOU7JCQXEZGVUNU ! -s {pods} -d 10.96.0.10/32 -p udp -m comment \
--comment "kube-system/kube-dns:dns cluster IP" -m udp --dport 53 -j KUBE-MARK-MASQ
-A KUBE-SVC-TCOU7JCQXEZGVUNU -m comment --comment "kube-system/kube-dns:dns -> 10.244.1.53:53" \
-j KUBE-SEP-LABDNS00UDP00000
-A KUBE-SEP-LABDNS00UDP00000 -s 10.244.1.53/32 -m comment --comment "kube-system/kube-dns:dns" -j KUBE-MARK-MASQ
-A KUBE-SEP-LABDNS00UDP00000 -p udp -m comment --comment "kube-system/kube-dns:dns" -m udp \
-j DNAT --to-destination 10.244.1.53:53
-A KUBE-SVC-ERIFXISQEP7F7OF4 ! -s {pods} -d 10.96.0.10/32 -p tcp -m comment \
--comment "kube-system/kube-dns:dns-tcp cluster IP" -m tcp --dport 53 -j KUBE-MARK-MASQ
-A KUBE-SVC-ERIFXISQEP7F7OF4 -m comment --comment "kube-system/kube-dns:dns-tcp -> 10.244.1.53:53" \
-j KUBE-SEP-LABDNS00TCP00000
-A KUBE-SEP-LABDNS00TCP00000 -s 10.244.1.53/32 -m comment --comment "kube-system/kube-dns:dns-tcp" -j KUBE-MARK-MASQ
-A KUBE-SEP-LABDNS00TCP00000 -p tcp -m comment --comment "kube-system/kube-dns:dns-tcp" -m tcp \
-j DNAT --to-destination 10.244.1.53:53
COMMIT
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" \
-j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment "kubernetes firewall for dropping marked packets" \
-m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" \
-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack \
--ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""

_LIBVIRT = """\
*mangle
:LIBVIRT_PRT - [0:0]
-A POSTROUTING -j LIBVIRT_PRT
-A LIBVIRT_PRT -o virbr0 -p udp -m udp --dport 68 -j CHECKSUM --checksum-fill
COMMIT
*nat
:LIBVIRT_PRT - [0:0]
-A POSTROUTING -j LIBVIRT_PRT
-A LIBVIRT_PRT -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN
-A LIBVIRT_PRT -s 192.168.122.0/24 -d 255.255.255.255/32 -j RETURN
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -p tcp -j MASQUERADE --to-ports 1024-65535
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -p udp -j MASQUERADE --to-ports 1024-65535
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -j MASQUERADE
COMMIT
*filter
:LIBVIRT_FWI - [0:0]
:LIBVIRT_FWO - [0:0]
:LIBVIRT_FWX - [0:0]
:LIBVIRT_INP - [0:0]
:LIBVIRT_OUT - [0:0]
-A INPUT -j LIBVIRT_INP
-A FORWARD -j LIBVIRT_FWX
-A FORWARD -j LIBVIRT_FWI
-A FORWARD -j LIBVIRT_FWO
-A OUTPUT -j LIBVIRT_OUT
-A LIBVIRT_FWI -d 192.168.122.0/24 -o virbr0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A LIBVIRT_FWI -o virbr0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWO -s 192.168.122.0/24 -i virbr0 -j ACCEPT
-A LIBVIRT_FWO -i virbr0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWX -i virbr0 -o virbr0 -j ACCEPT
-A LIBVIRT_INP -i virbr0 -p udp -m udp --dport 53 -j ACCEPT
-A LIBVIRT_INP -i virbr0 -p tcp -m tcp --dport 53 -j ACCEPT
-A LIBVIRT_INP -i virbr0 -p udp -m udp --dport 67 -j ACCEPT
-A LIBVIRT_OUT -o virbr0 -p udp -m udp --dport 53 -j ACCEPT
-A LIBVIRT_OUT -o virbr0 -p udp -m udp --dport 68 -j ACCEPT
COMMIT
"""

_TEXTS = {
    ForeignSet.DOCKER: _DOCKER,
    ForeignSet.FLANNEL: _FLANNEL,
    ForeignSet.KUBE_PROXY: _KUBE_PROXY,
    ForeignSet.LIBVIRT: _LIBVIRT,
}
_ORDER = (ForeignSet.LIBVIRT, ForeignSet.FLANNEL, ForeignSet.KUBE_PROXY, ForeignSet.DOCKER)

_COUNTERS = re.compile(r"\[\d+:\d+\]")
_OWN = re.compile(r"isthmus", re.IGNORECASE)
_LISTINGS = {
    "iptables-legacy": ["iptables-legacy-save"],
    "ip6tables-legacy": ["ip6tables-legacy-save"],
    "iptables-nft": ["iptables-nft-save"],
    "ip6tables-nft": ["ip6tables-nft-save"],
    "nftables": ["nft", "--stateless", "list", "ruleset"],
    "ipset": ["ipset", "save"],
}


def foreign_rules(wanted: Iterable[ForeignSet], pods: str, bridge: str, cluster: str = "10.244.0.0/16") -> str:
    """Return the iptables-restore text of the sets for a node with this pod range and bridge, in a fixed order."""
    chosen = set(wanted)
    return "".join(_TEXTS[each].format(pods=pods, bridge=bridge, cluster=cluster) for each in _ORDER if each in chosen)


def install_foreign(place: Place, wanted: Sequence[ForeignSet], flavour: Iptables) -> None:
    """Load the sets into a node's namespace. Raises KernelError."""
    if wanted:
        text = foreign_rules(wanted, place.pod_cidrs[0], place.pod_bridge)
        run_in(place.namespace, [f"iptables-{flavour}-restore", "--noflush"], text)


@dataclass(frozen=True)
class Listing:
    """All netfilter rules of a namespace, by tool, without counters and without lines that only tell the time."""

    lines: dict[str, tuple[str, ...]]

    def foreign(self) -> "Listing":
        """Return what is left without our own tagged lines and our own nft tables (anything named isthmus)."""
        return Listing({tool: tuple(_without_own(lines)) for tool, lines in self.lines.items()})

    def difference(self, other: "Listing") -> str:
        """Return a unified diff from this listing to ``other``, '' where they are equal."""
        parts: list[str] = []
        for tool, lines in self.lines.items():
            parts += difflib.unified_diff(
                lines, other.lines.get(tool, ()), f"{tool} before", f"{tool} after", "", "", 1, ""
            )
        return "\n".join(parts)


def take_listing(namespace: str) -> Listing:
    """Return the listing of ``namespace``. Raises KernelError."""
    lines = {tool: tuple(_clean(run_in(namespace, command))) for tool, command in _LISTINGS.items()}
    # nft shows the tables of iptables-nft as well, but without comments: those are listed by their own tool.
    for family, tool in (("ip", "iptables-nft"), ("ip6", "ip6tables-nft")):
        for table in (line.removeprefix("*") for line in lines[tool] if line.startswith("*")):
            lines["nftables"] = tuple(_without_blocks(lines["nftables"], re.compile(f"table {family} {table} {{")))
    return Listing(lines)


def _clean(text: str) -> list[str]:
    # iptables-save writes comments with the time, nft warns of tables that iptables manages.
    lines = (_COUNTERS.sub("[0:0]", line.rstrip()) for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _without_own(lines: Iterable[str]) -> Iterable[str]:
    """Leave out tagged lines, and blocks of braces whose first line is tagged."""
    return (line for line in _without_blocks(lines, _OWN) if not _OWN.search(line))


def _without_blocks(lines: Iterable[str], head: re.Pattern[str]) -> Iterator[str]:
    """Leave out blocks of braces whose first line ``head`` is found in."""
    depth = 0
    for line in lines:
        if depth or (line.endswith("{") and head.search(line)):
            depth += line.count("{") - line.count("}")
        else:
            yield line
