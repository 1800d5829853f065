"""Interception as a whole: device, settings, routes, rules; made in this order, removed in the opposite one.

``apply`` changes what differs from what it applied last; with ``verify``, and always the first time, it reads the
kernel and repairs what someone else has changed. What it finds as it should be it does not touch. ``remove`` works from
any process, at any time, without knowing what was applied. Not for use from two threads at once.
"""

import hashlib
from collections.abc import Container
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from socket import IPPROTO_UDP

import msgspec

from isthmus.files import StateNotWritten, write_private
from isthmus.kernel import probe
from isthmus.kernel.bridge import Bridge, bridges_of
from isthmus.kernel.conntrack import Conntrack
from isthmus.kernel.devices import Device, Devices
from isthmus.kernel.iptables import Iptables, choose_flavour, read_nat
from isthmus.kernel.nft import Nftables
from isthmus.kernel.nft_rules import UDP_TIMEOUT_S, Elements
from isthmus.kernel.original_destination import Finding, Method, Trial
from isthmus.kernel.routes import Routes
from isthmus.kernel.sysctls import Change, Sysctls
from isthmus.model.errors import KernelError, NotSupported
from isthmus.model.settings import Backend, InterceptSettings
from isthmus.plan.interception import Capabilities, Handover, InterceptionPlan, Preserved

STATE_FILE = "interception.json"
CONNTRACK_SETTINGS = {
    "net/netfilter/nf_conntrack_udp_timeout": UDP_TIMEOUT_S,
    "net/netfilter/nf_conntrack_udp_timeout_stream": UDP_TIMEOUT_S,
}
PORT_SETTINGS = {"net/ipv4/tcp_tw_reuse": "1"}
"""The proxy connects often from one address to one endpoint: ports in TIME_WAIT are used again after a second."""


class Report(msgspec.Struct, frozen=True):
    """What was changed, in words, in order; empty where everything was as it should be."""

    changed: tuple[str, ...] = ()


class Reading(msgspec.Struct, frozen=True):
    """What the kernel holds of ours. ``rules`` is a listing for people, ``elements`` the sets, both by backend."""

    device: Device | None
    routes: frozenset[str]
    sysctls: tuple[Change, ...]
    rules: dict[str, str]
    exceptions: int
    elements: dict[str, Elements] = {}


