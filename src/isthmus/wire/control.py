"""Messages of a control channel (ALPN ``isthmus-control/1``), between a node and a relay. Pure: bytes in, messages out.

MessagePack in frames. The node speaks first (Hello); the relay answers Welcome, everything it knows, then changes. The
relay forwards announcements and revocations as they were signed and can make none. Unknown fields are ignored and a
message of an unknown kind is an error, so ``VERSION`` changes when a kind is added.
"""

from enum import StrEnum

import msgspec

from isthmus.model.errors import IsthmusError
from isthmus.wire import announcement, revocation, ticket
from isthmus.wire.frames import FrameError, FrameReader, encode

ALPN = "isthmus-control/1"
VERSION = 1
PING_INTERVAL_S = 15.0  # keeps the mapping of a NAT; the shortest that is met in the field is 30 s
SILENCE_S = 40.0  # two pings and a half without a word: the other side is gone
MAX_BATCH = 64
MAX_FROM_NODE_BYTES = revocation.MAX_LIST_BYTES + 1_024
MAX_FROM_RELAY_BYTES = revocation.MAX_LIST_BYTES + MAX_BATCH * (announcement.MAX_BYTES + 16)
MAX_REQUEST_NUMBER = 2**53


class ControlError(IsthmusError):
    """The other side breaks the control protocol; the channel is closed."""

    code = "wire.control"


class Mode(StrEnum):
    """How two nodes shall be connected."""

    RELAYED = "relayed"  # both dial the relay, which joins them
    REVERSE = "reverse"  # the peer dials the node that asks


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Node, first: its own announcement (signed), and the number of the revocation list that it knows."""

    version: int
    node: str
    announcement: bytes
    revocations: int = 0


class Announce(msgspec.Struct, frozen=True, tag=True):
    """Node: a newer announcement of itself."""

    announcement: bytes


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Node: a connection to ``node`` is wanted. ``request`` (> 0) comes back in the answer."""

    request: int
    node: str
    mode: Mode


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Either side; answered at once by Pong with the same number."""

    number: int


class Revocations(msgspec.Struct, frozen=True, tag=True):
    """Either side: a signed revocation list that is newer than what the other is known to have."""

    signed: bytes


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Relay, first: ``observed`` is the address (HOST:PORT) from which it sees the node."""

    relay: str
    observed: str
    version: int = VERSION


class Announcements(msgspec.Struct, frozen=True, tag=True):
    """Relay: announcements of other nodes, as they were signed; at most MAX_BATCH."""

    signed: tuple[bytes, ...]


class Presence(msgspec.Struct, frozen=True, tag=True):
    """Relay: which nodes hold a control channel to it (``complete`` replaces what was said before)."""

    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    complete: bool = False


class Ticket(msgspec.Struct, frozen=True, tag=True):
    """Relay: dial this relay's port with ``ticket`` now; it joins the connection with ``node``'s.

    ``request`` repeats Connect.request for the node that asked, which is the TLS client; it is 0 for the other.
    """

    request: int
    node: str
    ticket: bytes
    valid_s: float


class ReversePlease(msgspec.Struct, frozen=True, tag=True):
    """Relay: ``node`` wants a connection and cannot dial; dial one of ``addresses``."""

    node: str
    addresses: tuple[str, ...]


class Asked(msgspec.Struct, frozen=True, tag=True):
    """Relay: the peer has been asked to dial; nothing more will come for ``request``."""

    request: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Relay: ``request`` is not served. ``code`` is stable: "unknown-node", "absent", "streams", "waiting", "self"."""

    request: int
    code: str
    reason: str


class AnnouncementRefused(msgspec.Struct, frozen=True, tag=True):
    """Relay: the node's announcement was not taken. ``known`` is the sequence number to go beyond, 0 otherwise."""

    reason: str
    known: int = 0


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Answer to Ping; a relay adds its number of joined streams, as a measure of its load."""

    number: int
    streams: int = 0


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """Relay: the channel ends now, and why ("revoked", "replaced", "stopping", "slow", ...)."""

    code: str
    reason: str


FromNode = Hello | Announce | Connect | Ping | Pong | Revocations
FromRelay = (
    Welcome
    | Announcements
    | Presence
    | Ticket
    | ReversePlease
    | Asked
    | Refused
    | AnnouncementRefused
    | Revocations
    | Ping
    | Pong
    | Goodbye
)

_encoder = msgspec.msgpack.Encoder()
_node_decoder = msgspec.msgpack.Decoder(FromNode)
_relay_decoder = msgspec.msgpack.Decoder(FromRelay)


def pack(message: FromNode | FromRelay) -> bytes:
    """One message as a frame."""
    return encode(_encoder.encode(message))


class NodeReader:
    """The relay's side: what a node sent, parsed and within bounds."""

    def __init__(self) -> None:
        self._frames = FrameReader(MAX_FROM_NODE_BYTES)

    def feed(self, data: bytes) -> list[FromNode]:
        """Raises ControlError for garbage."""
        try:
            messages = [_node_decoder.decode(frame) for frame in self._frames.feed(data)]
        except (msgspec.DecodeError, FrameError, RecursionError) as error:
            raise ControlError(f"the node sent what is not a control message: {error}") from error
        for message in messages:
            if isinstance(message, Hello | Announce) and len(message.announcement) > announcement.MAX_BYTES:
                raise ControlError(f"an announcement of {len(message.announcement)} bytes")
            if isinstance(message, Connect) and not 0 < message.request < MAX_REQUEST_NUMBER:
                raise ControlError(f"request number {message.request}")
        return messages


class RelayReader:
    """The node's side: what a relay sent, parsed and within bounds."""

    def __init__(self) -> None:
        self._frames = FrameReader(MAX_FROM_RELAY_BYTES)

    def feed(self, data: bytes) -> list[FromRelay]:
        """Raises ControlError for garbage."""
        try:
            messages = [_relay_decoder.decode(frame) for frame in self._frames.feed(data)]
        except (msgspec.DecodeError, FrameError, RecursionError) as error:
            raise ControlError(f"the relay sent what is not a control message: {error}") from error
        for message in messages:
            if isinstance(message, Ticket) and len(message.ticket) != ticket.TICKET_BYTES:
                raise ControlError(f"a ticket of {len(message.ticket)} bytes")
            if isinstance(message, ReversePlease) and len(message.addresses) > announcement.MAX_ADDRESSES:
                raise ControlError(f"{len(message.addresses)} addresses to dial")
            if isinstance(message, Announcements) and len(message.signed) > MAX_BATCH:
                raise ControlError(f"{len(message.signed)} announcements in one message")
        return messages
