"""The proxy on a node with pods: real interception, real sockets, faults as they happen.

client 10.77.0.2 ── node (169.254.96.16, DNAT of 10.96.0.0/12) ── servers 10.77.0.11, 10.77.0.12
"""

import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.bed import NODE, NOWHERE, SERVERS, SERVERS_V6, SERVICE_V4, SERVICE_V6, Bed, ProxyProcess

from isthmus.model.cluster import Protocol
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

DEADLINE_S = 6.0


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    it = Bed("proxy")
    servers = [Echo(it, at, address) for at, address in enumerate((*SERVERS, *SERVERS_V6))]
    yield it
    for server in servers:
        server.sock.close()
    it.close()


@pytest.fixture
def proxy(bed: Bed) -> Iterator[ProxyProcess]:
    it = ProxyProcess(bed)
    yield it
    it.process.kill()
    it.process.wait()


class Echo:
    """Answers each connection's first bytes with its own address, then holds it open until the client goes."""

    def __init__(self, bed: Bed, at: int, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.address = address
        self.sock = bed.socket_in(bed.servers[at % 2], family)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind((address, 8080))
        self.sock.listen(4096)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        kept: list[socket.socket] = []
        while True:
            try:
                conn, peer = self.sock.accept()
            except OSError:
                return
            kept.append(conn)
            threading.Thread(target=self._answer, args=(conn, peer), daemon=True).start()

    def _answer(self, conn: socket.socket, peer: Any) -> None:
        try:
            if conn.recv(100):
                conn.sendall(f"{self.address} {peer[0]}".encode())
                while conn.recv(100):
                    pass
            conn.close()
        except OSError:
            pass


def plan_of(*addresses: str, port: int = 8080, **fields: Any) -> ServicePlan:
    members = tuple(Member("n1", address, Distance.SAME_NODE, {"http": port}) for address in addresses)
    return ServicePlan(
        "shop", "web", ServiceKind.CLUSTER_IP, (SERVICE_V4, SERVICE_V6), ports=(PortPlan(80, "http"),),
        members=members, **fields,
    )  # fmt: skip


def call(bed: Bed, address: str = SERVICE_V4, port: int = 80, timeout_s: float = 3.0) -> str:
    """Connect, ask, and return the server's address and the client address it saw."""
    with bed.socket_in(bed.client, socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.settimeout(timeout_s)
        sock.connect((address, port))
        sock.sendall(b"hello")
        return sock.recv(100).decode()


def eventually(claim: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    until_s = time.monotonic() + deadline_s
    while not claim():
        assert time.monotonic() < until_s, "not true within the deadline"
        time.sleep(0.05)


@pytest.mark.parametrize(("service", "servers"), [(SERVICE_V4, SERVERS), (SERVICE_V6, SERVERS_V6)])
def test_a_service_is_reached_round_robin_over_the_endpoints_of_its_family(
    bed: Bed, proxy: ProxyProcess, service: str, servers: tuple[str, ...]
) -> None:
    proxy.put(plan_of(*SERVERS, *SERVERS_V6))
    seen = [call(bed, service).split()[0] for _ in range(4)]
    assert sorted(seen) == sorted(servers * 2)


def test_endpoints_see_the_node(bed: Bed, proxy: ProxyProcess) -> None:
    proxy.put(plan_of(*SERVERS))
    assert call(bed).split()[1] == NODE


def test_an_unknown_destination_is_reset_and_counted(bed: Bed, proxy: ProxyProcess) -> None:
    with pytest.raises(ConnectionResetError):
        call(bed, "10.96.7.7")
    assert proxy.counters()["refused"] == {"unknown-destination": 1}


def test_a_connection_to_the_interception_address_itself_is_no_loop(bed: Bed, proxy: ProxyProcess) -> None:
    proxy.put(plan_of("169.254.96.16", port=40001))
    with pytest.raises(ConnectionResetError):
        call(bed)
    assert proxy.counters()["accepted"] == 2


def test_a_virtual_address_leads_to_its_member(bed: Bed, proxy: ProxyProcess) -> None:
    member = Member(
        "n1", SERVERS[1], Distance.SAME_NODE, {"http": 8080}, visible_address="10.96.200.1", virtual=True, ready=False
    )
    proxy.put(ServicePlan("shop", "db", ServiceKind.HEADLESS, ports=(PortPlan(80, "http"),), members=(member,)))
    assert call(bed, "10.96.200.1", 8080).split()[0] == SERVERS[1]
    with pytest.raises(ConnectionResetError):
        call(bed, "10.96.200.1", 80)  # headless means the endpoint's own port


def test_an_endpoint_that_refuses_is_passed_over_at_once_and_rests(bed: Bed, proxy: ProxyProcess) -> None:
    plan = plan_of(SERVERS[0])
    closed = Member("n1", SERVERS[1], Distance.SAME_NODE, {"http": 9999})
    proxy.put(
        ServicePlan(**{f: getattr(plan, f) for f in plan.__struct_fields__} | {"members": (*plan.members, closed)})
    )
    start = time.monotonic()
    assert {call(bed).split()[0] for _ in range(10)} == {SERVERS[0]}
    assert time.monotonic() - start < 1.5
    counters = proxy.counters()
    assert counters["by_service"]["shop/web"]["refused_endpoints"] == 1
    assert counters["resting"][0]["endpoint"] == f"{SERVERS[1]}:9999 on n1"


def test_with_one_of_two_endpoints_dead_every_call_succeeds_within_a_second(bed: Bed, proxy: ProxyProcess) -> None:
    proxy.put(plan_of(NOWHERE, SERVERS[0]))
    times = []
    for _ in range(30):
        start = time.monotonic()
        assert call(bed).split()[0] == SERVERS[0]
        times.append(time.monotonic() - start)
    assert max(times) < 1.0
    assert sum(took > 0.2 for took in times) <= 2  # the dead one rests after the first try


def test_only_dead_endpoints_end_in_a_reset_after_the_timeout(bed: Bed) -> None:
    proxy = ProxyProcess(bed, **{"connect-timeout-s": 0.6})
    proxy.put(plan_of(NOWHERE))
    start = time.monotonic()
    with pytest.raises(ConnectionResetError):
        call(bed)
    assert 0.5 < time.monotonic() - start < 2.0
    assert proxy.counters()["refused"] == {"connect-timeout": 1}
    proxy.process.kill()
    proxy.process.wait()


def test_a_dropped_service_is_refused_and_its_open_connections_live_on(bed: Bed, proxy: ProxyProcess) -> None:
    proxy.put(plan_of(*SERVERS))
    with bed.socket_in(bed.client) as sock:
        sock.settimeout(3)
        sock.connect((SERVICE_V4, 80))
        eventually(lambda: len(proxy.connections()) == 1)
        proxy.drop("shop", "web")
        with pytest.raises(ConnectionResetError):
            call(bed)
        sock.sendall(b"hello")
        assert sock.recv(100).split()[0].decode() in SERVERS


def test_silent_clients_delay_nobody_and_five_thousand_cost_nothing(bed: Bed, proxy: ProxyProcess) -> None:
    proxy.put(plan_of(*SERVERS))
    idle = bed.inside(bed.client, lambda: [_connected() for _ in range(5_000)])
    eventually(lambda: proxy.counters()["tcp_connections"] == 5_000, 20)
    before_s = _processor_s(proxy.pid)
    start = time.monotonic()
    assert call(bed).split()[0] in SERVERS
    assert time.monotonic() - start < 1.0
    time.sleep(1.0)
    assert _processor_s(proxy.pid) - before_s < 0.2
    assert 10_000 <= len(list(Path(f"/proc/{proxy.pid}/fd").iterdir())) < 10_030  # two a connection
    for sock in idle:
        sock.close()
    eventually(lambda: proxy.counters()["tcp_connections"] == 0, 20)


def test_a_burst_of_eight_thousand_connections_is_served(bed: Bed, proxy: ProxyProcess) -> None:
    proxy.put(plan_of(*SERVERS))

    def burst() -> list[socket.socket]:
        socks = []
        for _ in range(8_000):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((SERVICE_V4, 80))
            socks.append(sock)
        return socks

    socks = bed.inside(bed.client, burst)
    eventually(lambda: proxy.counters()["accepted"] == 8_000, 60)
    eventually(lambda: proxy.counters()["by_service"]["shop/web"]["active"] == 8_000, 30)
    for sock in socks:
        sock.close()
    eventually(lambda: proxy.counters()["tcp_connections"] == 0, 30)


def test_without_descriptors_new_clients_are_reset_old_ones_live_and_it_recovers(bed: Bed) -> None:
    proxy = ProxyProcess(bed, files=100)
    proxy.put(plan_of(*SERVERS))
    old = bed.inside(bed.client, lambda: [_connected() for _ in range(60)])
    eventually(lambda: proxy.counters()["refused"].get("no-descriptors", 0) > 0)
    before_s = _processor_s(proxy.pid)
    time.sleep(1.0)
    assert _processor_s(proxy.pid) - before_s < 0.3, "it spins"
    answered = 0
    for sock in old:
        try:
            sock.sendall(b"hello")
            answered += bool(sock.recv(100))
        except ConnectionError:
            pass
    assert answered >= 30
    for sock in old:
        sock.close()
    eventually(lambda: proxy.counters()["tcp_connections"] == 0)
    assert call(bed).split()[0] in SERVERS
    proxy.process.kill()
    proxy.process.wait()


def test_running_out_of_ports_to_one_endpoint_delays_and_does_not_fail(bed: Bed, proxy: ProxyProcess) -> None:
    """200 ports, connections that the client closes first, so that each leaves a port in TIME_WAIT on the node."""
    bed.run(bed.node, ["sysctl", "-qw", "net.ipv4.ip_local_port_range=50000 50199", "net.ipv4.tcp_tw_reuse=1"])
    try:
        proxy.put(plan_of(SERVERS[0]))
        until_s, calls = time.monotonic() + 6, 0
        while time.monotonic() < until_s:
            assert call(bed, timeout_s=6).split()[0] == SERVERS[0]
            calls += 1
        assert calls > 600  # three times the ports: it did run out
        assert "no-ports" not in proxy.counters()["refused"]
    finally:
        bed.run(bed.node, ["sysctl", "-qw", "net.ipv4.ip_local_port_range=32768 60999"])


def test_an_unread_stream_of_four_gigabytes_keeps_memory_bounded(bed: Bed, proxy: ProxyProcess) -> None:
    proxy.put(plan_of(SERVERS[0], port=8090))
    source = bed.socket_in(bed.servers[0])
    source.bind((SERVERS[0], 8090))
    source.listen(1)
    sent = [0]

    def flood() -> None:
        conn, _ = source.accept()
        conn.settimeout(2)
        block = bytes(1 << 20)
        try:
            while sent[0] < 4 << 30:
                sent[0] += conn.send(block)
        except OSError:
            pass
        conn.close()

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    with bed.socket_in(bed.client) as sock:
        sock.connect((SERVICE_V4, 80))
        thread.join(DEADLINE_S * 3)
        assert not thread.is_alive(), "the sender was never held back"
        assert _resident_bytes(proxy.pid) < 100 << 20
        assert sent[0] < 128 << 20  # what the buffers of two connections hold
    source.close()


def test_draining_waits_for_those_who_end_and_resets_the_rest(bed: Bed) -> None:
    proxy = ProxyProcess(bed, **{"drain-s": 0.5})
    proxy.put(plan_of(*SERVERS))
    with bed.socket_in(bed.client) as sock:
        sock.settimeout(5)
        sock.connect((SERVICE_V4, 80))
        eventually(lambda: len(proxy.connections()) == 1)
        proxy.ask("drain")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert proxy.process.wait(DEADLINE_S) == 0


def test_udp_goes_through_a_session_and_answers_come_from_the_service(bed: Bed, proxy: ProxyProcess) -> None:
    ports = (PortPlan(53, "dns", Protocol.UDP),)
    members = tuple(Member("n1", address, Distance.SAME_NODE, {"dns": 5353}) for address in SERVERS[:1])
    proxy.put(ServicePlan("shop", "dns", ServiceKind.CLUSTER_IP, (SERVICE_V4,), ports=ports, members=members))
    server = bed.socket_in(bed.servers[0], kind=socket.SOCK_DGRAM)
    server.bind((SERVERS[0], 5353))
    server.settimeout(3)
    with bed.socket_in(bed.client, kind=socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        for question in (b"one", b"two"):
            client.sendto(question, (SERVICE_V4, 53))
            data, peer = server.recvfrom(100)
            server.sendto(data.upper(), peer)
            assert client.recvfrom(100) == (question.upper(), (SERVICE_V4, 53))
        assert len(proxy.connections()) == 1
        server.close()
        client.sendto(b"three", (SERVICE_V4, 53))  # the port is closed now: ICMP ends the session
        eventually(lambda: proxy.counters()["udp_sessions"] == 0)
        assert proxy.counters()["resting"][0]["service"] == "shop/dns"


def test_udp_sessions_end_when_idle_and_are_bounded(bed: Bed) -> None:
    proxy = ProxyProcess(bed, **{"udp-idle-s": 1.0, "udp-sessions": 3})
    ports = (PortPlan(53, "dns", Protocol.UDP),)
    member = Member("n1", SERVERS[0], Distance.SAME_NODE, {"dns": 5353})
    proxy.put(ServicePlan("shop", "dns", ServiceKind.CLUSTER_IP, (SERVICE_V4,), ports=ports, members=(member,)))
    server = bed.socket_in(bed.servers[0], kind=socket.SOCK_DGRAM)
    server.bind((SERVERS[0], 5353))
    clients = [bed.socket_in(bed.client, kind=socket.SOCK_DGRAM) for _ in range(5)]
    for client in clients:
        client.sendto(b"x", (SERVICE_V4, 53))
    eventually(lambda: proxy.counters()["refused"].get("session-evicted") == 2)
    eventually(lambda: proxy.counters()["udp_sessions"] == 0)
    assert proxy.counters()["by_service"]["shop/dns"]["ends"] == {"evicted": 2, "idle": 3}
    for sock in (server, *clients):
        sock.close()
    proxy.process.kill()
    proxy.process.wait()


def _connected() -> socket.socket:
    sock = socket.socket()
    sock.settimeout(10)
    sock.connect((SERVICE_V4, 80))
    return sock


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
