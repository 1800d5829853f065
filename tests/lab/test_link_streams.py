"""Streams over a real link: bytes, ends, aborts and back-pressure reach the other side as over TCP."""

import contextlib
import hashlib
import os
import random
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from link_pair import Endpoint, Node, Stream, World, eventually, world

from isthmus.link.limits import LinkLimits
from isthmus.model.ports import Outcome, StreamRequest
from isthmus.wire.worker import PathSpec

GIB = 1 << 30
LINGER_ZERO = struct.pack("ii", 1, 0)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture
def nodes(lab: World) -> tuple[Node, Node]:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    return a, b


def send_at_random(sock: socket.socket, total: int, seed: int, digests: dict[str, str], name: str) -> None:
    """Blocks of random sizes, then half-close; their digest is kept."""
    rng, digest = random.Random(seed), hashlib.blake2b()
    source = random.Random(seed).randbytes(1 << 20)
    left = total
    while left:
        start = rng.randrange(1 << 19)
        size = min(left, rng.choice((1, 100, 5000, 65_537, 300_000, 500_000)))
        block = memoryview(source)[start : start + size]
        digest.update(block)
        sock.sendall(block)
        left -= len(block)
    sock.shutdown(socket.SHUT_WR)
    digests[name] = digest.hexdigest()


def receive(sock: socket.socket, digests: dict[str, str], name: str) -> None:
    digest, buffer = hashlib.blake2b(), bytearray(1 << 19)
    while count := sock.recv_into(buffer):
        digest.update(memoryview(buffer)[:count])
    digests[name] = digest.hexdigest()


