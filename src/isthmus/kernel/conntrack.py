"""What conntrack remembers of one redirected flow: one netlink question, one answer, 20 to 50 microseconds.

Serves UDP after DNAT, where no socket option tells the original destination, and TCP on kernels whose SO_ORIGINAL_DST
must not be called. Needs CAP_NET_ADMIN. Numbers from include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Collection, Container, Iterator
from typing import ClassVar, NamedTuple

from isthmus.kernel.sockets import Address
from isthmus.model.errors import KernelError, NotPermitted, NotSupported

NETLINK_NETFILTER = 12
_GET = (1 << 8) | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_DELETE = (1 << 8) | 2  # IPCTNL_MSG_CT_DELETE
_REQUEST, _ACKNOWLEDGE, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF

_TUPLE_ORIGINAL, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_V4_SOURCE, _V4_DESTINATION, _V6_SOURCE, _V6_DESTINATION = 1, 2, 3, 4
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3

_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")


class NotIntercepted(KernelError):
    """The flow was not redirected by netfilter, or its record is gone."""

    code: ClassVar[str] = "kernel.not-intercepted"


class Record(NamedTuple):
    """The first packet of a flow as its sender made it, before any address was changed."""

    client: Address
    destination: Address


class Conntrack:
    """Looks records up. One socket, used from one thread."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        except OSError as error:
            raise _refused(error.errno or 0) from error
        self._socket.settimeout(1.0)  # the answer is there when send() returns; this only guards against surprises
        self._sequence = 0

    def record(self, protocol: int, peer: Address, local: Address) -> Record:
        """The record of the flow whose packets arrive at ``local`` from ``peer``, both as our socket sees them.

        NotIntercepted where there is none (the flow was not redirected, or its record has timed out).
        """
        asked = self._send(_GET, _REQUEST, _question(protocol, source=local, destination=peer))
        while True:
            answer = self._socket.recv(8192)
            length, kind, _flags, sequence, _port = _HEADER.unpack_from(answer)
            if sequence == asked:  # anything else answers a question that timed out
                break
        if kind == _ERROR:
            raise _refused(-struct.unpack_from("=i", answer, _HEADER.size)[0])
        return parse_record(answer[_HEADER.size + _FAMILY.size : length])

    def forget(self, protocol: int, local: Collection[Address], destinations: Container[str] | None = None) -> int:
        """Delete the records of flows that were redirected to one of ``local``; how many there were.

        With ``destinations`` only of those that were going to one of these addresses. Afterwards the next packet of
        such a flow is decided anew. Walks conntrack's whole table once: some 10 ms.
        """
        found = [
            (family, body)
            for family, body in self._dump()
            if any(_is_redirected(body, protocol, name) for name in local)
            and (destinations is None or parse_record(body).destination[0] in destinations)
        ]
        for family, body in found:
            original = next(payload for kind, payload in _walk(body) if kind == _TUPLE_ORIGINAL)
            self._delete(family, _attribute(_TUPLE_ORIGINAL | _NESTED, original))
        return len(found)

    def _dump(self) -> Iterator[tuple[int, bytes]]:
        """Family and attributes of every record."""
        sequence = self._send(_GET, _REQUEST | _DUMP, _FAMILY.pack(socket.AF_UNSPEC, 0, 0))
        while True:
            answer = self._socket.recv(1 << 18)
            at = 0
            while at + _HEADER.size <= len(answer):
                length, kind, _flags, number, _port = _HEADER.unpack_from(answer, at)
                if number == sequence and kind == _DONE:
                    return
                if number == sequence and kind == _ERROR:
                    raise _refused(-struct.unpack_from("=i", answer, at + _HEADER.size)[0])
                if number == sequence:
                    body = at + _HEADER.size
                    yield answer[body], answer[body + _FAMILY.size : at + length]
                at += max((length + 3) & ~3, _HEADER.size)

    def _delete(self, family: int, flow: bytes) -> None:
        sequence = self._send(_DELETE, _REQUEST | _ACKNOWLEDGE, _FAMILY.pack(family, 0, 0) + flow)
        while True:
            answer = self._socket.recv(8192)
            _length, kind, _flags, number, _port = _HEADER.unpack_from(answer)
            if number == sequence and kind == _ERROR:
                code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
                if code not in (0, errno.ENOENT):  # ENOENT: it has ended by itself
                    raise _refused(code)
                return

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
        return self._sequence

    def close(self) -> None:
        self._socket.close()


