"""Streams and datagrams on a link connection. Pure: bytes in, events out; requests in, bytes out.

A connection carries one stream at a time. Its two ends have fixed sides: the opener asks for streams, the acceptor
serves them, whichever of them dialled. Frames are a type (1 byte), a length (4 bytes, big-endian) and a body:

    READY           acceptor, once, after the handshake: identity checked, streams may be opened; its announcements
    ANNOUNCE        opener, while idle: its announcements (wire/announcement.py), as they were signed
    OPEN            opener: a StreamRequest
    OPENED          acceptor: the endpoint is connected
    REFUSED         acceptor: [outcome, detail]; the connection is idle again
    DATA            both: bytes, 1 byte to 1 MiB
    END             both: no more bytes in this direction; after both ENDs the connection is idle again
    SESSION_OPEN    opener: session number and a StreamRequest; from the first one on the connection carries datagrams
    DATAGRAM        both: session number and one datagram
    SESSION_CLOSE   both: session number, [outcome, detail]

There is no frame for an abort: it could not pass a receiver that does not read. An abort closes the connection.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum, StrEnum

import msgspec

from isthmus.model.errors import IsthmusError
from isthmus.model.ports import Outcome, StreamRequest
from isthmus.wire import announcement

HEADER = struct.Struct("!BI")
HEADER_BYTES = HEADER.size
SESSION = struct.Struct("!I")
MAX_DATA_BYTES = 1024 * 1024
MAX_REQUEST_BYTES = 4096
MAX_DETAIL_BYTES = 1024
MAX_ANNOUNCEMENTS = 4
MAX_ANNOUNCE_BYTES = MAX_ANNOUNCEMENTS * (announcement.MAX_BYTES + 8)
MAX_DATAGRAM_BYTES = 65_535


class StreamError(IsthmusError):
    """The other side broke the protocol; its connection is closed."""

    code = "wire.stream"


class Side(StrEnum):
    """What an end of a connection does, fixed for its life."""

    OPENER = "opener"
    ACCEPTOR = "acceptor"


class Phase(StrEnum):
    """What a connection is doing."""

    STARTING = "starting"
    IDLE = "idle"
    OPENING = "opening"
    STREAMING = "streaming"
    DATAGRAMS = "datagrams"


class FrameType(IntEnum):
    """The first byte of a frame."""

    READY = 1
    OPEN = 2
    OPENED = 3
    REFUSED = 4
    DATA = 5
    END = 6
    SESSION_OPEN = 7
    DATAGRAM = 8
    SESSION_CLOSE = 9
    ANNOUNCE = 10


class Ready(msgspec.Struct, frozen=True):
    """The acceptor has checked us and serves."""

    announcements: tuple[bytes, ...] = ()


class Announced(msgspec.Struct, frozen=True):
    """What the opener announces; believed for its signatures alone, by whoever checks them."""

    announcements: tuple[bytes, ...]


class Open(msgspec.Struct, frozen=True):
    """The opener wants a stream."""

    request: StreamRequest


class Opened(msgspec.Struct, frozen=True):
    """The endpoint is connected."""


class Refused(msgspec.Struct, frozen=True):
    """The endpoint is not connected."""

    outcome: Outcome
    detail: str


class End(msgspec.Struct, frozen=True):
    """The other side sends no more on this stream."""


class SessionOpen(msgspec.Struct, frozen=True):
    """The opener starts a datagram session."""

    session: int
    request: StreamRequest


class Datagram(msgspec.Struct, frozen=True):
    """One datagram of a session."""

    session: int
    payload: bytes


class SessionClose(msgspec.Struct, frozen=True):
    """A datagram session is over."""

    session: int
    outcome: Outcome
    detail: str


# The bytes of a DATA frame come as a memoryview of what was fed, valid until the buffer is used again.
Event = memoryview | Ready | Announced | Open | Opened | Refused | End | SessionOpen | Datagram | SessionClose

_LENGTHS: dict[FrameType, tuple[int, int]] = {
    FrameType.READY: (0, MAX_ANNOUNCE_BYTES),
    FrameType.ANNOUNCE: (1, MAX_ANNOUNCE_BYTES),
    FrameType.OPEN: (1, MAX_REQUEST_BYTES),
    FrameType.OPENED: (0, 0),
    FrameType.REFUSED: (1, MAX_DETAIL_BYTES),
    FrameType.DATA: (1, MAX_DATA_BYTES),
    FrameType.END: (0, 0),
    FrameType.SESSION_OPEN: (SESSION.size + 1, SESSION.size + MAX_REQUEST_BYTES),
    FrameType.DATAGRAM: (SESSION.size, SESSION.size + MAX_DATAGRAM_BYTES),
    FrameType.SESSION_CLOSE: (SESSION.size + 1, SESSION.size + MAX_DETAIL_BYTES),
}

# What each side may receive in each phase, and the phase that follows. END is added in receive(): it depends on ours.
_RECEIVE: dict[tuple[Side, Phase], dict[FrameType, Phase]] = {
    (Side.OPENER, Phase.STARTING): {FrameType.READY: Phase.IDLE},
    (Side.OPENER, Phase.OPENING): {FrameType.OPENED: Phase.STREAMING, FrameType.REFUSED: Phase.IDLE},
    (Side.OPENER, Phase.STREAMING): {FrameType.DATA: Phase.STREAMING, FrameType.END: Phase.STREAMING},
    (Side.OPENER, Phase.DATAGRAMS): {
        FrameType.DATAGRAM: Phase.DATAGRAMS,
        FrameType.SESSION_CLOSE: Phase.DATAGRAMS,
    },
    (Side.ACCEPTOR, Phase.IDLE): {
        FrameType.OPEN: Phase.OPENING,
        FrameType.SESSION_OPEN: Phase.DATAGRAMS,
        FrameType.ANNOUNCE: Phase.IDLE,
    },
    (Side.ACCEPTOR, Phase.STREAMING): {FrameType.DATA: Phase.STREAMING, FrameType.END: Phase.STREAMING},
    (Side.ACCEPTOR, Phase.DATAGRAMS): {
        FrameType.SESSION_OPEN: Phase.DATAGRAMS,
        FrameType.DATAGRAM: Phase.DATAGRAMS,
        FrameType.SESSION_CLOSE: Phase.DATAGRAMS,
    },
}

_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(StreamRequest).decode
_decode_announcements = msgspec.msgpack.Decoder(tuple[bytes, ...]).decode
_decode_outcome = msgspec.msgpack.Decoder(tuple[Outcome, str]).decode

_TYPES = {int(kind): kind for kind in FrameType}
_DATA = int(FrameType.DATA)
_OPENED, _END = Opened(), End()


def _frame(kind: FrameType, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(body)) + body


_END_FRAME = _frame(FrameType.END)
_OPENED_FRAME = _frame(FrameType.OPENED)


def data_header_into(buffer: memoryview, length: int) -> None:
    """Write the header of a DATA frame of ``length`` bytes at the start of ``buffer``; the bytes follow it there."""
    HEADER.pack_into(buffer, 0, _DATA, length)


class StreamMachine:
    """One end of a link connection.

    Sending methods return the frame to send and raise ``RuntimeError`` when the caller is out of step; ``receive``
    raises ``StreamError`` when the other side is.
    """

    __slots__ = ("_data_left", "_partial", "_received_end", "_sent_end", "phase", "side")

    def __init__(self, side: Side) -> None:
        self.side = side
        self.phase = Phase.STARTING
        self._sent_end = False
        self._received_end = False
        self._data_left = 0
        self._partial = bytearray()

    # What we send.

    def ready(self, announcements: Sequence[bytes] = ()) -> bytes:
        """Acceptor: serve from now on; ``announcements`` are ours, signed."""
        self._expect(Side.ACCEPTOR, Phase.STARTING)
        self.phase = Phase.IDLE
        return _frame(FrameType.READY, _encode(announcements) if announcements else b"")

    def announce(self, announcements: Sequence[bytes]) -> bytes:
        """Opener: tell ours, before the first stream."""
        self._expect(Side.OPENER, Phase.IDLE)
        return _frame(FrameType.ANNOUNCE, _encode(announcements))

    def open(self, request: StreamRequest) -> bytes:
        """Opener: ask for a stream on an idle connection."""
        self._expect(Side.OPENER, Phase.IDLE)
        body = _request_body(request)
        self.phase = Phase.OPENING
        return _frame(FrameType.OPEN, body)

    def opened(self) -> bytes:
        """Acceptor: the endpoint is connected."""
        self._expect(Side.ACCEPTOR, Phase.OPENING)
        self._start_stream()
        return _OPENED_FRAME

    def refused(self, outcome: Outcome, detail: str) -> bytes:
        """Acceptor: no stream; the connection is idle again."""
        self._expect(Side.ACCEPTOR, Phase.OPENING)
        self.phase = Phase.IDLE
        return _frame(FrameType.REFUSED, _outcome_body(outcome, detail))

    def end(self) -> bytes:
        """No more bytes from us on this stream."""
        if self.phase is not Phase.STREAMING or self._sent_end:
            raise RuntimeError(f"END in phase {self.phase}")
        self._sent_end = True
        self._finish_if_both_ended()
        return _END_FRAME

    def session_open(self, session: int, request: StreamRequest) -> bytes:
        """Opener: start a datagram session; the connection carries only datagrams from then on."""
        if self.side is not Side.OPENER or self.phase not in (Phase.IDLE, Phase.DATAGRAMS):
            raise RuntimeError(f"SESSION_OPEN of the {self.side} in phase {self.phase}")
        body = SESSION.pack(session) + _request_body(request)
        self.phase = Phase.DATAGRAMS
        return _frame(FrameType.SESSION_OPEN, body)

    def datagram(self, session: int, payload: bytes) -> bytes:
        """One datagram of at most 65,535 bytes."""
        return HEADER.pack(FrameType.DATAGRAM, SESSION.size + len(payload)) + SESSION.pack(session) + payload

    def session_close(self, session: int, outcome: Outcome, detail: str) -> bytes:
        """The session is over for us."""
        return _frame(FrameType.SESSION_CLOSE, SESSION.pack(session) + _outcome_body(outcome, detail))

    # What we receive.

    def receive(self, data: memoryview) -> list[Event]:
        """Return what ``data`` completes, in order. Raises StreamError; the machine is then of no more use."""
        events: list[Event] = []
        position, end = 0, len(data)
        while position < end:
            if self._data_left:
                cut = min(position + self._data_left, end)
                events.append(data[position:cut])
                self._data_left -= cut - position
                position = cut
            elif self._partial or end - position < HEADER_BYTES:
                position = self._resume(data, position, events)
            else:
                position = self._frame_at(data, position, events)
        return events

    @property
    def mid_stream(self) -> bool:
        """Whether an end of the connection now would cut something off."""
        return self.phase in (Phase.OPENING, Phase.STREAMING, Phase.STARTING) or bool(self._partial)

    def _frame_at(self, data: memoryview, position: int, events: list[Event]) -> int:
        code, length = _unpack(data, position)
        if code == _DATA and self.phase is Phase.STREAMING and 0 < length <= MAX_DATA_BYTES and not self._received_end:
            self._data_left = length  # the usual case, without look-ups
            return position + HEADER_BYTES
        kind = self._check(code, length)
        position += HEADER_BYTES
        if kind is FrameType.DATA:
            self._data_left = length
        elif len(data) - position < length:
            self._partial += data[position - HEADER_BYTES :]
            return len(data)
        else:
            events.append(self._take(kind, bytes(data[position : position + length])))
            position += length
        return position

    def _resume(self, data: memoryview, position: int, events: list[Event]) -> int:
        """Go on with a frame whose start came before; returns the position after what was taken."""
        partial = self._partial
        if len(partial) < HEADER_BYTES:
            cut = position + HEADER_BYTES - len(partial)
            partial += data[position:cut]
            position = min(cut, len(data))
            if len(partial) < HEADER_BYTES:
                return position
        code, length = _unpack(partial)
        kind = self._check(code, length)
        if kind is FrameType.DATA:
            self._data_left = length
            partial.clear()
            return position
        cut = position + HEADER_BYTES + length - len(partial)
        partial += data[position:cut]
        if len(partial) == HEADER_BYTES + length:
            body = bytes(partial[HEADER_BYTES:])
            partial.clear()
            events.append(self._take(kind, body))
        return min(cut, len(data))

    def _check(self, code: int, length: int) -> FrameType:
        """Refuse what may not come now, before anything is kept for it."""
        kind = _TYPES.get(code)
        if kind is None:
            raise StreamError(f"a frame of unknown type {code} came in phase {self.phase}")
        if kind not in _RECEIVE.get((self.side, self.phase), ()):
            raise StreamError(f"{kind.name} came to the {self.side} in phase {self.phase}")
        if self._received_end and self.phase is Phase.STREAMING:
            raise StreamError(f"{kind.name} came after END")
        least, most = _LENGTHS[kind]
        if not least <= length <= most:
            raise StreamError(f"{kind.name} of {length} bytes came; the limits are {least} and {most}")
        return kind

    def _take(self, kind: FrameType, body: bytes) -> Event:
        self.phase = _RECEIVE[self.side, self.phase][kind]
        try:
            return self._event(kind, body)
        except msgspec.MsgspecError as error:
            raise StreamError(f"{kind.name} cannot be read: {error}") from error

    def _event(self, kind: FrameType, body: bytes) -> Event:
        match kind:
            case FrameType.END:
                self._received_end = True
                self._finish_if_both_ended()
                return _END
            case FrameType.OPEN:
                return Open(_decode_request(body))
            case FrameType.OPENED:
                self._start_stream()
                return _OPENED
            case FrameType.REFUSED:
                return Refused(*_decode_outcome(body))
            case FrameType.READY:
                return Ready(_announcements(body))
            case FrameType.ANNOUNCE:
                return Announced(_announcements(body))
        (session,) = SESSION.unpack_from(body)
        rest = body[SESSION.size :]
        match kind:
            case FrameType.SESSION_OPEN:
                return SessionOpen(session, _decode_request(rest))
            case FrameType.SESSION_CLOSE:
                return SessionClose(session, *_decode_outcome(rest))
        return Datagram(session, rest)

    def _start_stream(self) -> None:
        self.phase = Phase.STREAMING
        self._sent_end = self._received_end = False

    def _finish_if_both_ended(self) -> None:
        if self._sent_end and self._received_end:
            self.phase = Phase.IDLE

    def _expect(self, side: Side, phase: Phase) -> None:
        if self.side is not side or self.phase is not phase:
            raise RuntimeError(f"the {self.side} is in phase {self.phase}, not the {side} in {phase}")


def _unpack(data: memoryview | bytearray, position: int = 0) -> tuple[int, int]:
    code, length = HEADER.unpack_from(data, position)
    return code, length


def _request_body(request: StreamRequest) -> bytes:
    body = _encode(request)
    if len(body) > MAX_REQUEST_BYTES:
        raise StreamError(f"a stream request of {len(body)} bytes; the limit is {MAX_REQUEST_BYTES}")
    return body


def _announcements(body: bytes) -> tuple[bytes, ...]:
    found = _decode_announcements(body) if body else ()
    if len(found) > MAX_ANNOUNCEMENTS:
        raise StreamError(f"{len(found)} announcements came at once; the limit is {MAX_ANNOUNCEMENTS}")
    return found


def _outcome_body(outcome: Outcome, detail: str) -> bytes:
    body = _encode((outcome, detail[:200]))
    assert len(body) <= MAX_DETAIL_BYTES
    return body
