"""Paths, peers and identities over real sockets: direct, reverse, relayed, the wrong host, the dead, the revoked."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from link_pair import Endpoint, Node, Stream, World, eventually, world

from isthmus.link.limits import LinkLimits
from isthmus.model.ports import Outcome, StreamRequest
from isthmus.wire.ticket import ACCEPTED, PREAMBLE_BYTES
from isthmus.wire.tls import TlsFiles, client_context
from isthmus.wire.worker import Dial, DialFailed, DropPeer, NeedConnection, PathReport, PathSpec

LIMITS = LinkLimits(crew=1, head_start_s=0.1, stagger_s=0.1, retry_first_s=0.3, connect_s=2.0, handshake_s=1.0)
TICKETS = ("aa" * 32, "bb" * 32)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, LIMITS) as made:
        yield made


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


class Joiner:
    """Joins pairs of ticketed connections as the relay does, on real sockets; it sees nothing but bytes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen = bytearray()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                pair = [self._listener.accept()[0] for _ in range(2)]
            except OSError:
                return
            for sock in pair:
                assert len(sock.recv(PREAMBLE_BYTES, socket.MSG_WAITALL)) == PREAMBLE_BYTES
            for sock in pair:
                sock.sendall(ACCEPTED)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                self.seen += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def relay() -> Iterator[Joiner]:
    made = Joiner()
    yield made
    made.close()


def needs(node: Node) -> list[NeedConnection]:
    return [message for message in node.sent if isinstance(message, NeedConnection)]


def reports(node: Node) -> list[PathReport]:
    return [message for message in node.sent if isinstance(message, PathReport)]


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


def join_over(lab: World, relay: Joiner, a: Node, b: Node, need: NeedConnection) -> None:
    """What both control processes do when a relayed connection is wanted."""
    lab.call(lambda: a.link.handle(Dial("b", relay.address, "relayed", "client", TICKETS[0], need.request)))
    lab.call(lambda: b.link.handle(Dial("a", relay.address, "relayed", "server", TICKETS[1])))


def hello(stream_sock: socket.socket, endpoint: Endpoint) -> None:
    server = endpoint.accept()
    stream_sock.sendall(b"a request that nobody between may read")
    assert server.recv(100) == b"a request that nobody between may read"


