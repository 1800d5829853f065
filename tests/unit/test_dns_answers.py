"""Bytes in, bytes out: dnspython is the witness for what is asked and answered; hypothesis sends everything else."""

from collections import Counter

import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.dns.answers import Answers, Forward
from isthmus.plan.names import Names
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

WEB = ServicePlan(
    "shop", "web", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.7",), ports=(PortPlan(80, "http"), PortPlan(81, "x"))
)


def headless(count: int) -> ServicePlan:
    members = tuple(
        Member("n", f"10.9.{i // 250}.{i % 250}", Distance.ANYWHERE, {}, visible_address=f"10.9.{i // 250}.{i % 250}")
        for i in range(count)
    )
    return ServicePlan("shop", "many", ServiceKind.HEADLESS, members=members)


def made(*plans: ServicePlan) -> Answers:
    names = Names("cluster.local", own_addresses=("169.254.96.16",))
    for plan in plans:
        names.put(plan)
    return Answers(names, Counter())


def ask(answers: Answers, name: str, rtype: str = "A", *, udp: bool = True, **options: object) -> dns.message.Message:
    query = dns.message.make_query(name, rtype, **options)  # type: ignore[arg-type]
    reply = answers.answer(query.to_wire(), udp=udp)
    assert isinstance(reply, bytes)
    parsed = dns.message.from_wire(reply)
    assert query.is_response(parsed)
    return parsed


def test_an_answer_is_authoritative_recursion_is_offered_and_the_ttl_is_the_setting() -> None:
    reply = ask(made(WEB), "web.shop.svc.cluster.local")
    assert reply.flags & dns.flags.AA and reply.flags & dns.flags.RA and reply.flags & dns.flags.RD
    assert [str(rrset) for rrset in reply.answer] == ["web.shop.svc.cluster.local. 30 IN A 10.96.0.7"]


def test_nodata_and_nxdomain_carry_the_soa_with_the_negative_ttl() -> None:
    answers = made(WEB)
    for name, rcode in (
        ("shop.svc.cluster.local", dns.rcode.NOERROR),
        ("x.shop.svc.cluster.local", dns.rcode.NXDOMAIN),
    ):
        reply = ask(answers, name)
        assert reply.rcode() == rcode and not reply.answer
        assert reply.authority[0].rdtype == dns.rdatatype.SOA
        assert reply.authority[0].ttl == reply.authority[0][0].minimum == 5


def test_srv_brings_the_address_of_its_target_along() -> None:
    reply = ask(made(WEB), "_http._tcp.web.shop.svc.cluster.local", "SRV")
    assert reply.answer[0][0].port == 80
    assert str(reply.additional[0]) == "web.shop.svc.cluster.local. 30 IN A 10.96.0.7"


def test_the_letter_case_of_the_question_comes_back() -> None:
    reply = ask(made(WEB), "wEB.ShoP.svc.CLUSTER.local")
    assert reply.question[0].name.to_text() == "wEB.ShoP.svc.CLUSTER.local."
    assert reply.answer


def test_edns_is_answered_with_our_size_and_do_is_ignored() -> None:
    reply = ask(made(WEB), "web.shop.svc.cluster.local", use_edns=0, payload=4096, want_dnssec=True)
    assert (reply.edns, reply.payload, reply.ednsflags) == (0, 1232, 0)
    assert ask(made(WEB), "web.shop.svc.cluster.local", use_edns=False).edns == -1


def test_an_unknown_edns_version_gets_badvers() -> None:
    query = dns.message.make_query("web.shop.svc.cluster.local", "A", use_edns=1)
    reply = dns.message.from_wire(made(WEB).answer(query.to_wire(), udp=True))  # type: ignore[arg-type]
    assert (reply.rcode(), reply.edns) == (dns.rcode.BADVERS, 0)


