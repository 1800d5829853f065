"""What an upstream answered: checked, stripped of OPT, and ready to be given to any client. Pure.

The bytes stay as the upstream wrote them; only id, flags, the question's letter case and the TTLs are written anew
for each client. RFC 2181 (TTLs), RFC 2308 (how long "no" may be kept).
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import dns.exception
import dns.message
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from isthmus.dns import message
from isthmus.dns.message import Malformed, Query, Rcode
from isthmus.plan.names import Record, RecordType

MAX_TTL_S = 86_400
MAX_NEGATIVE_TTL_S = 3_600
MAX_RECORDS = 4_096
STALE_TTL_S = 30  # RFC 8767 section 4


@dataclass(frozen=True, slots=True)
class UpstreamReply:
    """A reply without OPT. ``ttl_at`` are the TTLs' offsets; ``lifetime_s`` is 0 where it must not be kept."""

    wire: bytes
    flags: int
    rcode: int
    lifetime_s: int
    ttl_at: tuple[int, ...]

    @property
    def truncated(self) -> bool:
        return bool(self.flags & message.TC)


@dataclass(slots=True)
class _Walk:
    """What one pass over the records collects."""

    ttl_at: list[int] = field(default_factory=list)
    positive_s: int = MAX_TTL_S
    negative_s: int | None = None
    types: set[int] = field(default_factory=set)
    opt: tuple[int, int] | None = None
    extended: int = 0


def parse_reply(data: bytes, ident: int, question: bytes) -> UpstreamReply | None:
    """Return None for bytes that answer something else (a late or forged reply). Raises Malformed for broken ones."""
    if len(data) < message.HEADER_BYTES:
        raise Malformed("shorter than a header")
    got, flags, questions, answers, authorities, additional = message.HEADER.unpack_from(data)
    if got != ident or not flags & message.QR or flags & message.OPCODE:
        return None
    rcode = flags & 0xF
    end = message.HEADER_BYTES + len(question)
    if questions == 0 and rcode:  # some servers refuse without repeating the question
        return UpstreamReply(data[:12], flags, rcode, 0, ())
    if questions != 1 or data[12:end].lower() != question.lower():
        return None
    if flags & message.TC:
        return UpstreamReply(data[:end], flags, rcode, 0, ())
    walk = _walk(data, end, (answers, authorities, additional))
    if walk.opt is not None:
        at, after = walk.opt
        if after != len(data):
            return parse_reply(_without_edns(data), ident, question)
        head = message.HEADER.pack(got, flags, 1, answers, authorities, additional - 1)
        data = head + data[message.HEADER_BYTES : at]
    rcode |= walk.extended << 4
    qtype = int.from_bytes(question[-4:-2], "big")
    return UpstreamReply(data, flags, rcode, _lifetime_s(rcode, qtype, walk), tuple(walk.ttl_at))


def _walk(data: bytes, at: int, counts: tuple[int, int, int]) -> _Walk:
    walk = _Walk()
    if sum(counts) > MAX_RECORDS:
        raise Malformed("too many records")
    for section, count in enumerate(counts):
        for _ in range(count):
            start, at = at, message.skip_name(data, at)
            if len(data) < at + message.FIXED.size:
                raise Malformed("a record is cut off")
            rtype, _, ttl_s, length = message.FIXED.unpack_from(data, at)
            after = at + message.FIXED.size + length
            if after > len(data):
                raise Malformed("a record's data is cut off")
            if rtype == message.TYPE_OPT:
                walk.opt, walk.extended = (start, after), ttl_s >> 24
            else:
                walk.ttl_at.append(at + 4)
                ttl_s = 0 if ttl_s & 0x8000_0000 else ttl_s
                if section == 0:
                    walk.types.add(rtype)
                    walk.positive_s = min(walk.positive_s, ttl_s)
                elif section == 1 and rtype == RecordType.SOA and length >= 22:
                    (minimum,) = struct.unpack_from("!I", data, after - 4)
                    walk.negative_s = min(ttl_s, minimum, MAX_NEGATIVE_TTL_S)
            at = after
    return walk


