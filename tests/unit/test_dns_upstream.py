"""What upstreams say is checked, kept as long as it may be, and given to each client in its own terms."""

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.dns import message
from isthmus.dns.cache import STALE_S, Cache
from isthmus.dns.message import Malformed, Query, encode_name, parse_query
from isthmus.dns.upstream_reply import AgingReply, UpstreamReply, parse_reply, render, render_behind
from isthmus.dns.upstreams import UpstreamError, Upstreams, parse_resolv_conf, parse_server
from isthmus.plan.names import Record, RecordType

NAME = "www.example.com."


def query(name: str = NAME, **options: object) -> Query:
    return parse_query(dns.message.make_query(name, "A", **options).to_wire())  # type: ignore[arg-type]


QUESTION = query().question


def answer(*records: str, rcode: int = 0, soa: str = "", edns: bool = True, ident: int = 7) -> bytes:
    asked = dns.message.make_query(NAME, "A", use_edns=0 if edns else False, id=ident)
    reply = dns.message.make_response(asked, recursion_available=True)
    reply.set_rcode(rcode)
    reply.answer = [dns.rrset.from_text(*text.split(" ", 4)) for text in records]
    if soa:
        reply.authority = [dns.rrset.from_text("example.com.", 900, "IN", "SOA", soa)]
    return reply.to_wire()


def parsed(data: bytes) -> UpstreamReply:
    found = parse_reply(data, 7, QUESTION)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("data", "lifetime_s"),
    [
        (answer(f"{NAME} 60 IN A 192.0.2.1"), 60),
        (answer(f"{NAME} 60 IN CNAME a.example.", "a.example. 20 IN A 192.0.2.1"), 20),  # the least of the chain
        (answer(f"{NAME} 2000000000 IN A 192.0.2.1"), 86_400),  # our most
        (answer(rcode=3, soa="ns. h. 1 1 1 1 25"), 25),  # the SOA's minimum
        (answer(soa="ns. h. 1 1 1 1 5000"), 900),  # the SOA's own TTL
        (answer(f"{NAME} 60 IN CNAME a.example.", rcode=3, soa="ns. h. 1 1 1 1 25"), 25),
        (answer(), 0),  # NODATA without an SOA says nothing of how long
        (answer(rcode=2), 0),
    ],
)
def test_a_reply_is_kept_as_long_as_its_records_allow(data: bytes, lifetime_s: int) -> None:
    assert parsed(data).lifetime_s == lifetime_s


def test_what_answers_something_else_is_passed_over() -> None:
    data = answer(f"{NAME} 60 IN A 192.0.2.1")
    assert parse_reply(data, 8, QUESTION) is None  # another id
    assert parse_reply(data, 7, query("other.example.com").question) is None
    assert parse_reply(dns.message.make_query(NAME, "A", id=7).to_wire(), 7, QUESTION) is None  # a query


def test_the_client_gets_its_id_its_letter_case_and_ttls_less_the_age() -> None:
    client = query("wWw.eXample.com", id=99)
    reply = dns.message.from_wire(render(parsed(answer(f"{NAME} 60 IN A 192.0.2.1")), client, age_s=13, limit=512))
    assert (reply.id, reply.edns, reply.answer[0].ttl) == (99, -1 if client.edns is None else 0, 47)
    assert reply.question[0].name.to_text() == "wWw.eXample.com."
    assert reply.flags & dns.flags.RA and not reply.flags & dns.flags.AA


def test_a_stale_reply_carries_the_ttl_of_rfc_8767() -> None:
    rendered = render(parsed(answer(f"{NAME} 600 IN A 192.0.2.1")), query(), stale=True, limit=512)
    assert dns.message.from_wire(rendered).answer[0].ttl == 30


def test_a_reply_over_the_clients_limit_is_empty_with_tc() -> None:
    upstream = parsed(answer(*(f"{NAME} 60 IN A 192.0.2.{at}" for at in range(60))))
    cut = dns.message.from_wire(render(upstream, query(use_edns=False), limit=512))
    assert cut.flags & dns.flags.TC and not cut.answer
    whole = dns.message.from_wire(render(upstream, query(), limit=None))
    assert len(whole.answer) == 60 or len(whole.answer[0]) == 60


def test_in_the_table_a_kept_reply_ages_by_the_second_and_ends_with_its_lifetime() -> None:
    times_s = iter((100.0, 100.0, 100.9, 101.0, 146.9, 147.0, 500.0))
    aging = AgingReply(parsed(answer(f"{NAME} 60 IN A 192.0.2.1")), query(), 13, lambda: next(times_s))
    ttls = []
    for reply in (aging.next() for _ in range(6)):
        ttls.append(reply and dns.message.from_wire(b"\0\0" + reply).answer[0].ttl)
    assert ttls == [47, 47, 46, 1, None, None]


def test_an_opt_that_is_not_last_is_taken_out_all_the_same() -> None:
    data = answer(f"{NAME} 60 IN A 192.0.2.1")
    opt = data[-11:]
    extra = encode_name("x.example.com") + message.FIXED.pack(1, 1, 60, 4) + b"\1\2\3\4"
    moved = data[:10] + b"\0\2" + data[12:-11] + opt + extra
    reply = parsed(moved)
    assert b"\0\0\x29" not in reply.wire
    assert dns.message.from_wire(render(reply, query(use_edns=False), limit=512)).additional


