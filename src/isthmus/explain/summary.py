"""What ``isthmus status`` says: the agent's Status as a few lines in the order in which a person at night needs them.

Pure: a Status and the time in, lines out.
"""

from enum import StrEnum

import msgspec

from isthmus.explain.advice import advice_for
from isthmus.explain.words import count_text, duration_text, join_text
from isthmus.wire.local import IdentityStatus, InterceptionStatus, PeerStatus, Status, StoreStatus, TroubleRow

SEVERITIES = ("error", "warning")


class State(StrEnum):
    """How a subsystem is."""

    OK = "ok"
    WARNING = "warning"
    BROKEN = "BROKEN"
    OFF = "off"


class Subsystem(msgspec.Struct, frozen=True):
    """One subsystem: a line, and further ones where it has parts."""

    name: str
    state: State
    text: str
    more: tuple[str, ...] = ()


class Summary(msgspec.Struct, frozen=True):
    """Everything ``status`` prints. ``healthy`` decides the exit code."""

    healthy: bool
    headline: str
    about: str
    troubles: tuple[TroubleRow, ...]
    subsystems: tuple[Subsystem, ...]


def summarise(status: Status, now_s: float) -> Summary:
    """Return the summary. Unhealthy is an agent that says so, or one with a trouble of severity "error"."""
    troubles = tuple(sorted(status.troubles, key=_severity_order))
    errors = sum(trouble.severity == "error" for trouble in troubles)
    healthy = status.healthy and not errors
    return Summary(
        healthy=healthy,
        headline=f"{_name(status)}: {_health(healthy, errors, len(troubles) - errors)}",
        about=_about(status, now_s),
        troubles=troubles,
        subsystems=(
            _store(status.store, now_s),
            _interception(status.interception),
            _dns(status),
            _identity(status, now_s),
            _workers(status),
            _relays(status),
            _peers(status.peers),
        ),
    )


def advice_of(trouble: TroubleRow) -> str:
    """What to do about ``trouble``."""
    return advice_for(trouble.code)


def _severity_order(trouble: TroubleRow) -> int:
    return SEVERITIES.index(trouble.severity) if trouble.severity in SEVERITIES else len(SEVERITIES)


def _name(status: Status) -> str:
    return f"node {status.node} (site {status.site})" if status.site else f"node {status.node}"


def _health(healthy: bool, errors: int, warnings: int) -> str:
    found = [count_text(n, noun) for n, noun in ((errors, "error"), (warnings, "warning")) if n]
    state = "healthy" if healthy else "NOT HEALTHY"
    return f"{state}, {join_text(found)}" if found else state


def _about(status: Status, now_s: float) -> str:
    return f"isthmus {status.version}, process {status.pid}, up {duration_text(now_s - status.started_at)}"


def _store(store: StoreStatus, now_s: float) -> Subsystem:
    objects = join_text([count_text(count, kind) for kind, count in store.objects.items() if count]) or "nothing"
    age = f", changed {duration_text(now_s - store.changed_at)} ago" if store.changed_at else ""
    text = f"{store.path}: {objects}{age}"
    if store.offline:
        text = f"{store.path} cannot be read; serving the copy kept on disk: {objects}{age}"
    state = State.WARNING if store.problems or store.offline else State.OK
    return Subsystem("store", state, text, tuple(store.problems))


def _interception(interception: InterceptionStatus) -> Subsystem:
    if not interception.applied:
        error = interception.error or "not applied yet"
        return Subsystem("interception", State.BROKEN, f"{interception.backend or 'no backend'}: {error}")
    addresses = " and ".join(a for a in (interception.address_v4, interception.address_v6) if a)
    ranges = ", ".join(interception.ranges) or "nothing"
    more = [
        f"{ranges} to {addresses} port {interception.port} on {interception.device}",
        f"original destination by {interception.original_destination}{_reason(interception.reason)}",
    ]
    if interception.repairs:
        more.append(f"repaired {count_text(interception.repairs, 'time')}: something else removed or changed our rules")
    if interception.sysctls:
        more.append(f"sysctls set by us: {', '.join(interception.sysctls)}")
    text = f"{interception.backend}, {count_text(interception.ignored, 'service')} opted out"
    return Subsystem("interception", State.OK, text, tuple(more))


