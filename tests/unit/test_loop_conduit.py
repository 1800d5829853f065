"""What goes through the pipe comes out whole and in order, however little the other side takes."""

import hashlib
import random
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from isthmus.loop.conduit import PIPE_BYTES, Conduit


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
    return near, far


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket, socket.socket, socket.socket]]:
    """(client, a, b, server): a is what the proxy accepted, b what it connected."""
    (client, a), (b, server) = tcp_pair(), tcp_pair()
    yield client, a, b, server
    for sock in (client, a, b, server):
        sock.close()


def test_a_stream_passes_whole_through_a_receiver_that_stalls(
    ends: tuple[socket.socket, socket.socket, socket.socket, socket.socket],
) -> None:
    client, a, b, server = ends
    conduit, rng = Conduit(), random.Random(7)
    data = rng.randbytes(24 << 20)
    sent, held, got = 0, b"", hashlib.sha256()
    received, stalls = 0, 0
    while received < len(data):
        with suppress(BlockingIOError):
            sent += client.send(data[sent : sent + (1 << 20)])
        if held:
            with suppress(BlockingIOError):
                held = held[b.send(held) :]
        else:
            with suppress(BlockingIOError):
                held = conduit.move(a.fileno(), b.fileno(), PIPE_BYTES).rest
                stalls += bool(held)
        if held or rng.random() < 0.3:  # the receiver reads seldom, so that its socket fills
            with suppress(BlockingIOError):
                part = server.recv(rng.randrange(1, 1 << 20))
                received += len(part)
                got.update(part)
    assert got.digest() == hashlib.sha256(data).digest()
    assert stalls, "the case that the test is for did not come up"
    conduit.close()


def test_an_empty_source_an_ended_one_and_a_dead_target_are_told_apart(
    ends: tuple[socket.socket, socket.socket, socket.socket, socket.socket],
) -> None:
    client, a, b, server = ends
    conduit = Conduit()
    with pytest.raises(BlockingIOError):
        conduit.move(a.fileno(), b.fileno(), 1000)
    server.close()
    b.shutdown(socket.SHUT_WR)
    client.send(b"lost")
    moved = conduit.move(a.fileno(), b.fileno(), 1000)
    assert (moved.taken, moved.rest) == (4, b"lost")
    assert isinstance(moved.error, BrokenPipeError)
    client.close()
    assert conduit.move(a.fileno(), b.fileno(), 1000).taken == 0
    conduit.close()
