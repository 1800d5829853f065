"""The real worker in a namespace, asked by real clients: what this node answers by itself.

namespace: lo with 169.254.96.16 and fd00:a9fe:6010::16, the worker on port 53, dig and dnspython beside it
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest
from dns_namespace import SERVER, SERVER_V6, WEB, Control, Namespace, namespace, serving, until

from isthmus.dns.worker import DnsConfig
from isthmus.plan.serving import Distance, Member, ServiceKind, ServicePlan
from isthmus.wire import worker

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and port 53")

NAME = "web.shop.svc.cluster.local"


@pytest.fixture
def space() -> Iterator[Namespace]:
    with namespace() as made:
        made.add_server_addresses()
        yield made


def many(count: int) -> list[ServicePlan]:
    return [
        ServicePlan(f"ns{at % 100}", f"s{at}", ServiceKind.CLUSTER_IP, cluster_ips=(f"10.97.{at // 250}.{at % 250}",))
        for at in range(count)
    ]


def test_dig_gets_the_address_over_udp_tcp_and_ipv6(space: Namespace) -> None:
    with serving(space, WEB):
        for options in (["+notcp"], ["+tcp"], ["+noedns"], ["+nocookie"], ["+bufsize=512"]):
            assert space.run("dig", f"@{SERVER}", NAME, "+short", *options).split() == ["10.96.0.7"], options
        assert space.run("dig", f"@{SERVER_V6}", NAME, "+short").split() == ["10.96.0.7"]
        assert space.run("dig", f"@{SERVER}", "-x", "10.96.0.7", "+short").split() == [f"{NAME}."]
        assert "status: NXDOMAIN" in space.run("dig", f"@{SERVER}", f"{NAME}.default.svc.cluster.local")


def test_the_addresses_need_not_be_there_when_the_worker_starts() -> None:
    with namespace() as space, serving(space, WEB):
        space.add_server_addresses()
        assert space.ask(NAME).answer


def test_an_address_that_is_taken_is_reported_and_taken_over_once_it_is_free(space: Namespace) -> None:
    held = space.socket()
    held.bind((SERVER, 53))
    control = Control(space, DnsConfig(resolv_conf="/nonexistent"))
    try:
        control.put(WEB)
        control.send(worker.Synced())
        assert SERVER in until(lambda: control.trouble("dns.bind"))
        held.close()
        control.wait_ready()
        assert control.trouble("dns.bind") == ""
        assert space.ask(NAME).answer
    finally:
        control.close()


def test_questions_asked_before_the_state_is_there_wait_for_it(space: Namespace) -> None:
    control = Control(space, DnsConfig(resolv_conf="/nonexistent"))
    try:
        client = space.socket()
        query = dns.message.make_query(NAME, "A")
        until(lambda: "upstreams" if control.trouble("dns.no-upstreams") else "")  # bound by now
        client.sendto(query.to_wire(), (SERVER, 53))
        control.put(WEB)
        control.send(worker.Synced())
        client.settimeout(5)
        assert dns.message.from_wire(client.recv(512)).answer[0][0].address == "10.96.0.7"  # type: ignore[attr-defined]
        client.close()
    finally:
        control.close()


def test_a_change_is_answered_at_once_also_where_the_old_answer_was_kept(space: Namespace) -> None:
    with serving(space, WEB) as control:
        assert space.ask(NAME).answer and space.ask(NAME).answer
        assert space.ask("new.shop.svc.cluster.local").rcode() == dns.rcode.NXDOMAIN
        control.put(
            ServicePlan("shop", "web", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.99",)),
            ServicePlan("shop", "new", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.50",)),
        )
        control.tell("services")
        assert space.ask(NAME).answer[0][0].address == "10.96.0.99"  # type: ignore[attr-defined]
        assert space.ask("new.shop.svc.cluster.local").answer
        control.send(worker.DropService("shop", "web"))
        control.tell("services")
        assert space.ask(NAME).rcode() == dns.rcode.NXDOMAIN


def test_a_large_headless_service_is_cut_over_udp_and_whole_after_the_retry_over_tcp(space: Namespace) -> None:
    addresses = [f"10.9.{at // 250}.{at % 250}" for at in range(300)]
    members = tuple(Member("n", one, Distance.ANYWHERE, {}, visible_address=one) for one in addresses)
    with serving(space, ServicePlan("shop", "many", ServiceKind.HEADLESS, members=members)):
        name = "many.shop.svc.cluster.local"
        assert space.ask(name).flags & dns.flags.TC
        assert sorted(space.run("dig", f"@{SERVER}", name, "+short").split()) == sorted(addresses)


def test_hundreds_of_questions_on_one_tcp_connection_are_all_answered(space: Namespace) -> None:
    with serving(space, WEB), space.socket(socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect((SERVER, 53))
        queries = {query.id: query for query in (dns.message.make_query(NAME, "A") for _ in range(500))}
        client.sendall(b"".join(query.to_wire(prepend_length=True) for query in queries.values()))
        client.shutdown(socket.SHUT_WR)
        stream = b""
        while chunk := client.recv(65536):
            stream += chunk
        seen = set()
        while stream:
            size = int.from_bytes(stream[:2], "big")
            seen.add(dns.message.from_wire(stream[2 : 2 + size]).id)
            stream = stream[2 + size :]
        assert seen == set(queries)


def test_clients_that_connect_and_say_nothing_never_keep_others_out(space: Namespace) -> None:
    with serving(space, WEB) as control:
        silent = [space.socket(socket.SOCK_STREAM) for _ in range(300)]
        for client in silent:
            client.connect((SERVER, 53))
        assert space.ask_tcp(NAME).answer
        assert control.tell("counters")["tcp_evicted"] >= 40
        for client in silent:
            client.close()


def test_garbage_on_both_protocols_leaves_the_worker_answering(space: Namespace) -> None:
    with serving(space, WEB) as control, space.socket() as datagrams:
        for seed in range(300):
            datagrams.sendto(bytes((seed * 7 + at * 13) % 256 for at in range(seed * 5)), (SERVER, 53))
        datagrams.sendto(b"\1\2\1\0\0\1" + b"\0" * 4000, (SERVER, 53))
        with space.socket(socket.SOCK_STREAM) as stream:
            stream.connect((SERVER, 53))
            stream.sendall(b"\xff\xff" + os.urandom(3000))
        assert space.ask(NAME).answer
        assert "crashed" not in control.tell("counters")


def test_out_of_descriptors_udp_goes_on_tcp_is_refused_and_both_recover(space: Namespace) -> None:
    prefix = ("prlimit", "--nofile=40:40")
    with serving(space, WEB, prefix=prefix, upstreams=("127.0.0.9",)) as control:
        clients = [space.socket(socket.SOCK_STREAM) for _ in range(60)]
        for client in clients:
            client.connect((SERVER, 53))
        until(lambda: control.tell("counters").get("tcp_exhausted"))
        assert space.ask(NAME).answer
        assert space.ask("www.example.com").rcode() == dns.rcode.SERVFAIL
        for client in clients:
            client.close()
        assert space.ask_tcp(NAME).answer


def test_an_answer_goes_to_each_of_many_clients_under_its_own_id(space: Namespace) -> None:
    with serving(space, *many(200)):
        clients = [space.socket() for _ in range(50)]
        asked = []
        for turn, client in enumerate(clients * 4):
            name = f"s{turn % 200}.ns{turn % 100}.svc.cluster.local"
            query = dns.message.make_query(name, "A")
            asked.append((client, query, f"10.97.0.{turn}"))
            client.sendto(query.to_wire(), (SERVER, 53))
        for client, query, address in asked:
            client.settimeout(5)
            reply = dns.message.from_wire(client.recv(512))
            assert query.is_response(reply) and reply.answer[0][0].address == address  # type: ignore[attr-defined]
        for client in clients:
            client.close()


def test_with_ten_thousand_services_a_change_shows_as_fast_as_with_a_hundred(space: Namespace) -> None:
    taken_s: dict[int, float] = {}
    for count in (100, 10_000):
        with serving(space, *many(count)) as control:
            control.tell("services")
            assert control.tell("services") == {"services": count}
            assert space.ask(f"s{count - 1}.ns99.svc.cluster.local").answer
            samples = []
            with space.socket() as client:
                client.connect((SERVER, 53))
                client.settimeout(5)
                query = dns.message.make_query("s7.ns7.svc.cluster.local", "A").to_wire()
                for turn in range(30):
                    address = f"10.98.0.{turn}"
                    began_s = time.monotonic()
                    control.put(ServicePlan("ns7", "s7", ServiceKind.CLUSTER_IP, cluster_ips=(address,)))
                    while True:
                        client.send(query)
                        if client.recv(512).endswith(socket.inet_aton(address)):
                            break
                    samples.append(time.monotonic() - began_s)
            taken_s[count] = statistics.median(samples)
    print(f"change shown after: {', '.join(f'{n} services {t * 1000:.2f} ms' for n, t in taken_s.items())}")
    assert taken_s[10_000] < max(0.02, 4 * taken_s[100])


def test_the_worker_ends_cleanly_on_sigterm(space: Namespace) -> None:
    with serving(space, WEB) as control:
        control.process.send_signal(signal.SIGTERM)
        assert control.process.wait(5) == 0


def test_the_worker_ends_with_its_parent_even_if_that_is_killed(space: Namespace) -> None:
    script = (
        "import socket, subprocess, sys, time\n"
        "from isthmus.dns.worker import DnsConfig, command\n"
        "ours, theirs = socket.socketpair()\n"
        "child = subprocess.Popen(command(theirs.fileno(), DnsConfig()), pass_fds=[theirs.fileno()])\n"
        "ours.recv(1)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = space.start(sys.executable, "-c", script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def gone() -> bool:
        try:
            with open(f"/proc/{child}/stat") as file:
                return file.read().split(") ")[1].startswith("Z")
        except FileNotFoundError:
            return True

    until(gone)


def test_the_worker_explains_a_name(space: Namespace) -> None:
    with serving(space, WEB) as control:
        verdict = control.tell("lookup", name=NAME, type="A")
        assert verdict["rule"] == "cluster-ip"
        assert verdict["because"]["object"] == "Service shop/web"
        assert control.tell("nonsense") == {"error": "unknown question 'nonsense'"}
