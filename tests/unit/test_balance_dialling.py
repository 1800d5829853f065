"""Endpoints are tried in order, over a carrier that fails as links do; and the connector keeps to its admission."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from isthmus.loop.loop import Loop
from isthmus.model.cluster import Protocol
from isthmus.model.ports import Outcome, StreamRequest
from isthmus.model.settings import ProxySettings
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan
from isthmus.proxy.connector import Connector
from isthmus.proxy.counters import Counters
from isthmus.proxy.table import Table
from isthmus.proxy.tcp import TcpProxy

DEADLINE_S = 20.0
SETTINGS = ProxySettings(connect_stagger_s=0.05, connect_timeout_s=0.5)


Make = Callable[..., "Bench"]


class Carrier:
    """Links to nodes named for what they do: ``refuses``, ``silent``, ``opens``, ``opens-late``, ``no-path``."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.asked: list[str] = []
        self.cancelled: list[str] = []

    def carry(
        self,
        node: str,
        request: StreamRequest,
        client: socket.socket,
        opened: Callable[[Outcome, str], None],
        ended: Callable[[int, int], None],
    ) -> Callable[[], None]:
        self.asked.append(node)
        gone: list[bool] = []

        def tell(outcome: Outcome) -> None:
            if gone:
                return
            opened(outcome, "")
            if outcome is Outcome.OPENED:
                client.send(node.encode())
                self.loop.discard(client)
                ended(0, len(node))

        if node == "refuses":
            self.loop.call_soon(lambda: tell(Outcome.REFUSED))
        elif node == "no-path":
            tell(Outcome.NO_PATH)
        elif node == "opens":
            tell(Outcome.OPENED)
        elif node == "opens-late":
            self.loop.call_later(0.12, lambda: tell(Outcome.OPENED))
        return lambda: (gone.append(True), self.cancelled.append(node))[0]


class Bench:
    def __init__(self, *nodes: str) -> None:
        self.loop = Loop()
        self.table = Table("me")
        members = tuple(
            Member(node, f"10.0.0.{at}", Distance.ANYWHERE if at else Distance.SAME_NODE, {"": 80})
            for at, node in enumerate(nodes)
        )
        plan = ServicePlan(
            "shop", "web", ServiceKind.CLUSTER_IP, ("10.96.0.1",), ports=(PortPlan(80),), members=members
        )
        self.table.put(plan)
        self.counters = Counters()
        self.carrier = Carrier(self.loop)
        self.proxy = TcpProxy(
            self.loop, SETTINGS, self.table, self.counters, self.carrier, rng=Random(1), mark=False
        )  # fmt: skip
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.proxy.listen(self.listener, lambda _sock: ("10.96.0.1", 80))
        self.thread = threading.Thread(target=self.loop.run, daemon=True)

    def call(self) -> bytes:
        if not self.thread.is_alive():
            self.thread.start()
        with socket.create_connection(self.listener.getsockname(), DEADLINE_S) as client:
            return client.recv(100)

    def until_idle(self) -> None:
        """The client has its bytes before the loop has counted the connection out."""
        until_s = time.monotonic() + DEADLINE_S
        while self.proxy.connections:
            assert time.monotonic() < until_s
            time.sleep(0.01)

    def close(self) -> None:
        self.loop.call_threadsafe(self.proxy.stop_accepting)
        self.loop.call_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_S)
        self.loop.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(*nodes: str) -> Bench:
        made.append(Bench(*nodes))
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("nodes", "answered"),
    [
        (("opens", "refuses"), b"opens"),  # round robin begins with the second: it refuses
        (("opens", "no-path"), b"opens"),
        (("opens", "silent"), b"opens"),  # company after the stagger
        (("silent", "silent", "opens-late"), b"opens-late"),
        (("refuses", "no-path", "opens-late", "silent"), b"opens-late"),
    ],
)
def test_the_first_to_answer_wins(make: Callable[..., Bench], nodes: tuple[str, ...], answered: bytes) -> None:
    bench = make(*nodes)
    for _ in range(4):
        assert bench.call() == answered
    bench.until_idle()


def test_a_silent_one_is_cancelled_and_rests(make: Callable[..., Bench]) -> None:
    bench = make("opens", "silent")
    for _ in range(4):
        assert bench.call() == b"opens"
    assert bench.carrier.cancelled == ["silent"]
    assert bench.carrier.asked.count("silent") == 1


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (("refuses", "no-path"), "endpoints-failed"),
        (("silent", "refuses"), "connect-timeout"),
        ((), "no-endpoint"),
    ],
)
def test_when_nobody_answers_the_client_is_reset(
    make: Callable[..., Bench], nodes: tuple[str, ...], reason: str
) -> None:
    bench = make(*nodes)
    with pytest.raises(ConnectionResetError):
        bench.call()
    bench.until_idle()
    assert bench.counters.refused == {reason: 1}


@pytest.fixture
def endpoint() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connector_of(loop: Loop, port: int, node: str = "me") -> tuple[Connector, Counters]:
    table, counters = Table("me"), Counters()
    member = Member(node, "127.0.0.1", Distance.SAME_NODE, {"": port})
    table.put(ServicePlan("shop", "web", ServiceKind.CLUSTER_IP, ports=(PortPlan(80),), members=(member,)))
    return Connector(loop, SETTINGS, table, counters, mark=False), counters


def outcome_of(loop: Loop, connector: Connector, request: StreamRequest) -> tuple[Outcome, Any]:
    told: list[tuple[Outcome, Any]] = []

    def done(outcome: Outcome, sock: socket.socket | None, _detail: str) -> None:
        told.append((outcome, sock))
        loop.call_soon(loop.stop)

    connector.connect("peer", request, done)
    loop.call_later(DEADLINE_S, loop.stop)
    loop.run()
    assert len(told) == 1
    return told[0]


def test_the_connector_reaches_an_own_endpoint(endpoint: socket.socket) -> None:
    loop, port = Loop(), endpoint.getsockname()[1]
    connector, counters = connector_of(loop, port)
    outcome, sock = outcome_of(loop, connector, StreamRequest("shop", "web", "127.0.0.1", port))
    assert outcome is Outcome.OPENED and sock.getpeername() == ("127.0.0.1", port)
    assert counters.admission == {"own-endpoint": 1}
    sock.close()
    loop.close()


def test_the_connector_tells_a_refusal(endpoint: socket.socket) -> None:
    loop, port = Loop(), endpoint.getsockname()[1]
    endpoint.close()
    connector, _ = connector_of(loop, port)
    outcome, sock = outcome_of(loop, connector, StreamRequest("shop", "web", "127.0.0.1", port))
    assert (outcome, sock) == (Outcome.REFUSED, None)
    loop.close()


def test_the_connector_never_connects_elsewhere(endpoint: socket.socket) -> None:
    loop, port = Loop(), endpoint.getsockname()[1]
    connector, counters = connector_of(loop, port, node="other")
    outcome, _ = outcome_of(loop, connector, StreamRequest("shop", "web", "127.0.0.1", port))
    assert outcome is Outcome.NOT_ALLOWED
    assert counters.admission == {"other-node": 1}
    endpoint.setblocking(False)
    with pytest.raises(BlockingIOError):
        endpoint.accept()
    loop.close()


def test_datagrams_of_a_peer_reach_the_endpoint_and_come_back() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        loop, table, got = Loop(), Table("me"), []
        port = server.getsockname()[1]
        member = Member("me", "127.0.0.1", Distance.SAME_NODE, {"": port})
        ports = (PortPlan(53, "", Protocol.UDP),)
        table.put(ServicePlan("shop", "dns", ServiceKind.CLUSTER_IP, ports=ports, members=(member,)))
        connector = Connector(loop, SETTINGS, table, Counters(), mark=False)
        request = StreamRequest("shop", "dns", "127.0.0.1", port, "UDP")
        outcome, session, _ = connector.open_datagrams("peer", request, lambda data: (got.append(data), loop.stop())[0])
        assert outcome is Outcome.OPENED and session is not None
        session.send(b"question")
        data, peer = server.recvfrom(100)
        server.sendto(data.upper(), peer)
        loop.call_later(DEADLINE_S, loop.stop)
        loop.run()
        assert got == [b"QUESTION"]
        session.close()
        session.close()
        loop.close()
