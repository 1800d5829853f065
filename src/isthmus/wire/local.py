"""The agent's local API: one request, one answer, over a Unix socket of mode 0600 (``agent.sock``, run directory).

JSON in frames (wire/frames.py). The answers' fields are stable and documented in docs/api.md; new ones may be added.
Ports are host order, times are seconds since the epoch (``_at``) or durations in the unit their name ends in.
"""

from typing import Any

import msgspec

from isthmus.model.cluster import Pod
from isthmus.model.settings import AgentSettings
from isthmus.plan.interception import InterceptionPlan
from isthmus.plan.nodes import Me, NodeFacts
from isthmus.plan.paths import PathId, Peer, Relay, Seen, Self
from isthmus.plan.serving import ServicePlan

SOCKET_NAME = "agent.sock"


class Request(msgspec.Struct, frozen=True):
    """A question: ``what`` is one of the names in ``QUESTIONS``."""

    what: str
    arguments: dict[str, str] = {}


class Failure(msgspec.Struct, frozen=True):
    """Why a question was not answered: the fields of IsthmusError."""

    code: str
    message: str
    hint: str = ""


class Response(msgspec.Struct, frozen=True):
    """Either ``data`` or ``failure``."""

    data: Any = None
    failure: Failure | None = None


QUESTIONS = {
    "status": "Status",
    "services": "list of ServiceRow",
    "endpoints": "list of EndpointRow",
    "links": "list of LinkRow",
    "rules": "list of RuleRow",
    "connections": "list of connection rows of the data worker",
    "facts": "Facts: what trace needs to call the plan's functions again",
}


class TroubleRow(msgspec.Struct, frozen=True):
    """Something a person should know. ``severity`` is "error" (exit code 1 of status) or "warning"."""

    code: str
    severity: str
    text: str


class StoreStatus(msgspec.Struct, frozen=True):
    """The store: what was read from where."""

    path: str
    objects: dict[str, int]
    problems: list[str]
    notes: list[str]
    offline: bool
    changed_at: float


class InterceptionStatus(msgspec.Struct, frozen=True):
    """What stands in the kernel. ``applied`` is false where the last attempt failed (``error`` says why)."""

    backend: str
    original_destination: str
    reason: str
    device: str
    address_v4: str
    address_v6: str
    port: int
    ranges: list[str]
    ignored: int
    applied: bool
    repairs: int
    sysctls: list[str]
    error: str = ""


class WorkerStatus(msgspec.Struct, frozen=True):
    """A worker process."""

    name: str
    pid: int
    state: str
    restarts: int
    detail: dict[str, str] = {}


class RelayStatus(msgspec.Struct, frozen=True):
    """A control channel to a relay."""

    name: str
    address: str
    connected: bool
    rtt_ms: float = 0.0
    observed: str = ""
    error: str = ""


class PeerStatus(msgspec.Struct, frozen=True):
    """Another node: where what is known of it came from, and the ways to it that did not fail lately, best first."""

    node: str
    site: str
    source: str
    paths: list[str]
    connections: int = 0


class IdentityStatus(msgspec.Struct, frozen=True):
    """This node's certificate. ``state`` is "none", "enrolling", "valid", "expired" or "revoked"."""

    state: str
    serial: str = ""
    expires_at: float = 0.0
    renews_at: float = 0.0
    issuer: str = ""
    error: str = ""


class Status(msgspec.Struct, frozen=True):
    """``isthmus status -o json``."""

    node: str
    site: str
    version: str
    pid: int
    started_at: float
    boot_id: str
    healthy: bool
    store: StoreStatus
    interception: InterceptionStatus
    identity: IdentityStatus
    workers: list[WorkerStatus]
    relays: list[RelayStatus]
    peers: list[PeerStatus]
    counters: dict[str, dict[str, Any]]
    troubles: list[TroubleRow]


class ServiceRow(msgspec.Struct, frozen=True):
    """``isthmus dump services``."""

    namespace: str
    name: str
    kind: str
    addresses: list[str]
    ports: list[str]
    endpoints: int
    ready: int
    balance: str
    state: str
    origin: str


class EndpointRow(msgspec.Struct, frozen=True):
    """``isthmus dump endpoints``: one endpoint of one service."""

    namespace: str
    name: str
    node: str
    address: str
    visible_address: str
    ports: list[str]
    distance: str
    ready: bool
    resting: bool
    connections: int
    pod: str


class LinkRow(msgspec.Struct, frozen=True):
    """``isthmus dump links``: one pooled connection to another node, or a peer without one."""

    node: str
    path: str
    address: str
    relay: str
    state: str
    streams: int
    bytes_out: int
    bytes_in: int
    age_s: float
    tls: str


class RuleRow(msgspec.Struct, frozen=True):
    """``isthmus dump rules``: one thing in the kernel that is ours."""

    name: str
    hook: str
    match: str
    action: str
    comment: str
    present: bool


class EndpointState(msgspec.Struct, frozen=True):
    """What the data worker remembers of one endpoint of a service port; those it remembers nothing of are left out.

    ``service`` is ``NAMESPACE/NAME``, ``service_port`` the service's own port, ``port`` the endpoint's. ``rest_s`` is
    how long it still rests (0: it does not).
    """

    service: str
    service_port: int
    protocol: str
    node: str
    address: str
    port: int
    rest_s: float = 0.0
    connections: int = 0


class PeerFacts(msgspec.Struct, frozen=True):
    """Another node: exactly what the agent gave to ``plan.paths.rank`` for it last.

    ``source`` says where what is known of it came from. ``seen`` pairs each way with what became of it.
    """

    peer: Peer
    source: str
    relays: tuple[Relay, ...] = ()
    seen: tuple[tuple[PathId, Seen], ...] = ()
    previous: tuple[PathId, ...] = ()


class Facts(msgspec.Struct, frozen=True):
    """Answer to "facts": everything that ``isthmus trace`` needs to call the functions of plan/ as the agent does.

    Arguments: ``destination`` as the user typed it, ``namespace`` that of the asking pod. ``services`` holds those that
    plan/queries.py calls relevant to them; ``pods`` those of this node. ``places`` says where an object stands
    (``Service shop/web``: ``web.yaml:3``). ``own`` and ``now_s`` (the clock of ``seen``) go to ``plan.paths.rank``,
    ``planned`` is what the kernel should hold, ``rules`` what it does hold.
    What could not be had is None.
    """

    me: Me
    own: Self
    now_s: float
    settings: AgentSettings
    services: tuple[ServicePlan, ...]
    pods: tuple[Pod, ...]
    nodes: dict[str, NodeFacts]
    peers: tuple[PeerFacts, ...]
    interception: InterceptionStatus
    planned: InterceptionPlan | None = None
    rules: tuple[RuleRow, ...] | None = None
    endpoints: tuple[EndpointState, ...] | None = None
    links: tuple[LinkRow, ...] | None = None
    identity: IdentityStatus | None = None
    places: dict[str, str] = {}


json_encoder = msgspec.json.Encoder()
request_decoder = msgspec.json.Decoder(Request)
response_decoder = msgspec.json.Decoder(Response)
