"""The real worker and upstreams that work, die, lie, loop and are slow: names that are not the cluster's.

namespace: lo with 169.254.96.16, the worker on port 53; upstreams on 127.0.0.2, 127.0.0.3, ...: dnsmasq, scripted ones
"""

import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rrset
import pytest
from dns_namespace import SERVER, WEB, Namespace, dnsmasq, namespace, scripted, serving, until

from isthmus.plan.serving import ServiceKind, ServicePlan

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and port 53")

CLUSTER_NAME = "web.shop.svc.cluster.local"


@pytest.fixture
def space() -> Iterator[Namespace]:
    with namespace() as made:
        made.add_server_addresses()
        yield made


def address_of(reply: dns.message.Message) -> str:
    return str(reply.answer[-1][0])


def answering(address: str = "192.0.2.1", ttl_s: int = 60, delay_s: float = 0.0):
    """A script that gives every question one address."""

    def script(query: dns.message.Message, _tcp: bool) -> dns.message.Message:
        time.sleep(delay_s)
        reply = dns.message.make_response(query)
        name = query.question[0].name
        if query.question[0].rdtype == 1:
            reply.answer = [dns.rrset.from_text(name, ttl_s, "IN", "A", address)]
        return reply

    return script


def test_without_upstreams_the_answer_is_servfail_at_once(space: Namespace) -> None:
    with serving(space, WEB) as control:
        began_s = time.monotonic()
        assert space.ask("example.com").rcode() == dns.rcode.SERVFAIL
        assert space.ask_tcp("example.com").rcode() == dns.rcode.SERVFAIL
        assert time.monotonic() - began_s < 1
        assert "SERVFAIL" in control.trouble("dns.no-upstreams")


def test_other_names_come_from_the_upstream_and_the_second_time_from_the_cache(space: Namespace) -> None:
    options = ("--address=/example.com/192.0.2.7", "--max-ttl=60", "--local-ttl=60")
    with dnsmasq(space, "127.0.0.2", *options) as upstream, serving(space, WEB, upstreams=("127.0.0.2",)) as control:
        assert address_of(space.ask("Www.Example.com")) == "192.0.2.7"
        upstream.kill()
        upstream.wait()
        again = space.ask("www.example.com", use_edns=0)
        assert address_of(again) == "192.0.2.7" and again.edns == 0
        assert address_of(space.ask_tcp("www.example.com")) == "192.0.2.7"
        assert control.tell("counters")["cache_hits"] >= 2


def test_names_of_the_cluster_never_reach_an_upstream(space: Namespace) -> None:
    with scripted(space, "127.0.0.2", answering()) as asked, serving(space, WEB, upstreams=("127.0.0.2",)):
        for name in (
            CLUSTER_NAME,
            "nothing.shop.svc.cluster.local",
            f"{CLUSTER_NAME}.default.svc.cluster.local",
            f"{CLUSTER_NAME}.svc.cluster.local",
            "cluster.local",
            "1.0.96.10.in-addr.arpa",
        ):
            space.ask(name)
        assert address_of(space.ask("www.example.com")) == "192.0.2.1"
        assert asked == ["www.example.com."]


def test_a_dead_first_upstream_costs_a_part_of_the_limit_and_then_nothing(space: Namespace) -> None:
    silent = space.socket()
    silent.bind(("127.0.0.3", 53))
    servers = ("127.0.0.3", "127.0.0.2")
    with (
        scripted(space, "127.0.0.2", answering()),
        serving(space, WEB, upstreams=servers, timeout_s=1.0) as control,
    ):
        for turn in range(3):
            assert address_of(space.ask(f"a{turn}.example.com", timeout_s=1.0)) == "192.0.2.1"
        assert {one["server"]: one["state"] for one in control.tell("upstreams")}["127.0.0.3:53"] == "resting"
        began_s = time.monotonic()
        assert address_of(space.ask("fast.example.com")) == "192.0.2.1"
        assert time.monotonic() - began_s < 0.2
    silent.close()


