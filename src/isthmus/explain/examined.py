"""The node that ``isthmus doctor`` looks at: its agent, its kernel and its files, read once each, changed never."""

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import dns.rcode

from isthmus.dns.upstreams import parse_server
from isthmus.explain.check import Descriptors, Hooked
from isthmus.explain.foreign import from_iptables, from_nft
from isthmus.explain.hop import Witness
from isthmus.explain.witness import DnsServer
from isthmus.kernel.netlink import attribute, route_netlink
from isthmus.kernel.run import run
from isthmus.model.errors import IsthmusError, KernelError, NotSupported
from isthmus.relay.keystore import KeyStore
from isthmus.wire.local import Facts, RuleRow, Status

UPSTREAM_TIMEOUT_S = 2.0
LEGACY = {"/proc/net/ip_tables_names": "iptables-legacy-save", "/proc/net/ip6_tables_names": "ip6tables-legacy-save"}
STA_UNSYNC = 0x40  # include/uapi/linux/timex.h
MICROSECONDS = 1_000_000


class Timex(ctypes.Structure):
    """The beginning of ``struct timex`` (include/uapi/linux/timex.h); the rest is room for the kernel to write to."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


class AskAgent:
    """The questions of a diagnosis, as two functions; both may raise IsthmusError."""

    def __init__(self, status: Callable[[], Status], facts: Callable[[], Facts]) -> None:
        self.status = status
        self.facts = facts


class ThisNode:
    """Implements ``Examined`` for the node (the network namespace) that this process runs in."""

    def __init__(self, ask: AskAgent) -> None:
        self.now_s = time.time()
        self.error: IsthmusError | None = None
        self.status: Status | None = None
        self.facts: Facts | None = None
        try:
            self.status = ask.status()
            self.facts = ask.facts()
        except IsthmusError as error:
            self.error = error
        self.dns: Witness = DnsServer(self._dns_address())

    def _dns_address(self) -> str:
        interception = self.status.interception if self.status else None
        return (interception.address_v4 or interception.address_v6) if interception else ""

    def rules(self) -> tuple[RuleRow, ...] | None:
        return self.facts.rules if self.facts else None

    @functools.cache  # noqa: B019 - lives as long as the command
    def local_addresses(self) -> frozenset[str] | None:
        try:
            with route_netlink() as netlink:
                return frozenset(attribute(message, "IFA_ADDRESS") for message in netlink.get_addr())
        except OSError:
            return None

    def ask_upstream(self, server: str) -> str:
        try:
            address, port = parse_server(server)
            query = dns.message.make_query(".", "NS")
            answer = dns.query.udp(query, address, UPSTREAM_TIMEOUT_S, port, ignore_unexpected=True)
        except dns.exception.Timeout:
            return f"no answer within {UPSTREAM_TIMEOUT_S:g} s"
        except (OSError, IsthmusError, dns.exception.DNSException) as error:
            return str(error)
        # A resolver that does not know the root's servers answers all the same, so it is alive.
        return dns.rcode.to_text(answer.rcode()) if answer.rcode() == dns.rcode.SERVFAIL else ""

    def descriptors(self, pid: int) -> Descriptors | None:
        process = Path("/proc") / str(pid)
        try:
            used = sum(1 for _ in (process / "fd").iterdir())
            limits = (process / "limits").read_text().splitlines()
        except OSError:
            return None
        soft = next((line.split()[3] for line in limits if line.startswith("Max open files")), "")
        return Descriptors(used, int(soft)) if soft.isdigit() else None

    def sysctl(self, name: str) -> str | None:
        try:
            return " ".join((Path("/proc/sys") / name).read_text().split())
        except OSError:
            return None

    def hooked(self) -> tuple[Hooked, ...] | None:
        try:
            return (*_by_nft(), *_by_legacy_iptables())
        except (KernelError, ValueError):
            return None

    def clock_error_s(self) -> float | None:
        timex = Timex()
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) < 0:
            return None
        return float("inf") if timex.status & STA_UNSYNC else timex.maxerror / MICROSECONDS

    def certificate_from_s(self) -> float | None:
        if self.facts is None:
            return None
        stored = KeyStore(Path(self.facts.settings.state_directory) / "identity").current()
        return stored.certificate.not_valid_before_utc.timestamp() if stored else None


def _by_nft() -> tuple[Hooked, ...]:
    """All that nftables holds, which is what today's iptables makes as well; nothing where the kernel has none."""
    try:
        return from_nft(run(["nft", "-j", "-t", "list", "ruleset"]))
    except NotSupported:
        return ()


def _by_legacy_iptables() -> tuple[Hooked, ...]:
    """What stands in the older tables. They are listed only if there are any, for listing would load them."""
    found: list[Hooked] = []
    for names, command in LEGACY.items():
        try:
            loaded = Path(names).read_text().split()
        except OSError:
            continue
        if loaded:
            found += from_iptables(run([command]))
    return tuple(found)
