"""A query's bytes in, a reply's bytes out: what this node answers by itself. Pure.

Three layers, fastest first: ``table`` holds whole replies by the bytes of the query behind its id (filled by use,
emptied by the scope of what changed); then the record sets of plan/names.py; what is not ours comes out as a Forward.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from isthmus.dns import message
from isthmus.dns.message import Malformed, Query, Rcode
from isthmus.plan.names import NameAnswer, Names, Record, RecordType, Resolution

TABLE_ENTRIES = 65_536
FIXED_ADDRESS_BYTES = {RecordType.A: 16, RecordType.AAAA: 28}  # a pointer, the fixed part, the address


class Rotation:
    """A reply whose address records change places each time, so that clients that take the first share the load."""

    __slots__ = ("_at", "_head", "_records", "_step", "_tail")

    def __init__(self, head: bytes, records: bytes, tail: bytes, step: int) -> None:
        self._head, self._records, self._tail, self._step = head, records, tail, step
        self._at = 0

    def next(self) -> bytes:
        """The reply behind its id, with the records one place on."""
        at = self._at = (self._at + self._step) % len(self._records)
        return self._head + self._records[at:] + self._records[:at] + self._tail


class Aging(Protocol):
    """A reply that is another one later; None once it holds no more (dns/upstream_reply.py has one)."""

    def next(self) -> bytes | None:
        """The reply behind its id, as of now."""


TableReply = bytes | Rotation | Aging


@dataclass(frozen=True, slots=True)
class Forward:
    """A question for the upstreams: for ``follow``, the end of ``alias`` (an ExternalName's CNAME), else as it came.

    ``scopes``: what would make the name one of ours (the reverse name of an address that a service takes).
    """

    query: Query
    alias: tuple[Record, ...] = ()
    follow: str = ""
    scopes: tuple[str, ...] = ()


AskUpstreams = Callable[[Forward, bool, Callable[[bytes], None]], None]
"""``ask(forward, udp, reply)``: ``reply`` is called once with the reply's bytes, at once or later, on the loop."""


class Answers:
    """Answers queries from the plan. ``counters`` are read by ``status``; the table's hits are counted by its user."""

    def __init__(self, names: Names, counters: Counter[str]) -> None:
        self.names = names
        self.table: dict[bytes, TableReply] = {}
        self.counters = counters
        self.ready = True  # False until everything known was received: unknown is not yet "does not exist"
        self._keys: dict[str, set[bytes]] = {}
        self._turn = 0

    def forget(self, scopes: Iterable[str]) -> None:
        """Drop the replies that depend on what changed; costs as much as there are such replies."""
        for scope in scopes:
            for key in self._keys.pop(scope, ()):
                self.table.pop(key, None)

    def forget_all(self) -> None:
        """Drop every reply."""
        self.table.clear()
        self._keys.clear()

    def answer(self, data: bytes, *, udp: bool) -> bytes | Forward | None:
        """Return the reply to one message, what to ask the upstreams, or None where silence is right.

        Never raises, whatever the bytes are. Silence is for replies (two servers would talk for ever) and for
        fragments without a header.
        """
        if len(data) < message.HEADER_BYTES or data[2] & 0x80:
            self.counters["silent"] += 1
            return None
        if data[2] & 0x78:
            return self._refuse(data, Rcode.NOTIMP)
        try:
            query = message.parse_query(data)
        except Malformed:
            return self._refuse(data, Rcode.FORMERR)
        limit = query.limit if udp else None
        refused = _refused(query)
        if refused is not None:
            self.counters[refused.name.lower()] += 1
            return message.reply(query, refused, flags=0, limit=limit)
        return self._resolve(query, limit)

    def known(self, data: bytes) -> bytes | None:
        """The reply to a message whose like was answered before, if it still holds."""
        found = self.table.get(data[2:])
        behind = found if found is None or isinstance(found, bytes) else found.next()
        if behind is None:
            return None
        self.counters["table_hits"] += 1
        return data[:2] + behind

    def fail(self, query: Query, *, udp: bool = True) -> bytes:
        """SERVFAIL, as everyone gets it whose question cannot be answered now."""
        self.counters["servfail"] += 1
        return message.reply(query, Rcode.SERVFAIL, flags=0, limit=message.MIN_UDP_BYTES if udp else None)

    def _refuse(self, data: bytes, rcode: Rcode) -> bytes:
        self.counters[rcode.name.lower()] += 1
        return message.refusal(data, rcode)

    def _resolve(self, query: Query, limit: int | None) -> bytes | Forward:
        if query.rtype == message.TYPE_ANY:
            return self._any(query, limit)
        decided = self.names.lookup_labels(query.labels, query.rtype).action
        if decided.resolution is Resolution.FORWARD:
            return Forward(query, scopes=decided.scopes)
        if not self.ready:
            return self.fail(query, udp=limit is not None)
        if decided.follow:
            return Forward(query, decided.records, decided.follow)
        self.counters[decided.resolution.value] += 1
        try:
            return self._encode(query, decided, limit)
        except ValueError:  # a manifest's name or address that no message can hold
            self.counters["unencodable"] += 1
            return self.fail(query, udp=limit is not None)

    def _encode(self, query: Query, decided: NameAnswer, limit: int | None) -> bytes:
        rcode = Rcode.NXDOMAIN if decided.resolution is Resolution.NXDOMAIN else Rcode.NOERROR
        answers = message.encode_records(decided.records, query)
        step = FIXED_ADDRESS_BYTES.get(RecordType.A if query.rtype == 1 else RecordType.AAAA, 0)
        rotates = len(answers) > 1 and all(len(answer) == step for answer in answers)
        if rotates:
            self._turn += 1
            at = self._turn % len(answers)
            answers = answers[at:] + answers[:at]
        rest = [message.encode_records(part, query) for part in (decided.authority, decided.additional)]
        out = message.reply(query, rcode, (answers, *rest), limit=limit)
        if not out[2] & 0x02 and len(out) <= query.limit:
            start = message.HEADER_BYTES + len(query.question)
            block = step * len(answers)
            entry = Rotation(out[2:start], out[start : start + block], out[start + block :], step) if rotates else None
            self.remember(query, entry or out[2:], decided.scopes)
        return out

    def remember(self, query: Query, entry: TableReply, scopes: tuple[str, ...] = ()) -> None:
        """Answer the same bytes with ``entry`` from now on, until one of ``scopes`` is forgotten.

        Not for questions with options or odd letter case: nearly every one of those is another.
        """
        if not query.plain or query.wire[12:] != query.wire[12:].lower():
            return
        if len(self.table) >= TABLE_ENTRIES:
            self.forget_all()
        key = query.wire[2:]
        self.table[key] = entry
        for scope in scopes:
            self._keys.setdefault(scope, set()).add(key)

    def _any(self, query: Query, limit: int | None) -> bytes:
        """RFC 8482: one made-up HINFO where the name may exist, so that ANY cannot be used to amplify."""
        self.counters["any"] += 1
        decided = self.names.lookup_labels(query.labels, RecordType.HINFO).action
        if decided.resolution is Resolution.NXDOMAIN and self.ready:
            soa = message.encode_records(decided.authority, query)
            return message.reply(query, Rcode.NXDOMAIN, ((), soa, ()), limit=limit)
        hinfo = b"\xc0\x0c" + message.FIXED.pack(RecordType.HINFO, message.CLASS_IN, 3600, 9) + b"\x07RFC8482\0"
        return message.reply(query, Rcode.NOERROR, ((hinfo,), (), ()), limit=limit)


def _refused(query: Query) -> Rcode | None:
    """What is refused by its form, before any name is looked at."""
    if query.edns:
        return Rcode.BADVERS
    if query.rclass != message.CLASS_IN:
        return Rcode.REFUSED
    if query.rtype == message.TYPE_ANY:
        return None
    if query.rtype in (message.TYPE_AXFR, message.TYPE_IXFR):
        return Rcode.REFUSED
    if query.rtype in message.META_TYPES or query.rtype in (0, message.TYPE_OPT):
        return Rcode.NOTIMP
    return None