class Interception:
    """Makes the kernel hold an ``InterceptionPlan``, keeps it so, and takes everything away again."""

    def __init__(self, settings: InterceptSettings, state_dir: Path, boot_id: str) -> None:
        self._settings = settings
        self._boot_id = boot_id
        self._state_dir = state_dir
        self._devices = Devices(settings.device)
        self._routes = Routes()
        self._sysctls = Sysctls(state_dir, boot_id)
        self._nft = Nftables()
        self._bridge = Bridge()
        self._applied: InterceptionPlan | None = None

    def finding(self) -> Finding:
        """How TCP's original destination is learnt, tried once a boot (``kernel/original_destination.py``)."""
        return Trial(self._state_dir, self._boot_id).finding()

    def capabilities(self) -> Capabilities:
        """What this kernel can do: probed once a boot; the state of IPv6 and of bridges is read each time."""
        finding = self.finding()
        return probe.capabilities(
            self._found(),
            self._settings.backend,
            "" if finding.method is Method.GETSOCKOPT else finding.reason,
            probe.ipv6_missing(),
            probe.bridges_ask_netfilter(),
        )

    def apply(self, plan: InterceptionPlan, *, verify: bool = False) -> Report:
        """Make the kernel hold ``plan``. On an error the next call verifies, whatever it is asked."""
        before, self._applied = self._applied, None
        done: list[str] = []
        if before is None or verify or _shape(before) != _shape(plan):
            done += self._apply_surroundings(plan)
            done += self._verify_rules(plan)
            done += self._apply_settings(plan)
            done += self._apply_bridges(plan)
            if done:
                self._forget(plan.ignored)
        else:
            done += self._update_rules(before, plan)
            if before.preserved != plan.preserved:
                done += self._apply_bridges(plan)
        self._applied = plan
        return Report(tuple(done))

    def read(self) -> Reading:
        """What the kernel holds of ours now."""
        rules: dict[str, str] = {}
        elements: dict[str, Elements] = {}
        exceptions = 0
        for name, backend in self._backends().items():
            state = backend.read()
            if state is not None:
                rules[name], elements[name] = backend.listing(), state.elements
                exceptions += sum(len(items) for key, items in state.elements.items() if "exceptions" in key)
        return Reading(self._devices.read(), self._routes.read(), self._sysctls.changes(), rules, exceptions, elements)

    def sysctl_changes(self) -> tuple[Change, ...]:
        """The settings that we have changed since this boot, with what was there before."""
        return self._sysctls.changes()

    def remove(self) -> Report:
        """Take everything of ours away; may be repeated. Rules first: a rule must never lead to what is gone."""
        self._applied = None
        done: list[str] = []
        for name, backend in self._backends().items():
            if backend.remove():
                done.append(f"{name} rules deleted")
        if self._bridge.remove():
            done.append("bridge rules deleted")
        if flows := self._forget(None):
            done.append(f"{flows} redirected UDP flows forgotten")
        if self._routes.remove():
            done.append("routes for marked packets deleted")
        done += [f"device {name} deleted" for name in self._devices.remove()]
        done += self._sysctls.restore()
        (self._state_dir / STATE_FILE).unlink(missing_ok=True)
        return Report(tuple(done))

    def _found(self) -> probe.Found:
        return probe.Probe(self._state_dir, self._boot_id).found()

    def _apply_surroundings(self, plan: InterceptionPlan) -> list[str]:
        addresses = frozenset(text for text in (plan.address_v4, plan.address_v6) if text)
        done = list(self._devices.apply(addresses))
        wanted = plan.handover is Handover.TPROXY or bool(plan.preserved)
        return [*done, *self._routes.apply(plan.versions() if wanted else ())]

    def _apply_settings(self, plan: InterceptionPlan) -> tuple[str, ...]:
        """After the rules: only then has conntrack been loaded, and its settings are there."""
        if plan.udp_timeout:
            done = list(self._sysctls.restore(keep=PORT_SETTINGS))
        else:
            done = list(self._sysctls.raise_to(CONNTRACK_SETTINGS))
        return (*done, *self._sysctls.set_to(PORT_SETTINGS))

    def _forget(self, destinations: Container[str] | None) -> int:
        """Have conntrack forget redirected UDP flows: a client that keeps its port would stay redirected for ever."""
        try:
            with closing(Conntrack()) as records:
                addresses = (self._settings.address_v4, self._settings.address_v6)
                local = [(address, self._settings.port) for address in addresses if address]
                return records.forget(IPPROTO_UDP, local, destinations)
        except NotSupported:  # then such flows end by their time limit
            return 0

    def _backend(self, plan: InterceptionPlan) -> Nftables | Iptables:
        if plan.backend is Backend.NFTABLES:
            return self._nft
        return Iptables(choose_flavour(self._found().flavours, read_nat))

    def _backends(self) -> dict[str, Nftables | Iptables]:
        return {"nftables": self._nft, "iptables-legacy": Iptables("legacy"), "iptables-nft": Iptables("nft")}

    def _verify_rules(self, plan: InterceptionPlan) -> list[str]:
        chosen = self._backend(plan)
        done = [
            f"{name} rules deleted, another backend is used now"
            for name, backend in self._backends().items()
            if type(backend) is not type(chosen) and backend.remove()
        ]
        if isinstance(chosen, Iptables):
            other = Iptables("nft" if chosen.flavour == "legacy" else "legacy")
            if other.remove_rules():
                done.append(f"iptables ({other.flavour}) rules deleted, the other flavour is used now")
        wanted = chosen.elements(plan)
        state = chosen.read()
        if state is None or state.digest != self._known_digest(plan):
            chosen.replace(plan)
            fresh = chosen.read()
            if fresh is None or not _same(fresh.elements, wanted):
                raise KernelError("making interception rules: they were changed while they were being made")
            self._know_digest(plan, fresh.digest)
            return [*done, "rules made" if state is None else "rules made anew"]
        if not _same(state.elements, wanted):
            changed = chosen.update(state.elements, wanted)
            done.append(f"{changed} elements repaired")
        return done

    def _update_rules(self, before: InterceptionPlan, plan: InterceptionPlan) -> list[str]:
        old, new = _difference(before, plan)
        if old == new:
            return []
        backend = self._backend(plan)
        try:
            changed = backend.update(backend.elements(old), backend.elements(new))
        except NotSupported:
            raise
        except KernelError:  # someone has changed or deleted what we meant to change
            return self._verify_rules(plan)
        if new.ignored:
            self._forget(new.ignored)
        return [f"{changed} elements changed"] if changed else []

    def _apply_bridges(self, plan: InterceptionPlan) -> list[str]:
        ends = frozenset(end.address for end in plan.preserved) if plan.redirect_bridged else frozenset()
        if not ends:
            return ["bridge rules deleted"] if self._bridge.remove() else []
        wanted = bridges_of(ends)
        state = self._bridge.read()
        if state is not None and not state.whole:
            self._bridge.remove()
        elif state is not None and state.bridges == wanted:
            return []
        self._bridge.replace(wanted)
        return ["bridge rules made" if state is None else "bridge rules changed"]

    def _known_digest(self, plan: InterceptionPlan) -> str:
        """The digest that a listing had after rules of this shape were made; '' where none were, since this boot."""
        try:
            state = msgspec.json.decode((self._state_dir / STATE_FILE).read_bytes(), type=_State)
        except (OSError, msgspec.DecodeError):
            return ""
        same = state.boot_id == self._boot_id and state.shape == _shape_digest(plan)
        return state.listing if same else ""

    def _know_digest(self, plan: InterceptionPlan, listing: str) -> None:
        try:
            state = _State(self._boot_id, _shape_digest(plan), listing)
            write_private(self._state_dir / STATE_FILE, msgspec.json.encode(state))
        except StateNotWritten:  # a full disk: the next start makes the rules anew, in one transaction
            pass