def test_all_upstreams_dead_is_servfail_within_the_limit_and_local_answers_are_not_delayed(space: Namespace) -> None:
    silent = space.socket()
    silent.bind(("127.0.0.3", 53))
    with serving(space, WEB, upstreams=("127.0.0.3",), timeout_s=1.0) as control, space.socket() as flood:
        space.ask(CLUSTER_NAME)
        taken_s = []
        flood.setsockopt(socket.SOL_SOCKET, 33, 4 * 1024 * 1024)  # SO_RCVBUFFORCE: all replies come at the same moment
        flood.connect((SERVER, 53))
        began_s = time.monotonic()
        for turn in range(400):
            flood.send(dns.message.make_query(f"n{turn}.example.com", "A").to_wire())
        client = space.socket()
        client.connect((SERVER, 53))
        client.settimeout(2)
        query = dns.message.make_query(CLUSTER_NAME, "A").to_wire()
        while time.monotonic() - began_s < 0.8:
            asked_s = time.monotonic()
            client.send(query)
            client.recv(512)
            taken_s.append(time.monotonic() - asked_s)
            time.sleep(0.002)
        flood.settimeout(3)
        rcodes = [dns.message.from_wire(flood.recv(512)).rcode() for _ in range(400)]
        within_s = time.monotonic() - began_s
        assert set(rcodes) == {dns.rcode.SERVFAIL}
        assert within_s < 2.5
        assert until(lambda: control.trouble("dns.upstreams-dead"))
        client.close()
    median_ms = statistics.median(taken_s) * 1000
    print(
        f"local answers beside 400 unanswered questions: median {median_ms:.2f} ms, most {max(taken_s) * 1000:.1f} ms"
    )
    assert median_ms < 5
    silent.close()


def test_an_upstream_that_comes_back_is_used_again(space: Namespace) -> None:
    with serving(space, WEB, upstreams=("127.0.0.2",), timeout_s=0.5) as control:
        for turn in range(3):
            assert space.ask(f"a{turn}.example.com").rcode() == dns.rcode.SERVFAIL
        assert until(lambda: control.trouble("dns.upstreams-dead"))
        with scripted(space, "127.0.0.2", answering()):
            until(lambda: control.trouble("dns.upstreams-dead") == "")
            assert address_of(space.ask("b.example.com")) == "192.0.2.1"


def test_an_expired_answer_is_given_when_no_upstream_answers(space: Namespace) -> None:
    with serving(space, WEB, upstreams=("127.0.0.2",), timeout_s=0.5) as control:
        with scripted(space, "127.0.0.2", answering(ttl_s=1)):
            assert space.ask("www.example.com").answer[0].ttl == 1
        until(lambda: space.ask("www.example.com").answer[0].ttl == 30, limit_s=10)
        assert control.tell("counters")["stale"] >= 1


def test_a_resolver_that_forwards_back_to_us_is_found_and_disabled(space: Namespace) -> None:
    with (
        dnsmasq(space, "127.0.0.2", f"--server={SERVER}"),
        scripted(space, "127.0.0.4", answering()),
        serving(space, WEB, upstreams=("127.0.0.2", "127.0.0.4")) as control,
    ):
        assert "127.0.0.2" in until(lambda: control.trouble("dns.upstream-loop"))
        assert address_of(space.ask("www.example.com")) == "192.0.2.1"
        assert {one["server"]: one["state"] for one in control.tell("upstreams")} == {
            "127.0.0.2:53": "looping",
            "127.0.0.4:53": "fine",
        }


def test_with_nothing_but_a_loop_the_answer_is_servfail_and_the_questions_end(space: Namespace) -> None:
    with dnsmasq(space, "127.0.0.2", f"--server={SERVER}"), serving(space, WEB, upstreams=("127.0.0.2",)) as control:
        until(lambda: control.trouble("dns.upstream-loop"))
        assert space.ask("www.example.com").rcode() == dns.rcode.SERVFAIL
        before = control.tell("counters")["queries_udp"]
        space.ask(CLUSTER_NAME)
        assert control.tell("counters")["queries_udp"] - before < 10