def test_too_many_records_are_cut_for_udp_and_whole_for_tcp() -> None:
    answers = made(headless(400))
    small = ask(answers, "many.shop.svc.cluster.local", use_edns=False)
    assert small.flags & dns.flags.TC and len(small.to_wire()) <= 512 and len(small.answer[0]) > 20
    large = ask(answers, "many.shop.svc.cluster.local", use_edns=0, payload=1232)
    assert large.flags & dns.flags.TC and len(large.answer[0]) > 60
    whole = ask(answers, "many.shop.svc.cluster.local", udp=False)
    assert not whole.flags & dns.flags.TC and len(whole.answer[0]) == 400


def test_members_of_a_headless_service_take_turns_in_the_first_place() -> None:
    answers = made(headless(3))
    query = dns.message.make_query("many.shop.svc.cluster.local", "A").to_wire()
    seen = [answers.answer(query, udp=True), *(query[:2] + answers.table[query[2:]].next() for _ in range(5))]  # type: ignore[union-attr]
    first = [dns.message.from_wire(reply).answer[0][0].address for reply in seen]  # type: ignore[arg-type]
    assert all(len(dns.message.from_wire(reply).answer[0]) == 3 for reply in seen)  # type: ignore[arg-type]
    assert first[:3] == first[3:] and len(set(first[:3])) == 3


def test_a_reply_in_the_table_is_the_one_that_would_be_made_again() -> None:
    answers = made(WEB)
    query = dns.message.make_query("web.shop.svc.cluster.local", "A").to_wire()
    reply = answers.answer(query, udp=True)
    assert answers.table == {query[2:]: reply[2:]}  # type: ignore[index]