_ANY = Preserved("", 0)


class _State(msgspec.Struct, frozen=True):
    boot_id: str
    shape: str
    listing: str


def _same(found: Elements, wanted: Elements) -> bool:
    found, wanted = ({name: items for name, items in side.items() if items} for side in (found, wanted))
    # Tools may write an address in another way than we do: looked into only where the texts differ.
    return found == wanted or _canonical(found) == _canonical(wanted)


def _canonical(elements: Elements) -> Elements:
    return {name: {_address(text): note for text, note in items.items()} for name, items in elements.items()}


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        return text


def _difference(before: InterceptionPlan, after: InterceptionPlan) -> tuple[InterceptionPlan, InterceptionPlan]:
    """Both plans, cut down to the elements in which they differ: one change among ten thousand stays one."""
    old, new = before.ignored, after.ignored
    gone = {text: service for text, service in old.items() if new.get(text) != service}
    come = {text: service for text, service in new.items() if old.get(text) != service}
    return (
        msgspec.structs.replace(before, ignored=gone, preserved=before.preserved - after.preserved, notes=()),
        msgspec.structs.replace(after, ignored=come, preserved=after.preserved - before.preserved, notes=()),
    )


def _shape(plan: InterceptionPlan) -> InterceptionPlan:
    """The plan without what is kept as elements: what is equal here differs in elements only."""
    by_rule = plan.backend is Backend.IPTABLES and not plan.use_ipset
    some = frozenset({_ANY}) if plan.preserved else frozenset()
    return msgspec.structs.replace(plan, ignored={}, preserved=plan.preserved if by_rule else some, notes=())


def _shape_digest(plan: InterceptionPlan) -> str:
    return hashlib.sha256(msgspec.json.encode(_shape(plan), order="deterministic")).hexdigest()
