"""The first bytes of a connection that a relay shall join with another: a ticket, and the relay's answer. Pure.

A dialler sends ``MAGIC`` and the 32 bytes of its ticket, then waits. The relay answers ``ACCEPTED`` once the other half
is there too, or ``REFUSED``, one byte of length and a reason, and closes. After ``ACCEPTED`` every byte belongs to
the two agents. A ticket is random, bound to one half of one pair, used once, and lives for seconds.
"""

from isthmus.model.errors import IsthmusError

MAGIC = b"ISTHMUS1"
TICKET_BYTES = 32
PREAMBLE_BYTES = len(MAGIC) + TICKET_BYTES
ACCEPTED = b"\x01"
REFUSED = b"\x00"
MAX_REASON_BYTES = 255


class TicketError(IsthmusError):
    """The other side does not speak the ticket protocol."""

    code = "wire.ticket"


class TicketRefused(IsthmusError):
    """The relay will not join this connection; the message is the relay's reason."""

    code = "relay.ticket-refused"


def preamble(ticket: bytes) -> bytes:
    """What a dialler sends first."""
    if len(ticket) != TICKET_BYTES:
        raise TicketError(f"a ticket has {TICKET_BYTES} bytes, not {len(ticket)}")
    return MAGIC + ticket


def refusal(reason: str) -> bytes:
    """The relay's refusal; a long reason is cut."""
    text = reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]
    return REFUSED + bytes((len(text),)) + text


class PreambleReader:
    """The relay's side: collects a ticket. A wrong first byte is noticed at once, not after forty."""

    def __init__(self) -> None:
        self._buffer = b""

    @property
    def missing_bytes(self) -> int:
        """How much to read at most, so that no byte of the stream behind the ticket is taken."""
        return PREAMBLE_BYTES - len(self._buffer)

    def feed(self, data: bytes) -> bytes | None:
        """Return the ticket once it is complete. Raises TicketError for anything else than a preamble."""
        self._buffer += data
        head = self._buffer[: len(MAGIC)]
        if not MAGIC.startswith(head):
            raise TicketError("the connection starts with neither a TLS hello nor a ticket")
        if len(self._buffer) > PREAMBLE_BYTES:
            raise TicketError("more bytes than a ticket were taken from the connection")
        return self._buffer[len(MAGIC) :] if len(self._buffer) == PREAMBLE_BYTES else None


class AnswerReader:
    """The dialler's side: ``feed`` returns True once the relay has joined the pair; later bytes are the peer's."""

    def __init__(self) -> None:
        self._buffer = b""

    @property
    def missing_bytes(self) -> int:
        """How much to read at most, so that no byte of the peer is taken."""
        if len(self._buffer) < 2:
            return 1
        return 2 + self._buffer[1] - len(self._buffer)

    def feed(self, data: bytes) -> bool:
        """Raises TicketRefused with the relay's reason, TicketError for an answer that is none."""
        self._buffer += data
        if not self._buffer:
            return False
        if self._buffer[:1] == ACCEPTED:
            if len(self._buffer) > 1:
                raise TicketError("bytes of the peer were taken together with the relay's answer")
            return True
        if self._buffer[:1] != REFUSED:
            raise TicketError("the relay's answer is neither acceptance nor refusal")
        if len(self._buffer) >= 2 and len(self._buffer) >= 2 + self._buffer[1]:
            raise TicketRefused(self._buffer[2 : 2 + self._buffer[1]].decode("utf-8", "replace"))
        return False