def parse_record(attributes: bytes) -> Record:
    """The original tuple out of a conntrack message's attributes. KernelError where it is cut off or missing."""
    try:
        original = dict(_walk(dict(_walk(attributes))[_TUPLE_ORIGINAL]))
        addresses, ports = dict(_walk(original[_TUPLE_IP])), dict(_walk(original[_TUPLE_PROTOCOL]))
        if _V4_SOURCE in addresses:
            source, destination = (socket.inet_ntoa(addresses[key]) for key in (_V4_SOURCE, _V4_DESTINATION))
        else:
            source, destination = (
                socket.inet_ntop(socket.AF_INET6, addresses[key]) for key in (_V6_SOURCE, _V6_DESTINATION)
            )
        return Record((source, _port(ports[_SOURCE_PORT])), (destination, _port(ports[_DESTINATION_PORT])))
    except (KeyError, ValueError, OSError, struct.error) as error:
        raise KernelError("reading a conntrack record: the message is cut off") from error


def _walk(attributes: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if length < _ATTRIBUTE.size or at + length > len(attributes):
            raise ValueError("an attribute is longer than its message")
        yield kind & _TYPE_MASK, attributes[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _port(raw: bytes) -> int:
    if len(raw) != 2:
        raise ValueError("a port has two bytes")
    return int.from_bytes(raw, "big")


def _is_redirected(attributes: bytes, protocol: int, local: Address) -> bool:
    """Whether answers of the flow come from ``local``; a look at the bytes first, for a table may hold 100,000."""
    if _packed(local[0]) not in attributes:
        return False
    answers = next((payload for kind, payload in _walk(attributes) if kind == _TUPLE_REPLY), b"")
    parts = dict(_walk(answers))
    addresses, ports = dict(_walk(parts.get(_TUPLE_IP, b""))), dict(_walk(parts.get(_TUPLE_PROTOCOL, b"")))
    return (
        addresses.get(_V6_SOURCE if ":" in local[0] else _V4_SOURCE) == _packed(local[0])
        and ports.get(_NUMBER) == bytes((protocol,))
        and ports.get(_SOURCE_PORT) == local[1].to_bytes(2, "big")
    )


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _question(protocol: int, *, source: Address, destination: Address) -> bytes:
    if ":" in source[0]:
        family, keys = socket.AF_INET6, (_V6_SOURCE, _V6_DESTINATION)
    else:
        family, keys = socket.AF_INET, (_V4_SOURCE, _V4_DESTINATION)
    addresses = b"".join(_attribute(key, _packed(end[0])) for key, end in zip(keys, (source, destination), strict=True))
    ports = b"".join(
        (
            _attribute(_NUMBER, bytes((protocol,))),
            _attribute(_SOURCE_PORT, source[1].to_bytes(2, "big")),
            _attribute(_DESTINATION_PORT, destination[1].to_bytes(2, "big")),
        )
    )
    flow = _attribute(_TUPLE_IP | _NESTED, addresses) + _attribute(_TUPLE_PROTOCOL | _NESTED, ports)
    return _FAMILY.pack(family, 0, 0) + _attribute(_TUPLE_REPLY | _NESTED, flow)


def _attribute(kind: int, payload: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _refused(number: int) -> KernelError:
    text = f"asking conntrack for a flow's record: {os.strerror(number)}"
    if number == errno.ENOENT:
        return NotIntercepted(text)
    if number in (errno.EPERM, errno.EACCES):
        return NotPermitted(text, hint="the agent's processes need CAP_NET_ADMIN")
    if number in (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
        return NotSupported(text, hint="the kernel needs nf_conntrack_netlink")
    return KernelError(text)