def test_a_change_empties_the_table_of_what_it_touches_and_of_nothing_else() -> None:
    other = ServicePlan("shop", "api", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.8",))
    answers = made(WEB, other)
    for name in ("web", "api", "new"):
        ask(answers, f"{name}.shop.svc.cluster.local", use_edns=False)
    assert len(answers.table) == 3
    for plan in (
        ServicePlan("shop", "new", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.9",)),
        ServicePlan("shop", "web", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.10",)),
    ):
        answers.forget(answers.names.put(plan))
    assert len(answers.table) == 1
    assert ask(answers, "new.shop.svc.cluster.local").answer[0][0].address == "10.96.0.9"
    assert ask(answers, "web.shop.svc.cluster.local").answer[0][0].address == "10.96.0.10"


def test_an_address_that_a_service_takes_is_no_longer_the_upstreams() -> None:
    answers = made()
    data = dns.message.make_query("7.0.96.10.in-addr.arpa", "PTR", use_edns=False).to_wire()
    forward = answers.answer(data, udp=True)
    assert isinstance(forward, Forward)
    answers.remember(forward.query, b"what an upstream said", forward.scopes)
    assert answers.known(data) == data[:2] + b"what an upstream said"
    answers.forget(answers.names.put(WEB))
    assert answers.known(data) is None
    assert isinstance(answers.answer(data, udp=True), bytes)


@pytest.mark.parametrize(
    ("name", "rtype", "rdclass", "rcode"),
    [
        ("web.shop.svc.cluster.local", "AXFR", "IN", dns.rcode.REFUSED),
        ("web.shop.svc.cluster.local", "IXFR", "IN", dns.rcode.REFUSED),
        ("version.bind", "TXT", "CH", dns.rcode.REFUSED),
        ("web.shop.svc.cluster.local", "A", "ANY", dns.rcode.REFUSED),
        ("web.shop.svc.cluster.local", "MAILB", "IN", dns.rcode.NOTIMP),
        ("web.shop.svc.cluster.local", "TSIG", "IN", dns.rcode.NOTIMP),
    ],
)
def test_what_is_refused_says_so(name: str, rtype: str, rdclass: str, rcode: int) -> None:
    query = dns.message.make_query(name, rtype, rdclass)
    query.authority = []
    reply = made(WEB).answer(query.to_wire(), udp=True)
    assert isinstance(reply, bytes) and dns.message.from_wire(reply).rcode() == rcode


def test_any_is_answered_with_one_small_record() -> None:
    answers = made(headless(50))
    reply = ask(answers, "many.shop.svc.cluster.local", "ANY")
    assert [rrset.rdtype for rrset in reply.answer] == [dns.rdatatype.HINFO]
    assert ask(answers, "none.shop.svc.cluster.local", "ANY").rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"", None),  # nothing
        (b"\0" * 11, None),  # shorter than a header
        (b"\1\2\x81\0\0\1\0\0\0\0\0\0", None),  # a reply: answering it could go on for ever
        (b"\1\2\1\0\0\0\0\0\0\0\0\0", 1),  # no question
        (b"\1\2\1\0\0\2\0\0\0\0\0\0\0\0\1\0\1\0\0\1\0\1", 1),  # two questions
        (b"\1\2\1\0\0\1\0\0\0\0\0\0\x3fabc", 1),  # a label that is cut off
        (b"\1\2\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1", 1),  # a pointer to itself
        (b"\1\2\1\0\0\1\0\0\0\0\0\0" + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1", 1),  # 257 bytes of name
        (b"\1\2\1\0\0\1\0\0\0\0\0\0\0\0\1\0\1trailing", 1),
        (b"\1\2\x28\0\0\1\0\0\0\0\0\0\0\0\1\0\1", 4),  # UPDATE
        (b"\1\2\x10\0\0\1\0\0\0\0\0\0\0\0\1\0\1", 4),  # STATUS
    ],
)
def test_broken_messages_get_a_header_alone_or_silence(data: bytes, reply: int | None) -> None:
    answer = made(WEB).answer(data, udp=True)
    if reply is None:
        assert answer is None
    else:
        assert isinstance(answer, bytes) and len(answer) == 12
        assert answer[:2] == data[:2] and answer[2] & 0x80 and answer[3] & 0xF == reply


def test_before_the_state_is_known_cluster_names_fail_and_do_not_vanish() -> None:
    answers = made()
    answers.ready = False
    assert ask(answers, "web.shop.svc.cluster.local").rcode() == dns.rcode.SERVFAIL
    assert not answers.table


def test_a_target_that_no_message_can_hold_fails_alone() -> None:
    bad = ServicePlan("shop", "bad", ServiceKind.EXTERNAL_NAME, external_name="x" * 70 + ".cluster.local")
    assert ask(made(bad), "bad.shop.svc.cluster.local", "CNAME").rcode() == dns.rcode.SERVFAIL


ANSWERS = made(WEB, headless(30))
VALID = dns.message.make_query("web.shop.svc.cluster.local", "A", use_edns=0, payload=1232).to_wire()


def check(data: bytes) -> None:
    answer = ANSWERS.answer(data, udp=True)
    if isinstance(answer, bytes):
        assert answer[:2] == data[:2] and answer[2] & 0x80
        assert len(answer) <= max(512, 1232)
        dns.message.from_wire(answer)


@given(st.binary(max_size=600))
def test_any_bytes_at_all_get_a_message_or_silence(data: bytes) -> None:
    check(data)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6), st.integers(0, 20))
def test_a_query_with_bytes_changed_or_cut_gets_a_message_or_silence(edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(VALID)
    for at, value in edits:
        data[at] = value
    check(bytes(data[: len(data) - cut]))


NAME = st.sampled_from(
    ["web.shop.svc", "many.shop.svc", "no.shop.svc", "shop.svc", "_http._tcp.web.shop.svc", "1-1-1-1.a.pod"]
)


@given(NAME, st.integers(1, 65_535), st.booleans(), st.integers(512, 65_535), st.booleans())
def test_every_question_of_the_domain_is_answered_alike_from_the_table_and_anew(
    name: str, rtype: int, edns: bool, payload: int, udp: bool
) -> None:
    query = dns.message.make_query(f"{name}.cluster.local", rtype, use_edns=0 if edns else False, payload=payload)
    data = query.to_wire()
    answer = ANSWERS.answer(data, udp=udp)
    assert not isinstance(answer, Forward) and answer is not None
    dns.message.from_wire(answer)
    found = ANSWERS.table.get(data[2:])
    if isinstance(found, bytes):
        assert found == answer[2:]