def test_an_alias_stands_before_the_targets_records() -> None:
    alias = (Record("mail.shop.svc.cluster.local", RecordType.CNAME, NAME, 30),)
    client = query("mail.shop.svc.cluster.local", use_edns=False, id=5)
    end = render(parsed(answer(f"{NAME} 60 IN A 192.0.2.1")), query(NAME, use_edns=False), limit=None)
    joined = dns.message.from_wire(render_behind(alias, end, client, limit=512))
    assert joined.id == 5
    assert [rrset.to_text() for rrset in joined.answer] == [
        f"mail.shop.svc.cluster.local. 30 IN CNAME {NAME}",
        f"{NAME} 60 IN A 192.0.2.1",
    ]


@given(st.binary(max_size=300))
def test_any_bytes_from_an_upstream_are_passed_over_or_called_malformed(data: bytes) -> None:
    for candidate in (data, b"\0\7\x81\x80\0\1\0\2\0\1\0\1" + QUESTION + data):
        try:
            reply = parse_reply(candidate, 7, QUESTION)
        except Malformed:
            continue
        if reply is not None:
            render(reply, query(), age_s=5, limit=512)


@given(st.lists(st.tuples(st.integers(12, 90), st.integers(0, 255)), max_size=8), st.integers(0, 30))
def test_a_reply_with_bytes_changed_or_cut_never_breaks_the_reader(edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(answer(f"{NAME} 60 IN CNAME a.example.", "a.example. 20 IN A 192.0.2.1"))
    for at, value in edits:
        data[at % len(data)] = value
    try:
        reply = parse_reply(bytes(data[: len(data) - cut]), 7, QUESTION)
    except Malformed:
        return
    if reply is not None:
        assert len(render(reply, query(), limit=512)) <= 512


LABEL = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=63)


@given(st.lists(LABEL, min_size=1, max_size=8))
def test_names_are_encoded_as_dnspython_encodes_them(labels: list[str]) -> None:
    name = ".".join(labels)
    try:
        expected = dns.name.from_text(name).to_wire()
    except dns.name.NameTooLong:
        with pytest.raises(Malformed):
            encode_name(name)
        return
    assert encode_name(name) == encode_name(f"{name}.") == expected
    parsed_query = parse_query(b"\0\1\1\0\0\1\0\0\0\0\0\0" + encode_name(name) + b"\0\1\0\1")
    assert parsed_query.labels == tuple(labels)


def reply_for(lifetime_s: int) -> UpstreamReply:
    return UpstreamReply(b"\0" * 12 + QUESTION, 0, 0, lifetime_s, ())


KEY = (("www", "example", "com"), 1, False, False)


def test_an_entry_is_fresh_then_stale_then_gone() -> None:
    cache = Cache(10)
    cache.put(KEY, reply_for(60), 100.0)
    states = [cache.get(KEY, now_s) for now_s in (100.0, 159.9, 160.0, 100.0 + 60 + STALE_S, 102.0 + 60 + STALE_S)]
    assert [state and state.fresh for state in states] == [True, True, False, False, None]


def test_the_least_recently_used_entry_goes_first_and_the_bound_holds() -> None:
    cache = Cache(3)
    keys = [((str(at),), 1, False, False) for at in range(4)]
    for key in keys[:3]:
        cache.put(key, reply_for(60), 0.0)
    cache.get(keys[0], 1.0)
    cache.put(keys[3], reply_for(60), 2.0)
    assert [cache.get(key, 3.0) is not None for key in keys] == [True, False, True, True]
    assert len(cache) == 3


def test_what_may_not_be_kept_is_not_kept() -> None:
    cache = Cache(3)
    cache.put(KEY, reply_for(0), 0.0)
    assert cache.get(KEY, 0.0) is None


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("192.0.2.53", ("192.0.2.53", 53)),
        ("192.0.2.53:5353", ("192.0.2.53", 5353)),
        ("2001:DB8::53", ("2001:db8::53", 53)),
        ("[2001:db8::53]", ("2001:db8::53", 53)),
        ("[2001:db8::53]:5353", ("2001:db8::53", 5353)),
    ],
)
def test_a_server_is_written_as_users_write_it(text: str, server: tuple[str, int]) -> None:
    assert parse_server(text) == server


@given(
    st.sampled_from(["", "example.com", "192.0.2.53:0", "192.0.2.53:dns", "192.0.2.53:70000", "[::1", "1.2.3"])
    | st.text()
)
def test_a_server_that_cannot_be_one_is_named(text: str) -> None:
    try:
        address, port = parse_server(text)
    except UpstreamError as error:
        assert repr(text) in error.message and error.hint
    else:
        assert address and 0 < port < 65_536


def test_of_resolv_conf_the_readable_nameserver_lines_count() -> None:
    text = "# a comment\nsearch example.com\nnameserver 192.0.2.1\nnameserver\nnameserver x\nnameserver ::1 # local\n"
    assert parse_resolv_conf(text) == [("192.0.2.1", 53), ("::1", 53)]


def test_resting_upstreams_come_last_and_looping_ones_not_at_all() -> None:
    upstreams = Upstreams()
    assert upstreams.set([("192.0.2.1", 53), ("192.0.2.2", 53), ("192.0.2.3", 53), ("192.0.2.1", 53)])
    upstreams.all[0].failures = 2
    upstreams.all[1].looping = True
    assert [one.address for one in upstreams.in_order()] == ["192.0.2.3", "192.0.2.1"]
    assert not upstreams.set([("192.0.2.1", 53), ("192.0.2.2", 53), ("192.0.2.3", 53)])
    assert upstreams.set([("192.0.2.1", 53)])
    assert upstreams.all[0].resting