def _reason(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _dns(status: Status) -> Subsystem:
    worker = next((worker for worker in status.workers if worker.name == "dns"), None)
    if worker is None:
        return Subsystem("dns", State.OFF, "no DNS worker")
    detail = _listening(worker.detail)
    answering = worker.state == "ready"
    text = (detail or "answering") if answering else f"the worker is {worker.state}"
    return Subsystem("dns", State.OK if answering else State.BROKEN, text)


def _listening(detail: dict[str, str]) -> str:
    """Entries like ``udp 10.0.0.1: 53`` as one part an address; anything else as it is."""
    names: dict[str, list[str]] = {}
    for name, value in detail.items():
        transport, _, address = name.partition(" ")
        names.setdefault(f"{address} port {value}" if address else value, []).append(transport)
    return ", ".join(f"{where} ({' and '.join(found)})" for where, found in names.items())


_IDENTITY_STATES = {"valid": State.OK, "none": State.OFF, "enrolling": State.WARNING}


def _identity(status: Status, now_s: float) -> Subsystem:
    identity = status.identity
    state = _IDENTITY_STATES.get(identity.state, State.BROKEN)
    if identity.state == "none":
        text = "no certificate: this node has not enrolled, so it cannot reach other nodes"
        state = State.WARNING if status.peers else State.OFF
    elif identity.state == "valid":
        text = f"certificate of {identity.issuer or 'the issuer'}, {_validity(identity, now_s)}"
    elif identity.state == "expired":
        text = f"the certificate expired {duration_text(now_s - identity.expires_at)} ago"
    else:
        text = identity.state
    if identity.error:
        text += f"; {identity.error}"
        state = State.WARNING if state is State.OK else state
    return Subsystem("identity", state, text)


def _validity(identity: IdentityStatus, now_s: float) -> str:
    valid = f"valid for {duration_text(identity.expires_at - now_s)}"
    if not identity.renews_at:
        return valid
    due_s = identity.renews_at - now_s
    return f"{valid}, renewed in {duration_text(due_s)}" if due_s > 0 else f"{valid}, renewal is due"


def _workers(status: Status) -> Subsystem:
    parts = []
    for worker in status.workers:
        restarts = f", {count_text(worker.restarts, 'restart')}" if worker.restarts else ""
        parts.append(f"{worker.name} {worker.state} (process {worker.pid}{restarts})")
    ready = all(worker.state == "ready" for worker in status.workers)
    restarted = any(worker.restarts for worker in status.workers)
    if not parts:
        return Subsystem("workers", State.BROKEN, "none")
    state = State.BROKEN if not ready else State.WARNING if restarted else State.OK
    return Subsystem("workers", state, ", ".join(parts))


def _relays(status: Status) -> Subsystem:
    if not status.relays:
        return Subsystem("relays", State.OFF, "none configured: nodes behind NATs cannot be reached")
    lines = []
    for relay in status.relays:
        if relay.connected:
            seen = f", which sees us as {relay.observed}" if relay.observed else ""
            lines.append(f"{relay.name} at {relay.address}: connected, {relay.rtt_ms:.0f} ms{seen}")
        else:
            lines.append(f"{relay.name} at {relay.address}: NOT CONNECTED{_reason(relay.error)}")
    connected = sum(relay.connected for relay in status.relays)
    state = State.OK if connected == len(lines) else State.WARNING if connected else State.BROKEN
    return Subsystem("relays", state, f"{connected} of {len(lines)} connected", tuple(lines))


def _peers(peers: list[PeerStatus]) -> Subsystem:
    if not peers:
        return Subsystem("peers", State.OFF, "no other node is known")
    # Those without a path first: they are what a reader looks for.
    lines = [_peer(peer) for peer in sorted(peers, key=lambda peer: (bool(peer.paths), peer.node))]
    reachable = sum(bool(peer.paths) for peer in peers)
    state = State.OK if reachable == len(peers) else State.WARNING
    return Subsystem("peers", state, f"{reachable} of {len(peers)} with a path", tuple(lines))


def _peer(peer: PeerStatus) -> str:
    name = f"{peer.node} (site {peer.site})" if peer.site else peer.node
    if not peer.paths:
        return f"{name}: NO PATH; known from {peer.source}"
    spare = f", {count_text(len(peer.paths) - 1, 'other path')}" if len(peer.paths) > 1 else ""
    return f"{name}: {peer.paths[0]}, {count_text(peer.connections, 'connection')}{spare}"
