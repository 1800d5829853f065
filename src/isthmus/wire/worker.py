"""Messages between the control process of an agent and its workers (data, DNS), over a Unix stream socket.

Encoded as MessagePack in frames (wire/frames.py). Both ends are the same release, so there is no version field. The
control process sends a full state after start, then only what changed.
"""

import msgspec

from isthmus.model.settings import DNS_PORT, INTERCEPT_ADDRESS_V4, INTERCEPT_ADDRESS_V6, AgentSettings, DnsSettings
from isthmus.plan.interception import Handover
from isthmus.plan.serving import ServicePlan
from isthmus.wire.frames import FrameReader, encode


class DataConfig(msgspec.Struct, frozen=True):
    """What the worker is started with.

    ``by_record``: after DNAT conntrack's record tells the original destination, for SO_ORIGINAL_DST hangs here.
    """

    settings: AgentSettings
    handover: Handover = Handover.DNAT
    by_record: bool = False


class DnsConfig(msgspec.Struct, frozen=True, rename="kebab"):
    """What the worker is started with. ``local_networks``: ranges whose reverse names are answered here alone."""

    listen: tuple[str, ...] = (INTERCEPT_ADDRESS_V4, INTERCEPT_ADDRESS_V6)
    port: int = DNS_PORT
    dns: DnsSettings = DnsSettings()
    local_networks: tuple[str, ...] = ()
    resolv_conf: str = "/etc/resolv.conf"


class PutService(msgspec.Struct, frozen=True, tag=True):
    """A service is new or changed."""

    plan: ServicePlan


class DropService(msgspec.Struct, frozen=True, tag=True):
    """A service is gone."""

    namespace: str
    name: str


class Synced(msgspec.Struct, frozen=True, tag=True):
    """Everything known has been sent; the worker may begin to serve."""


class PathSpec(msgspec.Struct, frozen=True):
    """One way to a peer, in the order in which plan/paths.py ranked it.

    ``kind`` is "direct" (``address`` is HOST:PORT of the peer), "reverse" (asked for over ``relay``'s control channel)
    or "relayed" (``address`` is HOST:PORT of ``relay``).
    """

    kind: str
    address: str
    relay: str = ""


class PutPeer(msgspec.Struct, frozen=True, tag=True):
    """How a node is reached now; replaces what was known. Without paths it is known but unreachable."""

    node: str
    paths: tuple[PathSpec, ...]


class DropPeer(msgspec.Struct, frozen=True, tag=True):
    """A node is gone or revoked: its connections are closed."""

    node: str
    reason: str


class Credentials(msgspec.Struct, frozen=True, tag=True):
    """Files of the identity changed: load them for new handshakes. ``revoked``: certificate serials in hexadecimal."""

    ca_file: str
    certificate_file: str
    key_file: str
    revoked: tuple[str, ...] = ()


class Announce(msgspec.Struct, frozen=True, tag=True):
    """What this node announces of itself, signed (wire/announcement.py), at the start of every link connection."""

    signed: tuple[bytes, ...]


class Dial(msgspec.Struct, frozen=True, tag=True):
    """Make a connection for ``node`` now: an answer to NeedConnection, or a peer's wish (reverse, relayed).

    ``ticket`` (hexadecimal) is presented to a relay first; '' for a direct connection. ``role`` is the side of the TLS
    handshake this node takes: "client" or "server". ``request`` repeats NeedConnection.request, or is 0.
    """

    node: str
    address: str
    kind: str
    role: str
    ticket: str = ""
    request: int = 0


class DialFailed(msgspec.Struct, frozen=True, tag=True):
    """NeedConnection cannot be served now."""

    request: int
    node: str
    reason: str


class NeedConnection(msgspec.Struct, frozen=True, tag=True):
    """Worker to control: a pooled connection to ``node`` over a reverse or relayed path is wanted."""

    request: int
    node: str
    kind: str
    relay: str


class Heard(msgspec.Struct, frozen=True, tag=True):
    """Worker to control: what ``node`` announced at the start of a link connection, unchecked."""

    node: str
    signed: tuple[bytes, ...]


class PathReport(msgspec.Struct, frozen=True, tag=True):
    """Worker to control: a path worked (``error`` is '') or failed, seen at first hand."""

    node: str
    kind: str
    address: str
    relay: str = ""
    rtt_ms: float = 0.0
    error: str = ""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Control to worker: a question of the local API (``counters``, ``connections``, ``links``, ...)."""

    id: int
    what: str
    arguments: dict[str, str] = {}


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Worker to control: the answer, plain data."""

    id: int
    data: msgspec.Raw


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to control: listening; ``detail`` says on what."""

    worker: str
    detail: dict[str, str] = {}


class Trouble(msgspec.Struct, frozen=True, tag=True):
    """Worker to control: something a person should see in ``status``; an empty ``text`` clears the code."""

    code: str
    text: str


ToWorker = PutService | DropService | Synced | PutPeer | DropPeer | Credentials | Announce | Dial | DialFailed | Ask
FromWorker = NeedConnection | Heard | PathReport | Answer | Ready | Trouble

encoder = msgspec.msgpack.Encoder()
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)


def pack(message: ToWorker | FromWorker) -> bytes:
    """One message as a frame."""
    return encode(encoder.encode(message))


class ToWorkerReader:
    """The worker's side of the channel: bytes in, messages out. Raises FrameError or msgspec's DecodeError."""

    def __init__(self) -> None:
        self._frames = FrameReader()

    def feed(self, data: bytes) -> list[ToWorker]:
        return [to_worker_decoder.decode(frame) for frame in self._frames.feed(data)]


class FromWorkerReader:
    """The control process's side."""

    def __init__(self) -> None:
        self._frames = FrameReader()

    def feed(self, data: bytes) -> list[FromWorker]:
        return [from_worker_decoder.decode(frame) for frame in self._frames.feed(data)]
