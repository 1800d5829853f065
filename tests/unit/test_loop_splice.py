"""A splice carries bytes, half-close, RST and back-pressure, and ends once. Real sockets on loopback."""

import socket
import threading
from collections.abc import Iterator

import pytest

from isthmus.loop.loop import Loop
from isthmus.loop.splice import BULK_BYTES, QUANTUM_BYTES, End, Splice, reset

DEADLINE_S = 20.0


class Joined:
    """client <-> (a | splice | b) <-> server, with the loop on its own thread."""

    def __init__(self, *, to_b: bytes = b"", to_a: bytes = b"") -> None:
        self.client, a = connected_pair()
        self.server, b = connected_pair()
        self.near = (a, b)
        self.loop = Loop()
        self.ends: list[tuple[int, int, End]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.splice = Splice(self.loop, a, b, self._ended, to_b=to_b, to_a=to_a)
        self.thread.start()

    def _ended(self, to_b: int, to_a: int, why: End) -> None:
        self.ends.append((to_b, to_a, why))
        self.over.set()

    def close(self) -> None:
        self.loop.stop()
        self.thread.join(DEADLINE_S)
        self.loop.close()
        for sock in (self.client, self.server, *self.near):
            sock.close()


def connected_pair() -> tuple[socket.socket, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    near.settimeout(DEADLINE_S)
    return near, far


@pytest.fixture
def joined() -> Iterator[Joined]:
    it = Joined()
    yield it
    it.close()


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(DEADLINE_S)
    parts = []
    while part := sock.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def test_bytes_pass_both_ways(joined: Joined) -> None:
    joined.client.sendall(b"ping")
    assert joined.server.recv(100) == b"ping"
    joined.server.sendall(b"pong")
    assert joined.client.recv(100) == b"pong"


def test_half_close_passes_and_the_other_direction_goes_on(joined: Joined) -> None:
    joined.client.sendall(b"question")
    joined.client.shutdown(socket.SHUT_WR)
    assert read_all(joined.server) == b"question"
    joined.server.sendall(b"a late answer")
    joined.server.close()
    assert read_all(joined.client) == b"a late answer"
    assert joined.over.wait(DEADLINE_S)
    assert joined.ends == [(8, 13, End.CLOSED)]
    assert not joined.splice.open


def test_half_close_by_the_server_passes_too(joined: Joined) -> None:
    joined.server.shutdown(socket.SHUT_WR)
    assert read_all(joined.client) == b""
    joined.client.sendall(b"still heard")
    joined.client.close()
    assert read_all(joined.server) == b"still heard"
    joined.server.close()
    assert joined.over.wait(DEADLINE_S)
    assert joined.ends == [(11, 0, End.CLOSED)]


@pytest.mark.parametrize(("who", "why"), [("client", End.RESET_BY_A), ("server", End.RESET_BY_B)])
def test_rst_passes_as_rst(joined: Joined, who: str, why: End) -> None:
    dying, other = (joined.client, joined.server) if who == "client" else (joined.server, joined.client)
    reset(Loop(), dying)
    dying.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    dying.close()
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    assert joined.over.wait(DEADLINE_S)
    assert joined.ends == [(0, 0, why)]


def test_an_answer_sent_before_the_rst_is_still_delivered(joined: Joined) -> None:
    """A server that answers 413 and closes without reading the body sends RST right behind its answer."""
    joined.client.sendall(b"x" * 10)
    while len(joined.server.recv(10, socket.MSG_PEEK)) < 10:
        pass
    joined.server.sendall(b"413")
    assert joined.client.recv(3) == b"413"
    joined.server.close()
    with pytest.raises(ConnectionResetError):
        joined.client.recv(1)
    assert joined.over.wait(DEADLINE_S)
    assert joined.ends[0][1:] == (3, End.RESET_BY_B)


def test_abort_resets_both_sides(joined: Joined) -> None:
    joined.loop.call_threadsafe(joined.splice.abort)
    for sock in (joined.client, joined.server):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert joined.over.wait(DEADLINE_S)
    joined.loop.call_threadsafe(joined.splice.abort)
    assert [end[2] for end in joined.ends] == [End.ABORTED]


def test_bytes_read_before_come_first() -> None:
    it = Joined(to_b=b"early ", to_a=b"hello ")
    try:
        it.client.sendall(b"late")
        it.client.shutdown(socket.SHUT_WR)
        assert read_all(it.server) == b"early late"
        it.server.sendall(b"world")
        it.server.close()
        assert read_all(it.client) == b"hello world"
    finally:
        it.close()


def test_a_slow_reader_gets_every_byte_in_order(joined: Joined) -> None:
    sent = bytes(range(256)) * 4096 * 16  # 16 MiB
    writer = threading.Thread(target=lambda: (joined.client.sendall(sent), joined.client.shutdown(socket.SHUT_WR)))
    writer.start()
    got = bytearray()
    while part := joined.server.recv(7919):
        got += part
    writer.join(DEADLINE_S)
    assert got == sent


def test_both_directions_full_at_once_lose_nothing(joined: Joined) -> None:
    sent = {"client": b"c" * (8 << 20), "server": b"s" * (8 << 20)}
    got: dict[str, bytes] = {}

    def write(who: str) -> None:
        sock: socket.socket = getattr(joined, who)
        sock.sendall(sent[who])
        sock.shutdown(socket.SHUT_WR)

    def read(who: str) -> None:
        got[who] = read_all(getattr(joined, who))

    threads = [threading.Thread(target=f, args=(w,)) for f in (write, read) for w in ("client", "server")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert got == {"client": sent["server"], "server": sent["client"]}
    assert joined.over.wait(DEADLINE_S)
    assert joined.ends == [(8 << 20, 8 << 20, End.CLOSED)]


def test_an_unread_stream_is_held_back_and_memory_stays_bounded(joined: Joined) -> None:
    joined.client.settimeout(0.3)
    accepted = 0
    with pytest.raises(TimeoutError):
        while True:
            accepted += joined.client.send(b"x" * QUANTUM_BYTES)
    held = joined.splice._b.pending
    assert held is not None and 0 < len(held) <= BULK_BYTES
    assert accepted < 64 << 20  # the kernel's own buffers of two connections, not a stream


def test_rst_is_seen_while_nothing_is_read_from_that_side(joined: Joined) -> None:
    joined.client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        while True:
            joined.client.send(b"x" * QUANTUM_BYTES)
    joined.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    joined.client.close()
    assert joined.over.wait(DEADLINE_S)
    assert joined.ends[0][2] is End.RESET_BY_A