def test_our_own_address_is_no_upstream(space: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(f"search shop.svc.cluster.local\nnameserver {SERVER}\nnameserver 127.0.0.2\nnameserver nonsense\n")
    with scripted(space, "127.0.0.2", answering()), serving(space, WEB, resolv_conf=str(file)) as control:
        assert [one["server"] for one in control.tell("upstreams")] == ["127.0.0.2:53"]
        assert address_of(space.ask("www.example.com")) == "192.0.2.1"


def test_a_changed_resolv_conf_is_followed(space: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    with scripted(space, "127.0.0.2", answering()), serving(space, WEB, resolv_conf=str(file)) as control:
        assert space.ask("www.example.com").rcode() == dns.rcode.SERVFAIL
        file.write_text("nameserver 127.0.0.2\n")
        until(lambda: [one["server"] for one in control.tell("upstreams")] == ["127.0.0.2:53"])
        assert address_of(space.ask("www.example.com")) == "192.0.2.1"
        assert control.trouble("dns.no-upstreams") == ""


def test_one_question_is_asked_once_however_many_wait_for_it(space: Namespace) -> None:
    with (
        scripted(space, "127.0.0.2", answering(delay_s=0.3)) as asked,
        serving(space, WEB, upstreams=("127.0.0.2",), attempts=1),
    ):
        with space.socket() as client:
            client.connect((SERVER, 53))
            client.settimeout(5)
            for ident in range(50):
                client.send(dns.message.make_query("www.example.com", "A", id=ident).to_wire())
            assert {dns.message.from_wire(client.recv(512)).id for _ in range(50)} == set(range(50))
        assert asked == ["www.example.com."]


def test_a_cut_answer_is_fetched_over_tcp(space: Namespace) -> None:
    def script(query: dns.message.Message, tcp: bool) -> dns.message.Message:
        reply = dns.message.make_response(query)
        if tcp:
            texts = [f"{'x' * 200}{at}" for at in range(20)]
            reply.answer = [dns.rrset.from_text(query.question[0].name, 60, "IN", "TXT", *texts)]
        else:
            reply.flags |= dns.flags.TC
        return reply

    with scripted(space, "127.0.0.2", script), serving(space, WEB, upstreams=("127.0.0.2",)):
        assert space.ask("big.example.com", "TXT").flags & dns.flags.TC
        assert len(space.ask_tcp("big.example.com", "TXT").answer[0]) == 20


def test_a_reply_to_another_question_or_id_is_not_believed(space: Namespace) -> None:
    def script(query: dns.message.Message, _tcp: bool) -> bytes:
        if query.question[0].name.to_text().startswith("id."):
            reply = answering("192.0.2.66")(query, False)
            reply.id = query.id ^ 1
        else:
            other = dns.message.make_query("other.example.com", "A", id=query.id)
            reply = answering("192.0.2.66")(other, False)
        return reply.to_wire()

    with (
        scripted(space, "127.0.0.2", script),
        scripted(space, "127.0.0.4", answering()),
        serving(space, WEB, upstreams=("127.0.0.2", "127.0.0.4"), timeout_s=1.0),
    ):
        assert address_of(space.ask("id.example.com")) == "192.0.2.1"
        assert address_of(space.ask("name.example.com")) == "192.0.2.1"


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOTIMP])
def test_the_next_upstream_is_asked_at_once_when_one_refuses(space: Namespace, rcode: dns.rcode.Rcode) -> None:
    def script(query: dns.message.Message, _tcp: bool) -> dns.message.Message:
        reply = dns.message.make_response(query)
        reply.set_rcode(rcode)
        return reply

    with (
        scripted(space, "127.0.0.2", script),
        scripted(space, "127.0.0.4", answering()),
        serving(space, WEB, upstreams=("127.0.0.2", "127.0.0.4"), timeout_s=4.0),
    ):
        began_s = time.monotonic()
        assert address_of(space.ask("www.example.com")) == "192.0.2.1"
        assert time.monotonic() - began_s < 0.9