def exchange(client: socket.socket, server: socket.socket, total: int) -> None:
    """``total`` bytes each way at once, compared by digest."""
    digests: dict[str, str] = {}
    for sock in (client, server):
        sock.settimeout(60)
    threads = [
        threading.Thread(target=send_at_random, args=(client, total, 1, digests, "client sent")),
        threading.Thread(target=receive, args=(server, digests, "server got")),
        threading.Thread(target=send_at_random, args=(server, total, 2, digests, "server sent")),
        threading.Thread(target=receive, args=(client, digests, "client got")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(110)
    assert digests["client sent"] == digests["server got"]
    assert digests["server sent"] == digests["client got"]


@pytest.mark.slow
def test_a_gibibyte_each_way_at_once_arrives_unchanged(
    lab: World, nodes: tuple[Node, Node], endpoint: Endpoint
) -> None:
    stream = lab.open(nodes[0], "b", endpoint.port)
    exchange(stream.sock, endpoint.accept(), GIB)
    assert eventually(lambda: stream.ended) == (GIB, GIB)
    row = next(row for row in lab.call(nodes[0].link.links) if row["streams"])
    assert row["state"] == "idle" and row["tls"] == "TLSv1.3 TLS_AES_256_GCM_SHA384"


def test_many_streams_one_after_the_other_reuse_a_connection(
    lab: World, nodes: tuple[Node, Node], endpoint: Endpoint
) -> None:
    for number in range(40):
        stream = lab.open(nodes[0], "b", endpoint.port)
        exchange(stream.sock, endpoint.accept(), 30_000 + 7919 * number)
        assert eventually(lambda stream=stream: stream.ended)
        stream.sock.close()
    assert lab.call(nodes[0].link.counters)["link_connections"] <= 4


def test_eight_bulk_streams_share_the_crew_and_arrive_unchanged(
    lab: World, nodes: tuple[Node, Node], endpoint: Endpoint
) -> None:
    pairs = []
    for _ in range(8):
        stream = lab.open(nodes[0], "b", endpoint.port)
        pairs.append((stream, endpoint.accept()))
    threads = [threading.Thread(target=exchange, args=(stream.sock, server, 20 << 20)) for stream, server in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert all(eventually(lambda s=stream: s.ended) == (20 << 20, 20 << 20) for stream, _ in pairs)


def test_a_half_closed_stream_still_answers(lab: World, nodes: tuple[Node, Node], endpoint: Endpoint) -> None:
    stream = lab.open(nodes[0], "b", endpoint.port)
    server = endpoint.accept()
    stream.sock.sendall(b"question")
    stream.sock.shutdown(socket.SHUT_WR)
    assert server.recv(100) == b"question"
    assert server.recv(100) == b""
    server.sendall(b"answer")
    server.close()
    assert stream.sock.recv(100) == b"answer"
    assert stream.sock.recv(100) == b""
    assert eventually(lambda: stream.ended) == (8, 6)


def test_the_endpoint_may_end_first(lab: World, nodes: tuple[Node, Node], endpoint: Endpoint) -> None:
    stream = lab.open(nodes[0], "b", endpoint.port)
    server = endpoint.accept()
    server.shutdown(socket.SHUT_WR)
    assert stream.sock.recv(10) == b""
    stream.sock.sendall(b"late")
    stream.sock.close()
    assert server.recv(10) == b"late"
    assert server.recv(10) == b""
    assert eventually(lambda: stream.ended) == (4, 0)


@pytest.mark.parametrize("side", ["client", "endpoint"])
def test_a_reset_reaches_the_other_side(lab: World, nodes: tuple[Node, Node], endpoint: Endpoint, side: str) -> None:
    stream = lab.open(nodes[0], "b", endpoint.port)
    server = endpoint.accept()
    ours, theirs = (stream.sock, server) if side == "client" else (server, stream.sock)
    ours.sendall(b"x")
    assert theirs.recv(1) == b"x"
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
    ours.close()
    with pytest.raises(ConnectionResetError):
        theirs.recv(1)
    assert eventually(lambda: stream.ended) is not None


@pytest.mark.parametrize("side", ["client", "endpoint"])
def test_a_reset_passes_a_side_that_does_not_read(
    lab: World, nodes: tuple[Node, Node], endpoint: Endpoint, side: str
) -> None:
    stream = lab.open(nodes[0], "b", endpoint.port)
    server = endpoint.accept()
    ours, theirs = (stream.sock, server) if side == "client" else (server, stream.sock)
    fill(ours)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
    ours.close()
    assert eventually(lambda: stream.ended) is not None
    eventually(lambda: theirs.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def fill(sock: socket.socket) -> int:
    """Send until nothing is taken for half a second."""
    sock.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while True:
            sent += sock.send(b"z" * 262_144)
    return sent


def test_an_unread_stream_stops_the_sender_and_keeps_memory_bounded(
    lab: World, nodes: tuple[Node, Node], endpoint: Endpoint
) -> None:
    before = resident_bytes()
    stream = lab.open(nodes[0], "b", endpoint.port)
    server = endpoint.accept()
    sent = fill(stream.sock)
    assert sent < 256 << 20  # four gibibytes would have been taken by a link without back-pressure
    assert resident_bytes() - before < 16 << 20
    other = lab.open(nodes[0], "b", endpoint.port)  # and others do not notice
    other_server = endpoint.accept()
    other.sock.sendall(b"hello")
    assert other_server.recv(10) == b"hello"
    digests: dict[str, str] = {}
    server.settimeout(30)
    reader = threading.Thread(target=receive, args=(server, digests, "got"))
    reader.start()
    stream.sock.settimeout(30)
    stream.sock.close()
    reader.join(30)
    assert digests["got"] == hashlib.blake2b(b"z" * sent).hexdigest()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_refusing_endpoint_is_reported_and_the_connection_kept(lab: World, nodes: tuple[Node, Node]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    stream = lab.carry(nodes[0], "b", port)
    outcome, detail = eventually(lambda: stream.outcome)
    assert outcome is Outcome.REFUSED and "refused" in detail
    stream.inner.send(b"the caller still has its client")
    assert any(row["state"] == "idle" for row in lab.call(nodes[0].link.links))


def test_what_the_model_does_not_allow_is_refused_by_name(lab: World, nodes: tuple[Node, Node]) -> None:
    stream = lab.carry(nodes[0], "b", 1, service="forbidden")
    assert eventually(lambda: stream.outcome) == (Outcome.NOT_ALLOWED, "not this node's")
    assert nodes[1].connector.peers == ["a"]
    assert lab.call(nodes[1].link.counters)["link_served_not_allowed"] == 1


def test_an_unknown_node_has_no_path(lab: World, nodes: tuple[Node, Node]) -> None:
    stream = lab.carry(nodes[0], "nobody", 1)
    assert eventually(lambda: stream.outcome)[0] is Outcome.NO_PATH


def test_a_cancelled_stream_leaves_its_client_alone(lab: World, nodes: tuple[Node, Node], endpoint: Endpoint) -> None:
    warm = lab.open(nodes[0], "b", endpoint.port)
    endpoint.accept()
    stream = Stream()
    request = StreamRequest("shop", "web", "127.0.0.1", endpoint.port)
    lab.call(lambda: nodes[0].link.carrier.carry("b", request, stream.inner, stream.opened, stream.end)())
    stream.inner.send(b"still here")
    assert stream.sock.recv(100) == b"still here"
    warm.sock.sendall(b"x")
    assert stream.outcome is None


def test_a_burst_is_served_by_a_bounded_number_of_connections(tmp_path: Path, endpoint: Endpoint) -> None:
    with world(tmp_path, LinkLimits(crew=1, per_peer=10, dialling_most=4)) as lab:
        a, b = lab.node("a"), lab.node("b")
        lab.put_peer(a, "b", PathSpec("direct", b.address))
        streams = [lab.carry(a, "b", endpoint.port) for _ in range(60)]
        for stream in streams:
            stream.sock.shutdown(socket.SHUT_WR)
        for _ in streams:
            endpoint.accept().close()
        for stream in streams:
            assert eventually(lambda s=stream: s.outcome) == (Outcome.OPENED, "")
        assert lab.call(a.link.counters)["link_connections"] <= 10


def test_streams_that_wait_too_long_are_told(tmp_path: Path, endpoint: Endpoint) -> None:
    with world(tmp_path, LinkLimits(crew=1, per_peer=1, wait_s=0.5)) as lab:
        a, b = lab.node("a"), lab.node("b")
        lab.put_peer(a, "b", PathSpec("direct", b.address))
        lab.open(a, "b", endpoint.port)
        late = lab.carry(a, "b", endpoint.port)
        assert eventually(lambda: late.outcome)[0] is Outcome.NO_PATH


def test_no_descriptor_is_left_behind(lab: World, nodes: tuple[Node, Node], endpoint: Endpoint) -> None:
    lab.open(nodes[0], "b", endpoint.port).sock.close()
    endpoint.accept().close()
    eventually(lambda: all(row["state"] == "idle" for row in lab.call(nodes[0].link.links)))
    eventually(lambda: len(lab.call(nodes[0].link.links)) >= 2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        stream = lab.open(nodes[0], "b", endpoint.port)
        endpoint.accept().close()
        stream.sock.close()
        assert eventually(lambda s=stream: s.ended) is not None
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)