def test_a_direct_path_is_reported_with_its_round_trip(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    hello(lab.open(a, "b", endpoint.port).sock, endpoint)
    report = eventually(lambda: reports(a))[0]
    assert (report.node, report.kind, report.address, report.error) == ("b", "direct", b.address, "")
    assert 0.0 < report.rtt_ms < 1000.0


def test_a_relayed_stream_is_encrypted_end_to_end(lab: World, relay: Joiner, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("relayed", relay.address, "r"))
    stream = lab.carry(a, "b", endpoint.port)
    join_over(lab, relay, a, b, eventually(lambda: needs(a))[0])
    hello(stream.sock, endpoint)
    assert len(relay.seen) > 1000 and b"nobody between" not in relay.seen
    assert any(row["kind"] == "relayed" for row in lab.call(b.link.links))


def test_a_relay_does_not_wait_for_a_slow_direct_attempt_and_direct_takes_over(
    lab: World, relay: Joiner, endpoint: Endpoint
) -> None:
    a, b = lab.node("a"), lab.node("b")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts in the kernel and never answers
        slow = PathSpec("direct", f"127.0.0.1:{silent.getsockname()[1]}")
        relayed = PathSpec("relayed", relay.address, "r")
        lab.put_peer(a, "b", slow, relayed)
        start_s = time.monotonic()
        stream = lab.carry(a, "b", endpoint.port)
        join_over(lab, relay, a, b, eventually(lambda: needs(a))[0])
        eventually(lambda: stream.outcome)
        assert time.monotonic() - start_s < 1.0
        hello(stream.sock, endpoint)
    direct = PathSpec("direct", b.address)
    lab.put_peer(a, "b", direct, relayed)  # tried in the background, without a stream that waits for it
    eventually(lambda: [row for row in lab.call(a.link.paths) if row["kind"] == "direct" and row["used"]])
    hello(lab.open(a, "b", endpoint.port).sock, endpoint)
    kinds = {row["kind"]: row["state"] for row in lab.call(a.link.links)}
    assert kinds["relayed"] == "streaming"  # an old stream stays where it is
    stream.sock.close()
    eventually(lambda: "direct" in {row["kind"] for row in lab.call(a.link.links) if row["state"] == "streaming"})


def test_the_peer_dials_us_when_only_it_can(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("reverse", "", "r"))
    stream = lab.carry(a, "b", endpoint.port)
    eventually(lambda: needs(a))
    lab.call(lambda: b.link.handle(Dial("a", a.address, "reverse", "client")))
    eventually(lambda: stream.outcome)
    hello(stream.sock, endpoint)
    assert b.connector.peers == ["a"]  # b dialled, and serves
    assert eventually(lambda: reports(a))[0].kind == "reverse"


def test_without_any_path_the_reasons_are_told(lab: World) -> None:
    a = lab.node("a")
    lab.put_peer(a, "b", PathSpec("direct", closed_port()), PathSpec("relayed", "", "r"))
    stream = lab.carry(a, "b", 1)
    need = eventually(lambda: needs(a))[0]
    lab.call(lambda: a.link.handle(DialFailed(need.request, "b", "the peer is not connected to the relay")))
    outcome, detail = eventually(lambda: stream.outcome)
    assert outcome is Outcome.NO_PATH
    assert "refused" in detail and "not connected to the relay" in detail


def test_another_node_at_the_address_is_a_failed_path_not_a_failed_stream(lab: World, endpoint: Endpoint) -> None:
    a, b, c = lab.node("a"), lab.node("b"), lab.node("c")
    lab.put_peer(a, "b", PathSpec("direct", c.address), PathSpec("direct", b.address))
    hello(lab.open(a, "b", endpoint.port).sock, endpoint)
    assert b.connector.peers == ["a"] and c.connector.peers == []
    failed = eventually(lambda: [report for report in reports(a) if report.error])[0]
    assert failed.address == c.address and "isthmus://node/c" in failed.error


def test_a_host_of_another_cluster_is_a_failed_path(lab: World, tmp_path: Path, endpoint: Endpoint) -> None:
    (tmp_path / "other").mkdir()
    with world(tmp_path / "other", LIMITS) as other:
        stranger = other.node("b")
        a, b = lab.node("a"), lab.node("b")
        lab.put_peer(a, "b", PathSpec("direct", stranger.address), PathSpec("direct", b.address))
        hello(lab.open(a, "b", endpoint.port).sock, endpoint)


def test_a_pooled_connection_that_died_unnoticed_is_replaced_silently(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    first = lab.open(a, "b", endpoint.port)
    endpoint.accept().close()
    first.sock.close()
    eventually(lambda: first.ended)

    stream = Stream()
    request = StreamRequest("shop", "web", "127.0.0.1", endpoint.port)

    def kill_and_carry() -> None:
        """In one turn of the loop: the peer closes everything, and we open before we can have noticed."""
        b.link._server.close_where(lambda _connection: True, "test")
        a.link.carrier.carry("b", request, stream.inner, stream.opened, stream.end)

    lab.call(kill_and_carry)
    assert eventually(lambda: stream.outcome) == (Outcome.OPENED, "")
    hello(stream.sock, endpoint)
    assert lab.call(a.link.counters)["link_stale_replaced"] == 1


def test_a_dropped_peer_loses_its_connections_at_once(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    stream = lab.open(a, "b", endpoint.port)
    server = endpoint.accept()
    lab.call(lambda: b.link.handle(DropPeer("a", "revoked")))
    with pytest.raises(ConnectionResetError):
        stream.sock.recv(1)
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    again = lab.carry(a, "b", endpoint.port)
    assert eventually(lambda: again.outcome)[0] is Outcome.NO_PATH


def test_a_revoked_certificate_is_out_at_once_and_cannot_come_back(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    stream = lab.open(a, "b", endpoint.port)
    server = endpoint.accept()
    serial = lab.issuer.serial(a.credentials)
    renewed = lab.issuer.credentials("b", revoked=(serial,))
    lab.call(lambda: b.link.handle(renewed))
    with pytest.raises(ConnectionResetError):
        stream.sock.recv(1)
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    again = lab.carry(a, "b", endpoint.port)
    assert eventually(lambda: again.outcome)[0] is Outcome.NO_PATH


def test_renewed_credentials_do_not_touch_running_streams(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    stream = lab.open(a, "b", endpoint.port)
    server = endpoint.accept()
    for node in (a, b):
        renewed = lab.issuer.credentials(node.name)
        lab.call(lambda node=node, renewed=renewed: node.link.handle(renewed))
    stream.sock.sendall(b"on")
    assert server.recv(10) == b"on"
    hello(lab.open(a, "b", endpoint.port).sock, endpoint)


def test_garbage_and_silence_on_the_link_port_cost_little(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    address = ("127.0.0.1", b.port)
    silent = [socket.create_connection(address) for _ in range(30)]
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(3000), b"\x16\x03\x01\x40\x00" + b"\0" * 9000, b"ISTHMUS1"):
        with socket.create_connection(address) as sock:
            sock.sendall(garbage)
    hello(lab.open(a, "b", endpoint.port).sock, endpoint)
    silent[0].settimeout(6)
    assert silent[0].recv(1) == b""  # the handshake has a deadline
    assert lab.call(b.link.counters)["link_refused_handshake"] >= 4


def test_garbage_inside_tls_ends_only_that_connection(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    stream = lab.open(a, "b", endpoint.port)
    credentials = lab.issuer.credentials("mallory")
    files = TlsFiles(credentials.ca_file, credentials.certificate_file, credentials.key_file)
    with socket.create_connection(("127.0.0.1", b.port)) as plain:
        plain.settimeout(6)
        with client_context(files).wrap_socket(plain) as sock:
            assert sock.recv(5) == b"\x01\0\0\0\0"  # READY
            sock.sendall(os.urandom(5000))
            with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
                while sock.recv(100):
                    pass
                raise ConnectionResetError
    hello(stream.sock, endpoint)


def test_datagrams_of_several_sessions_go_and_come_back(lab: World) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                payload, source = echo.recvfrom(65_536)
                echo.sendto(payload[::-1], source)
            except OSError:
                return

    threading.Thread(target=answer, daemon=True).start()
    got: dict[int, list[bytes]] = {0: [], 1: []}
    closed: list[Outcome] = []
    request = StreamRequest("shop", "dns", "127.0.0.1", echo.getsockname()[1], protocol="UDP")
    carrier = a.link.carrier

    def start(number: int) -> int:
        return carrier.open_session("b", request, got[number].append, lambda outcome, _detail: closed.append(outcome))

    sessions = [lab.call(lambda number=number: start(number)) for number in range(2)]
    big = os.urandom(60_000)
    for number, session in enumerate(sessions):
        lab.call(lambda number=number, session=session: carrier.send(session, b"hello%d" % number))
    lab.call(lambda: carrier.send(sessions[1], big))
    eventually(lambda: got[0] == [b"0olleh"] and got[1] == [b"1olleh", big[::-1]])
    lab.call(lambda: b.link._server.close_where(lambda _connection: True, "test"))
    lab.call(lambda: got[0].clear())
    eventually(lambda: lab.call(lambda: carrier.send(sessions[0], b"ab")) or b"ba" in got[0])  # opened again
    lab.call(lambda: carrier.close_session(sessions[0]))
    eventually(lambda: lab.call(b.link.counters)["link_sessions_accepted"] <= 1)
    forbidden = StreamRequest("shop", "forbidden", "127.0.0.1", 1, protocol="UDP")
    refused = lab.call(
        lambda: carrier.open_session("b", forbidden, got[0].append, lambda outcome, _detail: closed.append(outcome))
    )
    lab.call(lambda: carrier.send(refused, b"x"))
    assert eventually(lambda: closed) == [Outcome.NOT_ALLOWED]
    echo.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_peer_resets_its_streams_and_the_next_ones_go_on(
    lab: World, endpoint: Endpoint, how: signal.Signals, tmp_path: Path
) -> None:
    """The connection ends without close_notify: that is an abort, never an end."""
    a = lab.node("a")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    credentials = lab.issuer.credentials("b")
    files = [credentials.ca_file, credentials.certificate_file, credentials.key_file]
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "bench/linknode.py"), json.dumps({"node": "b", "port": port, "files": files})]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None and process.stdout.readline()
        return process

    process = start()
    lab.put_peer(a, "b", PathSpec("direct", f"127.0.0.1:{port}"))
    stream = lab.open(a, "b", endpoint.port)
    server = endpoint.accept()
    process.send_signal(how)
    process.wait()
    with pytest.raises(ConnectionResetError):
        stream.sock.recv(1)
    server.close()
    process = start()
    eventually(lambda: lab.open(a, "b", endpoint.port))
    process.kill()
    process.wait()


def test_draining_lets_streams_end_and_takes_no_new_ones(lab: World, endpoint: Endpoint) -> None:
    a, b = lab.node("a"), lab.node("b")
    lab.put_peer(a, "b", PathSpec("direct", b.address))
    stream = lab.open(a, "b", endpoint.port)
    server = endpoint.accept()
    lab.call(b.link.drain)
    assert lab.call(lambda: b.link.busy) == 1
    stream.sock.sendall(b"last")
    assert server.recv(10) == b"last"
    stream.sock.close()
    server.close()
    eventually(lambda: lab.call(lambda: b.link.busy) == 0 and not lab.call(b.link.links))