def test_a_server_older_than_edns_is_asked_again_without_it(space: Namespace) -> None:
    def script(query: dns.message.Message, tcp: bool) -> dns.message.Message | bytes:
        if query.edns >= 0:
            return query.id.to_bytes(2, "big") + b"\x81\x81" + b"\0" * 8
        return answering()(query, tcp)

    with scripted(space, "127.0.0.2", script), serving(space, WEB, upstreams=("127.0.0.2",)):
        reply = space.ask("www.example.com", use_edns=0)
        assert address_of(reply) == "192.0.2.1" and reply.edns == 0


def test_an_upstream_that_sends_garbage_is_passed_over_and_breaks_nothing(space: Namespace) -> None:
    def script(query: dns.message.Message, _tcp: bool) -> bytes:
        wire = query.to_wire()
        return wire[:2] + b"\x81\x80\0\1\0\x09\0\0\0\0" + wire[12:] + os.urandom(40)

    with (
        scripted(space, "127.0.0.2", script),
        scripted(space, "127.0.0.4", answering()),
        serving(space, WEB, upstreams=("127.0.0.2", "127.0.0.4"), timeout_s=0.8) as control,
    ):
        for turn in range(5):
            assert address_of(space.ask(f"g{turn}.example.com")) == "192.0.2.1"
        assert "crashed" not in control.tell("counters")


def test_an_external_name_is_followed_through_the_upstream(space: Namespace) -> None:
    mail = ServicePlan("shop", "mail", ServiceKind.EXTERNAL_NAME, external_name="mx.example.com")
    with scripted(space, "127.0.0.2", answering()) as asked, serving(space, mail, upstreams=("127.0.0.2",)):
        for _ in range(2):
            reply = space.ask("mail.shop.svc.cluster.local", use_edns=0)
            assert [str(rrset) for rrset in reply.answer] == [
                "mail.shop.svc.cluster.local. 30 IN CNAME mx.example.com.",
                "mx.example.com. 60 IN A 192.0.2.1",
            ]
        assert asked == ["mx.example.com."]


def test_nxdomain_is_kept_as_long_as_its_soa_allows(space: Namespace) -> None:
    def script(query: dns.message.Message, _tcp: bool) -> dns.message.Message:
        reply = dns.message.make_response(query)
        reply.set_rcode(dns.rcode.NXDOMAIN)
        soa = "ns.example.com. host.example.com. 1 60 60 60 2"
        reply.authority = [dns.rrset.from_text("example.com.", 900, "IN", "SOA", soa)]
        return reply

    with scripted(space, "127.0.0.2", script) as asked, serving(space, WEB, upstreams=("127.0.0.2",)):
        assert space.ask("no.example.com").rcode() == dns.rcode.NXDOMAIN
        assert space.ask("no.example.com").rcode() == dns.rcode.NXDOMAIN
        assert asked == ["no.example.com."]
        until(lambda: space.ask("no.example.com") and len(asked) == 2)


def test_twenty_clients_over_tcp_wait_for_a_slow_upstream_without_holding_up_each_other(space: Namespace) -> None:
    with (
        scripted(space, "127.0.0.2", answering(delay_s=0.05)),
        serving(space, WEB, upstreams=("127.0.0.2",), timeout_s=4.0, attempts=1),
    ):
        replies: list[dns.message.Message] = []

        def client(number: int) -> None:
            space.enter()
            with socket.create_connection((SERVER, 53), timeout=5) as stream:
                for name in (f"c{number}.example.com", CLUSTER_NAME):
                    dns.query.send_tcp(stream, dns.message.make_query(name, "A"))
                replies.extend(dns.query.receive_tcp(stream)[0] for _ in range(2))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted({address_of(reply) for reply in replies}) == ["10.96.0.7", "192.0.2.1"]
        assert len(replies) == 40
