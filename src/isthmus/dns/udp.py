"""Questions over UDP: up to 64 are read by one system call and answered by another.

recvmmsg and sendmmsg are reached through ctypes on the C library; the message headers are laid out once and shared by
both directions, so that for an answer in the table Python does one look-up and one copy. All replies leave from the
bound address itself, so no packet information is needed. recvmmsg(2), sendmmsg(2).
"""

import ctypes
import errno
import mmap
import os
import socket
import struct

import structlog

from isthmus.dns.answers import Answers, AskUpstreams, Forward
from isthmus.loop.loop import READ, Loop

log = structlog.get_logger(__name__)

BATCH = 64
ROUNDS = 4  # batches before the other descriptors of the loop get their turn
SLOT_BYTES = 2048
NAME_BYTES = 28  # sockaddr_in6, the larger one
RECEIVE_BUFFER_BYTES = 4 * 1024 * 1024
SO_RCVBUFFORCE = 33
IP_FREEBIND = 15
IPV6_FREEBIND = 78

Address = tuple[str, int] | tuple[str, int, int, int]


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_size", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("header", _Msghdr), ("size", ctypes.c_uint))


# PyDLL keeps the interpreter's lock: the descriptors do not block, so giving it away would only cost time.
_libc = ctypes.PyDLL(None, use_errno=True)
_recvmmsg, _sendmmsg = _libc.recvmmsg, _libc.sendmmsg


class _Batch:
    """Buffers and headers for one batch; a received message and its reply share slot and peer address."""

    def __init__(self, name_size: int) -> None:
        self.slots = mmap.mmap(-1, BATCH * SLOT_BYTES)  # slices of it are bytes at once, and assignable
        self.names = mmap.mmap(-1, BATCH * NAME_BYTES)
        self._keep = (ctypes.c_char.from_buffer(self.slots), ctypes.c_char.from_buffer(self.names))
        base, names = (ctypes.addressof(first) for first in self._keep)
        self.receive, self._in = self._headers(base, names, name_size)
        self.send, out = self._headers(base, names, name_size)
        words = ctypes.sizeof(_Mmsghdr) // 4
        self.sizes = memoryview(self.receive).cast("B").cast("I")  # sizes[i * stride + offset]: bytes received
        self.size_at = tuple(_Mmsghdr.size.offset // 4 + words * at for at in range(BATCH))
        self.lengths = memoryview(out).cast("B").cast("L")  # lengths[2 * i + 1]: bytes to send (size_t)
        step = ctypes.sizeof(_Mmsghdr)
        self.send_at = tuple(ctypes.c_void_p(ctypes.addressof(self.send) + at * step) for at in range(BATCH))
        self.receive_at = ctypes.c_void_p(ctypes.addressof(self.receive))
        self._out = out

    @staticmethod
    def _headers(base: int, names: int, name_size: int) -> "tuple[ctypes.Array[_Mmsghdr], ctypes.Array[_Iovec]]":
        vectors = (_Iovec * BATCH)(*(_Iovec(base + at * SLOT_BYTES, SLOT_BYTES) for at in range(BATCH)))
        headers = (_Mmsghdr * BATCH)()
        for at, header in enumerate(headers):
            header.header.name = names + at * NAME_BYTES
            header.header.name_size = name_size
            header.header.iov = ctypes.addressof(vectors) + at * ctypes.sizeof(_Iovec)
            header.header.iov_count = 1
        return headers, vectors


class UdpServer:
    """One bound UDP address on the loop."""

    def __init__(self, loop: Loop, bound: socket.socket, answers: Answers, ask: AskUpstreams) -> None:
        self._loop, self._socket, self._answers, self._ask = loop, bound, answers, ask
        self._fd = bound.fileno()
        self._batch = _Batch(16 if bound.family == socket.AF_INET else 28)
        self._unpack = _unpack_v4 if bound.family == socket.AF_INET else _unpack_v6

    def start(self) -> None:
        """Begin to read; what has arrived since the bind is answered now."""
        self._loop.add(self._fd, READ, self._readable)

    def close(self) -> None:
        self._loop.discard(self._socket)

    def _readable(self, _events: int) -> None:
        for _ in range(ROUNDS):
            if self._round() < BATCH:
                return

    def _round(self) -> int:
        """Read and answer one batch; returns how many messages were read."""
        batch = self._batch
        count: int = _recvmmsg(self._fd, batch.receive_at, BATCH, socket.MSG_DONTWAIT, None)
        if count <= 0:
            return 0
        slots, sizes, size_at, lengths = batch.slots, batch.sizes, batch.size_at, batch.lengths
        look_up = self._answers.table.get
        first = hits = 0
        for at in range(count):
            begin = at * SLOT_BYTES + 2
            found = look_up(slots[begin : begin - 2 + sizes[size_at[at]]])
            if found is not None and type(found) is not bytes:
                found = found.next()  # type: ignore[union-attr]
            if found is None:
                reply = self._miss(at, sizes[size_at[at]])
                if reply is None:
                    self._send(first, at)
                    first = at + 1
                    continue
                lengths[2 * at + 1] = size = len(reply)
                slots[begin - 2 : begin - 2 + size] = reply
                continue
            hits += 1
            lengths[2 * at + 1] = size = len(found) + 2
            slots[begin : begin - 2 + size] = found
        self._send(first, count)
        counters = self._answers.counters
        counters["queries_udp"] += count
        counters["table_hits"] += hits
        return count

    def _miss(self, at: int, size: int) -> bytes | None:
        begin = at * SLOT_BYTES
        try:
            answer = self._answers.answer(self._batch.slots[begin : begin + size], udp=True)
            if not isinstance(answer, Forward):
                return answer
            peer = self._unpack(self._batch.names[at * NAME_BYTES : (at + 1) * NAME_BYTES])
            self._ask(answer, True, lambda reply: self._send_one(reply, peer))
        except Exception:  # one question must never end the service of all
            self._answers.counters["crashed"] += 1
            log.exception("question failed")
        return None

    def _send(self, first: int, end: int) -> None:
        """Send the replies in slots ``first`` to ``end``; one that the kernel refuses is counted and left out."""
        while first < end:
            sent: int = _sendmmsg(self._fd, self._batch.send_at[first], end - first, socket.MSG_DONTWAIT)
            if sent <= 0:
                if ctypes.get_errno() == errno.EINTR:
                    continue
                self._answers.counters["unsent"] += 1
                sent = 1
            first += sent

    def _send_one(self, reply: bytes, peer: Address) -> None:
        try:
            self._socket.sendto(reply, socket.MSG_DONTWAIT, peer)
        except OSError:
            self._answers.counters["unsent"] += 1


def _unpack_v4(raw: bytes) -> Address:
    return socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big")


def _unpack_v6(raw: bytes) -> Address:
    (scope,) = struct.unpack_from("=I", raw, 24)
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), int.from_bytes(raw[2:4], "big"), 0, scope


def bind(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """A non-blocking socket on an address that need not be there yet (IP_FREEBIND). Raises OSError."""
    six = ":" in address
    bound = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind)
    try:
        if six:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        else:
            bound.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        if kind == socket.SOCK_STREAM:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif os.geteuid() == 0:
            bound.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        bound.setblocking(False)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound
