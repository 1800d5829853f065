"""Two connected TCP sockets joined: bytes, half-close, RST and back-pressure pass from each to the other.

A byte goes from one socket into a buffer that the whole process shares, and at once from there into the other socket.
Only what the other socket does not take is copied aside, at most one turn's bytes a direction; until it is taken,
nothing more is read, so TCP's own window carries the back-pressure to the sender. A connection holds two descriptors
and no thread. A turn moves at most QUANTUM_BYTES; a direction that fills its turns gets larger ones, up to BULK_BYTES
through the loop's pipe (conduit.py) instead of the buffer, but behind everything else that is ready, so that bulk does
not hold up a request.
"""

import socket
import struct
from collections.abc import Callable
from enum import StrEnum

from isthmus.loop.conduit import Conduit
from isthmus.loop.loop import ERROR, PEER_ENDED, READ, WRITE, Loop

QUANTUM_BYTES = 256 * 1024
BULK_BYTES = 1024 * 1024
SHORT_BYTES = 64 * 1024  # a turn below this makes the next one smaller
HELD_MOST_BYTES = 64 * 1024 * 1024  # while all splices together hold more than this aside, turns do not grow

READING = READ | PEER_ENDED
LINGER_ZERO = struct.pack("ii", 1, 0)

_buffer = bytearray(BULK_BYTES)
_view = memoryview(_buffer)
_DONT_WAIT = socket.MSG_DONTWAIT


class _Held:
    """What all splices of the process hold aside."""

    bytes = 0


class End(StrEnum):
    """Why a splice ended."""

    CLOSED = "closed"  # both sides sent their FIN, everything was delivered
    RESET_BY_A = "reset-by-a"  # side A sent RST or its path failed; B got an RST
    RESET_BY_B = "reset-by-b"
    ABORTED = "aborted"  # by ``Splice.abort``; both got an RST


Ended = Callable[[int, int, End], None]


def reset(loop: Loop, sock: socket.socket) -> None:
    """Close ``sock`` with an RST; what it has not sent yet is thrown away."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
    except OSError:
        pass  # the socket is dead already
    loop.discard(sock)


class Splice:
    """Joins ``a`` and ``b`` until both have ended, then calls ``ended(bytes_a_to_b, bytes_b_to_a, why)`` once.

    Takes over both sockets: they must be connected, and the caller must have taken them out of the loop. They may be
    blocking or not, but must carry no timeout (``settimeout``), for Python would wait it out here. ``to_b`` are bytes
    that were read from ``a`` before, ``to_a`` the other way round. ``ended`` may be called from within the constructor,
    when a side is dead already.
    """

    __slots__ = ("_a", "_b", "_ended", "loop")

    def __init__(
        self,
        loop: Loop,
        a: socket.socket,
        b: socket.socket,
        ended: Ended,
        *,
        to_b: bytes = b"",
        to_a: bytes = b"",
    ) -> None:
        self.loop = loop
        self._ended: Ended | None = ended
        side_a, side_b = _Side(self, a), _Side(self, b)
        side_a.other, side_b.other = side_b, side_a
        self._a, self._b = side_a, side_b
        loop.add(side_a.fd, READING, side_a.ready)
        loop.add(side_b.fd, READING, side_b.ready)
        if to_b:
            side_a.deliver(to_b)
        if to_a and self._ended is not None:
            side_b.deliver(to_a)

    @property
    def bytes_a_to_b(self) -> int:
        """Bytes from ``a`` that ``b``'s socket has taken."""
        return self._a.delivered()

    @property
    def bytes_b_to_a(self) -> int:
        """Bytes from ``b`` that ``a``'s socket has taken."""
        return self._b.delivered()

    @property
    def open(self) -> bool:
        """Whether the splice still runs."""
        return self._ended is not None

    def abort(self) -> None:
        """End both connections with an RST. Does nothing when the splice has ended."""
        if self._ended is not None:
            reset(self.loop, self._a.sock)
            reset(self.loop, self._b.sock)
            self._finish(End.ABORTED)

    def side_failed(self, side: "_Side") -> None:
        """``side`` is dead: pass the RST on."""
        if self._ended is not None:
            self.loop.discard(side.sock)
            reset(self.loop, side.other.sock)
            self._finish(End.RESET_BY_A if side is self._a else End.RESET_BY_B)

    def both_ended(self) -> None:
        """Everything was delivered both ways; closing sends the FINs that are still owed."""
        if self._ended is not None:
            self.loop.discard(self._a.sock)
            self.loop.discard(self._b.sock)
            self._finish(End.CLOSED)

    def _finish(self, why: End) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            self._a.release()
            self._b.release()
            ended(self._a.delivered(), self._b.delivered(), why)