def _lifetime_s(rcode: int, qtype: int, walk: _Walk) -> int:
    if rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        return 0
    if rcode == Rcode.NOERROR and qtype in walk.types:
        return walk.positive_s
    return min(walk.positive_s, walk.negative_s or 0)


def _without_edns(data: bytes) -> bytes:
    """Rewrite a reply whose OPT is not its last record."""
    try:
        parsed = dns.message.from_wire(data)
        parsed.use_edns(False)
        return parsed.to_wire()
    except (dns.exception.DNSException, ValueError) as error:
        raise Malformed(str(error)) from error


def render(upstream: UpstreamReply, query: Query, *, age_s: int = 0, stale: bool = False, limit: int | None) -> bytes:
    """The reply for one client: its id and question, TTLs less ``age_s``; over ``limit`` an empty one with TC."""
    size = len(upstream.wire) + (11 if query.edns is not None else 0)
    if len(upstream.wire) == message.HEADER_BYTES or (limit is not None and size > limit):
        tc = message.TC if upstream.wire[message.HEADER_BYTES :] else 0
        return message.reply(query, upstream.rcode, flags=tc)
    out = bytearray(upstream.wire)
    kept = message.RD | message.CD
    flags = message.QR | message.RA | (query.flags & kept) | (upstream.rcode & 0xF)
    if query.do or query.flags & message.AD:
        flags |= upstream.flags & message.AD
    struct.pack_into("!HH", out, 0, query.id, flags)
    out[12 : 12 + len(query.question)] = query.question
    for at in upstream.ttl_at:
        ttl_s = STALE_TTL_S if stale else max(0, int.from_bytes(out[at : at + 4], "big") - age_s)
        struct.pack_into("!I", out, at, ttl_s)
    if query.edns is not None:
        (additional,) = struct.unpack_from("!H", out, 10)
        struct.pack_into("!H", out, 10, additional + 1)
        out += message.encode_opt(upstream.rcode, query.do)
    return bytes(out)


class AgingReply:
    """A kept reply for the table of replies: its TTLs go down by the second, until its lifetime is over."""

    __slots__ = ("_age_s", "_now_s", "_query", "_stored_s", "_upstream", "_wire")

    def __init__(self, upstream: UpstreamReply, query: Query, age_s: int, now_s: Callable[[], float]) -> None:
        self._upstream, self._query, self._now_s = upstream, query, now_s
        self._stored_s = now_s() - age_s
        self._age_s = -1
        self._wire = b""

    def next(self) -> bytes | None:
        """The reply behind its id, as of now; None when it is too old."""
        age_s = int(self._now_s() - self._stored_s)
        if age_s >= self._upstream.lifetime_s:
            return None
        if age_s != self._age_s:
            self._age_s = age_s
            self._wire = render(self._upstream, self._query, age_s=age_s, limit=None)[2:]
        return self._wire


def render_behind(alias: tuple[Record, ...], end: bytes, query: Query, *, limit: int | None) -> bytes:
    """Join an ExternalName's CNAME with the reply for its target (``end``, as ``render`` made it).

    Raises Malformed where the upstream's records cannot be read.
    """
    try:
        parsed = dns.message.from_wire(end)
        chain = [dns.rrset.from_text(f"{r.name}.", r.ttl_s, "IN", r.type.name, r.data) for r in alias]
        joined = dns.message.make_response(dns.message.from_wire(_bare(query)), recursion_available=True)
        joined.set_rcode(parsed.rcode())
        joined.answer = chain + parsed.answer
        joined.authority = parsed.authority
        if query.edns is not None:
            joined.use_edns(0, dns.flags.DO if query.do else 0, message.OUR_UDP_BYTES)
        wire = joined.to_wire(max_size=65_535)
    except (dns.exception.DNSException, ValueError) as error:
        raise Malformed(str(error)) from error
    if limit is not None and len(wire) > limit:
        return message.reply(query, Rcode.NOERROR, flags=message.TC)
    return wire


def _bare(query: Query) -> bytes:
    return message.HEADER.pack(query.id, query.flags & (message.RD | message.CD), 1, 0, 0, 0) + query.question
