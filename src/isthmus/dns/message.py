"""Queries in, replies out, as bytes (RFC 1035, 6891). Pure.

Written by hand because every question that is not in the answer table passes here; dnspython parses and builds what is
rare (an alias joined with an upstream's answer), and is the witness of the tests.
"""

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from ipaddress import ip_address
from typing import NamedTuple

from isthmus.plan.names import Labels, Record, RecordType

HEADER = struct.Struct("!HHHHHH")
FIXED = struct.Struct("!HHIH")  # type, class, TTL, length of the data
HEADER_BYTES = 12
MAX_NAME_BYTES = 255
MAX_LABEL_BYTES = 63
MIN_UDP_BYTES = 512
OUR_UDP_BYTES = 1232  # passes every path with an MTU of 1280 unfragmented
MAX_ADDITIONAL = 4  # records after the question of a query: OPT, perhaps a signature

CLASS_IN = 1
TYPE_OPT = 41
TYPE_IXFR = 251
TYPE_AXFR = 252
TYPE_ANY = 255
META_TYPES = range(128, 256)  # RFC 6895 3.1: question and meta types

QR = 0x8000
OPCODE = 0x7800
AA = 0x0400
TC = 0x0200
RD = 0x0100
RA = 0x0080
AD = 0x0020
CD = 0x0010
DO = 0x8000  # in the flags of OPT


class Rcode(IntEnum):
    """Response codes that are sent; BADVERS needs OPT for its upper bits."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class Malformed(ValueError):
    """The bytes are not a DNS message as RFC 1035 has it."""


class Query(NamedTuple):
    """A question as it came. ``question`` is its bytes with type and class; ``udp_bytes`` what the client takes.

    ``edns`` is None without OPT, else its version. ``plain`` says that nothing but the question and an OPT without
    options was in the message, so that equal bytes may be given equal answers. ``wire`` is the whole message.
    """

    id: int
    flags: int
    question: bytes
    labels: Labels
    rtype: int
    rclass: int
    udp_bytes: int = MIN_UDP_BYTES
    edns: int | None = None
    do: bool = False
    plain: bool = True
    wire: bytes = b""

    @property
    def limit(self) -> int:
        """The most bytes that a reply over UDP may have."""
        return min(self.udp_bytes, OUR_UDP_BYTES)

    @property
    def name(self) -> str:
        """The name for a reader; never for comparing."""
        return ".".join(self.labels)


def parse_query(data: bytes) -> Query:
    """Parse a query with exactly one question. Raises Malformed; the caller has seen to QR, opcode and length."""
    ident, flags, questions, answers, authorities, additional = HEADER.unpack_from(data)
    if questions != 1 or answers or authorities or additional > MAX_ADDITIONAL:
        raise Malformed("a query has one question and no answers")
    labels, at = _read_question_name(data)
    if len(data) < at + 4:
        raise Malformed("the question is cut off")
    rtype, rclass = struct.unpack_from("!HH", data, at)
    end = at + 4
    question = data[HEADER_BYTES:end]
    if not additional:
        if len(data) != end:
            raise Malformed("bytes follow the question")
        return Query(ident, flags, question, labels, rtype, rclass, wire=data)
    return _with_additional(data, end, additional, Query(ident, flags, question, labels, rtype, rclass, wire=data))


def _with_additional(data: bytes, at: int, count: int, query: Query) -> Query:
    seen = False
    plain = count == 1
    for _ in range(count):
        owner, at = at, skip_name(data, at)
        if len(data) < at + FIXED.size:
            raise Malformed("a record is cut off")
        rtype, size, bits, length = FIXED.unpack_from(data, at)
        at += FIXED.size + length
        if rtype != TYPE_OPT:
            plain = False
            continue
        if seen or data[owner] != 0:
            raise Malformed("OPT stands once, at the root")
        seen = True
        plain = plain and length == 0
        query = query._replace(edns=bits >> 16 & 0xFF, do=bool(bits & DO), udp_bytes=max(MIN_UDP_BYTES, size))
    if at != len(data):
        raise Malformed("the message does not end with its last record")
    return query._replace(plain=plain)


def _read_question_name(data: bytes) -> tuple[Labels, int]:
    """Lower-case labels and where the name ends. A pointer has nothing to point at here, so it is malformed."""
    labels: list[str] = []
    at, size = HEADER_BYTES, len(data)
    while True:
        if at >= size:
            raise Malformed("the name is cut off")
        length = data[at]
        if not length:
            break
        if length > MAX_LABEL_BYTES or at + length >= size:
            raise Malformed("a label is too long or cut off")
        labels.append(data[at + 1 : at + 1 + length].lower().decode("latin-1"))
        at += 1 + length
    if at + 1 - HEADER_BYTES > MAX_NAME_BYTES:
        raise Malformed("the name is longer than 255 bytes")
    return tuple(labels) or ("",), at + 1


def skip_name(data: bytes, at: int) -> int:
    """Where the name at ``at`` ends. Never follows a pointer, so no loop can hold it. Raises Malformed."""
    size = len(data)
    while at < size:
        length = data[at]
        if length >= 0xC0:
            if at + 2 > size:
                break
            return at + 2
        if length > MAX_LABEL_BYTES:
            raise Malformed("a label of an unknown kind")
        at += 1 + length
        if not length:
            return at
    raise Malformed("the name is cut off")


def encode_name(name: str) -> bytes:
    """A name, without compression. Raises Malformed for one that no message can hold."""
    out = bytearray()
    for label in name.removesuffix(".").split(".") if name.strip(".") else ():
        raw = label.encode("latin-1", "replace")
        if not 0 < len(raw) <= MAX_LABEL_BYTES:
            raise Malformed(f"a label of {name} is empty or longer than 63 bytes")
        out.append(len(raw))
        out += raw
    out.append(0)
    if len(out) > MAX_NAME_BYTES:
        raise Malformed(f"{name} is longer than 255 bytes")
    return bytes(out)


def encode_data(rtype: RecordType, data: str) -> bytes:
    """Record data from its presentation form; names uncompressed, as RFC 2782 and 3597 ask."""
    if rtype in (RecordType.A, RecordType.AAAA):
        return ip_address(data).packed
    if rtype in (RecordType.CNAME, RecordType.NS, RecordType.PTR):
        return encode_name(data)
    if rtype is RecordType.SRV:
        priority, weight, port, target = data.split(" ")
        return struct.pack("!HHH", int(priority), int(weight), int(port)) + encode_name(target)
    if rtype is RecordType.SOA:
        server, mailbox, *numbers = data.split(" ")
        return encode_name(server) + encode_name(mailbox) + struct.pack("!5I", *map(int, numbers))
    return b"".join(_encode_string(text) for text in data.removeprefix('"').removesuffix('"').split('" "'))


def _encode_string(text: str) -> bytes:
    raw = text.encode()
    return bytes([len(raw)]) + raw


def encode_records(records: Iterable[Record], query: Query) -> list[bytes]:
    """Each record in wire form; an owner that is the question's name, or an end of it, points there."""
    return [
        _owner(record.name, query) + FIXED.pack(record.type, CLASS_IN, record.ttl_s, len(data)) + data
        for record in records
        for data in (encode_data(record.type, record.data),)
    ]