class _Side:
    """One of the two sockets: reads itself, and holds what it could not write yet (``pending``)."""

    __slots__ = (
        "_recv_into",
        "_send",
        "ended",
        "fd",
        "held",
        "interest",
        "other",
        "pending",
        "quantum",
        "received",
        "shut_after",
        "sock",
        "splice",
        "waits",
        "watched",
    )

    other: "_Side"

    def __init__(self, splice: Splice, sock: socket.socket) -> None:
        self.splice = splice
        self.sock = sock
        self.fd = sock.fileno()
        self._recv_into = sock.recv_into
        self._send = sock.send
        self.interest = READING
        self.watched = True
        self.pending: memoryview | None = None
        self.held = 0
        self.quantum = QUANTUM_BYTES
        self.waits = False
        self.received = 0
        self.ended = False
        self.shut_after = False

    def delivered(self) -> int:
        """Bytes read from this side that the other side's socket has taken."""
        waiting = self.other.pending
        return self.received - (len(waiting) if waiting is not None else 0)

    def ready(self, events: int) -> None:
        """Called by the loop."""
        if events & WRITE and self.pending is not None:
            self._flush()
            if not self.splice.open:
                return
        if events & READING and self.interest & READ:
            if self.quantum == QUANTUM_BYTES:
                self._pump(events)
            elif not self.waits:
                self.waits = True
                self.splice.loop.call_behind(self._bulk_turn)
        elif events & ~(READING | WRITE):
            self._gone(events)

    def _bulk_turn(self) -> None:
        self.waits = False
        if not (self.splice.open and self.interest & READ):
            return
        conduit = self.splice.loop.conduit
        if conduit is None:
            self._pump(0)
        else:
            self._move(conduit)

    def _move(self, conduit: Conduit) -> None:
        """Like ``_pump``, without copying what the other side takes at once."""
        other, quantum = self.other, self.quantum
        try:
            moved = conduit.move(self.fd, other.fd, quantum)
        except BlockingIOError:
            return
        except OSError:
            self.splice.side_failed(self)
            return
        if not moved.taken:
            self._end_of_stream()
            return
        self.received += moved.taken
        if moved.error is not None:
            other.write_failed()
        elif moved.rest:
            self.quantum = max(quantum // 2, QUANTUM_BYTES)
            other._hold(memoryview(moved.rest))
        else:
            self._judge(moved.taken, quantum)

    def _judge(self, count: int, quantum: int) -> None:
        """A turn of ``quantum`` moved ``count`` bytes, all taken: how large the next one is."""
        if count == quantum:
            if quantum < BULK_BYTES and _Held.bytes <= HELD_MOST_BYTES:
                if quantum == QUANTUM_BYTES:  # bulk from now on: the conduit needs sockets that do not block
                    self.sock.setblocking(False)
                    self.other.sock.setblocking(False)
                self.quantum = 2 * quantum
        elif count < SHORT_BYTES and quantum > QUANTUM_BYTES:
            self.quantum = quantum // 2

    def _pump(self, events: int) -> bool:
        """Move one quantum to the other side. Returns whether all of it was taken and more may come."""
        quantum = self.quantum
        try:
            count = self._recv_into(_buffer, quantum, _DONT_WAIT)
        except BlockingIOError:
            return False
        except OSError:
            self.splice.side_failed(self)
            return False
        if not count:
            self._end_of_stream()
            return False
        self.received += count
        other = self.other
        try:
            sent = other._send(_view[:count], _DONT_WAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            other.write_failed()
            return False
        if sent != count:
            self.quantum = max(quantum // 2, QUANTUM_BYTES)
            other._hold(_view[sent:count])
            return False
        if count >= QUANTUM_BYTES or quantum > QUANTUM_BYTES:
            self._judge(count, quantum)
        # A FIN was there when the loop looked, and this read emptied the queue: no second read is needed to see it.
        if events & (PEER_ENDED | ERROR) == PEER_ENDED and count < quantum:
            self._end_of_stream()
            return False
        return True

    def deliver(self, data: bytes) -> None:
        """Send ``data``, read from this side before it was spliced, to the other."""
        self.received += len(data)
        other = self.other
        try:
            sent = other._send(data, _DONT_WAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            other.write_failed()
            return
        if sent != len(data):
            other._hold(memoryview(data)[sent:])

    def _hold(self, rest: memoryview) -> None:
        """Keep what this side did not take, and read no more from the other until it does."""
        self.pending = memoryview(bytes(rest))
        self.held = len(rest)
        _Held.bytes += self.held
        self._watch(self.interest | WRITE)
        self.other._watch(self.other.interest & ~READING)

    def _flush(self) -> None:
        pending = self.pending
        assert pending is not None
        try:
            sent = self._send(pending, _DONT_WAIT)
        except BlockingIOError:
            return
        except OSError:
            self.write_failed()
            return
        if sent < len(pending):
            self.pending = pending[sent:]
            return
        self.pending = None
        self.release()
        other = self.other
        if other.ended:
            self._watch(self.interest & ~WRITE)
            self._after_last_byte()
            return
        # The source waited meanwhile, so it most likely has more: while it fills this side again at once, no interest
        # changes and the kernel is not asked.
        other._pump(0)
        if self.splice.open and self.pending is None:
            self._watch(self.interest & ~WRITE)
            if not other.ended:
                other._watch(other.interest | READING)

    def release(self) -> None:
        """Nothing is held aside for this side any more."""
        _Held.bytes -= self.held
        self.held = 0

    def _end_of_stream(self) -> None:
        """This side sent its FIN: pass it on behind what is still held."""
        self.ended = True
        other = self.other
        if other.pending is not None:
            other.shut_after = True
            self._watch(self.interest & ~READING)
        elif other.ended and self.pending is None:
            self.splice.both_ended()
        else:
            self._watch(self.interest & ~READING)
            other._shut()

    def _after_last_byte(self) -> None:
        """This side has taken the last byte of the other, which has ended."""
        if self.ended and self.other.pending is None:
            self.splice.both_ended()
        elif self.shut_after:
            self.shut_after = False
            self._shut()

    def _shut(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.write_failed()

    def write_failed(self) -> None:
        """This side's peer is gone; an answer that it sent before (an early error page) is still delivered."""
        if not self.ended and self.other.pending is None:
            try:
                count = self._recv_into(_buffer, QUANTUM_BYTES, _DONT_WAIT)
                self.received += self.other._send(_view[:count], _DONT_WAIT) if count else 0
            except OSError:
                pass
        self.splice.side_failed(self)

    def _gone(self, events: int) -> None:
        """Error or hang-up while nothing is read from this side."""
        if events & ERROR:
            self.splice.side_failed(self)
        elif self.watched:
            # Both directions are shut but bytes wait for the other side: a hang-up would be reported again and again.
            self.splice.loop.remove(self.fd)
            self.watched = False

    def _watch(self, interest: int) -> None:
        if interest == self.interest or not self.splice.open:
            return
        self.interest = interest
        if self.watched:
            self.splice.loop.modify(self.fd, interest)
        else:
            self.splice.loop.add(self.fd, interest, self.ready)
            self.watched = True
