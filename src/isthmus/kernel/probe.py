"""What this kernel can do for interception, found by doing it in a network namespace of its own.

The namespace belongs to a child process and goes with it, so nothing is left behind and nothing of the host is touched
(asking iptables for a table in the host's namespace would make the table). Only "not supported" makes a capability
absent; a missing privilege is an error. The result is remembered for one boot of one kernel with the same tools.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from isthmus.files import StateNotWritten, write_private
from isthmus.kernel.bridge import Bridge
from isthmus.kernel.iptables import Iptables
from isthmus.kernel.nft import Nftables
from isthmus.model.errors import KernelError, NotPermitted, NotSupported
from isthmus.model.settings import Backend
from isthmus.plan.interception import Capabilities, Handover, Ignored, InterceptionPlan, Preserved

PROBE_FILE = "probe.json"
PROBE_DEADLINE_S = 30.0
TOOLS = ("nft", "ipset", "iptables-restore", "iptables-legacy-restore", "iptables-nft-restore")

_CLONE_NEWNET = 0x40000000
_BRIDGE_SYSCTLS = ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables")


class Found(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the trials found. Each text says why not ('': it works). ``flavours`` of iptables that work."""

    nftables: str = ""
    nftables_tproxy: str = ""
    udp_timeout: str = ""
    bridge_redirect: str = ""
    iptables: str = ""
    iptables_tproxy: str = ""
    ipset: str = ""
    flavours: tuple[str, ...] = ()


class Probe:
    """Tries once a boot, kernel release and set of tools; afterwards answers from the state directory."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self._file = state_dir / PROBE_FILE
        self._key = json.dumps([boot_id, os.uname().release, [shutil.which(name) for name in TOOLS]])

    def found(self) -> Found:
        """KernelError or NotPermitted where the trials themselves cannot be made."""
        try:
            kept = msgspec.json.decode(self._file.read_bytes(), type=_Kept)
            if kept.key == self._key:
                return kept.found
        except (OSError, msgspec.DecodeError):
            pass
        found = try_in_scratch_namespace()
        try:
            write_private(self._file, msgspec.json.encode(_Kept(self._key, found)))
        except StateNotWritten:  # costs one more probe at the next start
            pass
        return found


class _Kept(msgspec.Struct, frozen=True):
    key: str
    found: Found


def capabilities(found: Found, backend: Backend, hang_reason: str, ipv6: str, bridged: bool) -> Capabilities:
    """The capabilities that matter to the plan, for the backend that will be used."""
    nft = backend is Backend.NFTABLES or (backend is Backend.AUTO and not found.nftables)
    return Capabilities(
        nftables=found.nftables,
        iptables=found.iptables,
        ipset=found.ipset,
        tproxy=found.nftables_tproxy if nft else found.iptables_tproxy,
        ipv6=ipv6,
        bridge_redirect=found.bridge_redirect,
        udp_timeout=found.udp_timeout,
        original_destination=hang_reason,
        bridge_netfilter=bridged,
    )


def ipv6_missing() -> str:
    """Why IPv6 cannot be used in this namespace now; '' where it can."""
    if not Path("/proc/net/if_inet6").exists():
        return "the kernel has no IPv6"
    try:
        off = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").read_text().strip()
    except OSError:
        off = "0"
    return "net.ipv6.conf.all.disable_ipv6 is 1" if off == "1" else ""


def bridges_ask_netfilter() -> bool:
    """Whether bridges of this namespace hand their packets to the IP hooks now (br_netfilter)."""
    for name in _BRIDGE_SYSCTLS:
        try:
            if Path("/proc/sys", name).read_text().strip() == "1":
                return True
        except OSError:
            continue
    return False


def try_in_scratch_namespace() -> Found:
    """Run the trials in a child with a network namespace of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], capture_output=True, timeout=PROBE_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"probing the kernel: no answer within {PROBE_DEADLINE_S:g} s") from error
    if done.returncode == _NOT_PERMITTED_STATUS:
        raise NotPermitted(f"probing the kernel: {done.stderr.decode().strip()}", hint="run as root")
    if done.returncode != 0:
        raise KernelError(f"probing the kernel: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return msgspec.json.decode(done.stdout, type=Found)


_NOT_PERMITTED_STATUS = 77
_LINE_FAILED = re.compile(r"restore: line \d+ failed")


def _main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        print(f"making a network namespace: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(_NOT_PERMITTED_STATUS)
    try:
        found = _trials()
    except NotPermitted as error:
        print(error, file=sys.stderr)
        sys.exit(_NOT_PERMITTED_STATUS)
    sys.stdout.buffer.write(msgspec.json.encode(found))


def _trials() -> Found:
    nft = Nftables()
    flavours = {
        flavour: _why_not(lambda flavour=flavour: Iptables(flavour).replace(_plan(Backend.IPTABLES, ipset=False)))  # type: ignore[misc]
        for flavour in ("legacy", "nft")
    }
    working = tuple(flavour for flavour, why in flavours.items() if not why)
    usable = Iptables(working[0]) if working else None
    return Found(
        nftables=_why_not(lambda: nft.replace(_plan(Backend.NFTABLES, timeout=False))),
        nftables_tproxy=_why_not(lambda: nft.replace(_plan(Backend.NFTABLES, Handover.TPROXY, timeout=False))),
        udp_timeout=_why_not(lambda: nft.replace(_plan(Backend.NFTABLES))),
        bridge_redirect=_why_not(lambda: Bridge().replace({"192.0.2.1": "02:00:00:00:00:01"})),
        iptables="" if working else flavours["legacy"],
        iptables_tproxy=_with(
            usable, lambda tables: tables.replace(_plan(Backend.IPTABLES, Handover.TPROXY, ipset=False))
        ),
        ipset=_with(usable, lambda tables: tables.replace(_plan(Backend.IPTABLES))),
        flavours=working,
    )


def _plan(
    backend: Backend, handover: Handover = Handover.DNAT, *, ipset: bool = True, timeout: bool = True
) -> InterceptionPlan:
    """A small plan that uses every kind of rule. IPv4 alone: where a kernel has IPv6, it has the same of it."""
    return InterceptionPlan(
        backend=backend,
        handover=handover,
        device="",
        address_v4="192.0.2.1",
        address_v6="",
        port=40001,
        service_ranges=("198.51.100.0/24",),
        ignored={"198.51.100.1": Ignored("a", "b")},
        preserved=frozenset({Preserved("192.0.2.2", 80)} if handover is Handover.TPROXY else ()),
        use_ipset=ipset,
        bridge_netfilter=False,
        udp_timeout=timeout,
    )


def _with(tables: Iptables | None, act: Callable[[Iptables], None]) -> str:
    return "iptables does not work here" if tables is None else _why_not(lambda: act(tables))


def _why_not(act: Callable[[], None]) -> str:
    try:
        act()
    except NotSupported as error:
        return error.message
    except NotPermitted:
        raise
    except KernelError as error:
        # All that iptables-legacy-restore says of a target or match that the kernel does not have. The rules are our
        # own and correct, and the privilege has been shown by the namespace: nothing else can be the reason.
        if _LINE_FAILED.search(error.message):
            return error.message
        raise
    return ""


if __name__ == "__main__":
    _main()