def _owner(name: str, query: Query) -> bytes:
    """The shortest form of an owner name: a pointer into the question where the question ends with that name."""
    labels = tuple(name.split("."))
    before = len(query.labels) - len(labels)
    if before >= 0 and query.labels[before:] == labels:
        return (0xC000 | HEADER_BYTES + sum(1 + len(label) for label in query.labels[:before])).to_bytes(2, "big")
    return encode_name(name)


def encode_opt(extended_rcode: int = 0, do: bool = False) -> bytes:
    """Our OPT record: version 0, our UDP size, no options."""
    return b"\0" + FIXED.pack(TYPE_OPT, OUR_UDP_BYTES, (extended_rcode >> 4) << 24 | (DO if do else 0), 0)


def reply(
    query: Query,
    rcode: int,
    sections: Sequence[Sequence[bytes]] = ((), (), ()),
    *,
    flags: int = AA,
    limit: int | None = None,
) -> bytes:
    """A reply in wire form. ``sections`` are answers, authority and additional, encoded.

    With ``limit`` (bytes, UDP) additional records go first without a sign; then answers are left out from the end and
    TC is set, so that a client that cannot retry over TCP still has some of them.
    """
    answers, authority, additional = (list(section) for section in sections)
    opt = [] if query.edns is None else [encode_opt(rcode)]
    size = HEADER_BYTES + len(query.question) + sum(map(len, opt))
    if limit is not None:
        size += sum(map(len, answers)) + sum(map(len, authority))
        room = limit - size
        if sum(map(len, additional)) > room:
            additional = []
        if room < 0:
            flags |= TC
            while room < 0 and (authority or answers):
                room += len((authority or answers).pop())
    flags |= QR | RA | (query.flags & (RD | CD)) | (rcode & 0xF)
    counts = (1, len(answers), len(authority), len(additional) + len(opt))
    head = HEADER.pack(query.id, flags, *counts)
    return b"".join((head, query.question, *answers, *authority, *additional, *opt))


def refusal(data: bytes, rcode: Rcode) -> bytes:
    """The shortest reply: the header alone, for a message whose question is not to be trusted. Never amplifies."""
    ident, flags = struct.unpack_from("!HH", data)
    return HEADER.pack(ident, QR | RA | (flags & (OPCODE | RD)) | (rcode & 0xF), 0, 0, 0, 0)
