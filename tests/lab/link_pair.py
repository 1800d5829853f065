"""Two real link endpoints in one process, on one loop in a thread, over loopback; and the sockets around them.

client ─> accept ─> Link "a" ══ TLS over 127.0.0.1 ══ Link "b" ─> endpoint
"""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from bench.linknode import PlainUdp

from isthmus.link.limits import LinkLimits
from isthmus.link.link import Link
from isthmus.loop.loop import GONE, WRITE, Loop
from isthmus.model.ports import DatagramEndpoint, Outcome, StreamRequest
from isthmus.wire import identity
from isthmus.wire.worker import Credentials, FromWorker, PathSpec, PutPeer

T = TypeVar("T")
DEADLINE_S = 6.0


def eventually(condition: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """The first true value of ``condition``; fails after the deadline."""
    until = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < until, "the condition did not come true"
        time.sleep(0.02)
    return value


class Issuer:
    """Certificates in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = identity.new_key()
        self.certificate = identity.new_authority("test", self.key, now_s=time.time())
        (directory / "ca.pem").write_bytes(identity.certificate_pem(self.certificate))
        self._number = 0

    def credentials(self, node: str, revoked: tuple[str, ...] = ()) -> Credentials:
        self._number += 1
        key = identity.new_key()
        holder = identity.Holder(identity.Role.NODE, node)
        certificate = identity.issue(self.certificate, self.key, key.public_key(), (holder,), now_s=time.time())
        stem = self.directory / f"{node}-{self._number}"
        Path(f"{stem}.pem").write_bytes(identity.certificate_pem(certificate))
        Path(f"{stem}.key").write_bytes(identity.key_pem(key))
        return Credentials(str(self.directory / "ca.pem"), f"{stem}.pem", f"{stem}.key", revoked)

    @staticmethod
    def serial(credentials: Credentials) -> str:
        return identity.serial_text(identity.load_certificate(Path(credentials.certificate_file).read_bytes()))


class Connector:
    """Reaches any address, except the service ``forbidden``."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.peers: list[str] = []

    def connect(
        self, peer: str, request: StreamRequest, done: Callable[[Outcome, socket.socket | None, str], None]
    ) -> None:
        self.peers.append(peer)
        if request.service == "forbidden":
            done(Outcome.NOT_ALLOWED, None, "not this node's")
            return
        sock = socket.socket()
        sock.setblocking(False)
        code = sock.connect_ex((request.address, request.port))

        def connected(events: int) -> None:
            failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & GONE else 0
            self._loop.remove(sock.fileno())
            if failed:
                sock.close()
                done(Outcome.REFUSED, None, os.strerror(failed))
            else:
                done(Outcome.OPENED, sock, "")

        assert code in (0, errno.EINPROGRESS)
        self._loop.add(sock.fileno(), WRITE, connected)

    def open_datagrams(
        self, peer: str, request: StreamRequest, received: Callable[[bytes], None]
    ) -> tuple[Outcome, DatagramEndpoint | None, str]:
        if request.service == "forbidden":
            return Outcome.NOT_ALLOWED, None, "not this node's"
        return Outcome.OPENED, PlainUdp(self._loop, (request.address, request.port), received), ""


class Stream:
    """A client's side of a carried stream, and what the carrier said about it."""

    def __init__(self) -> None:
        self.sock, self.inner = tcp_pair()
        self.outcome: tuple[Outcome, str] | None = None
        self.ended: tuple[int, int] | None = None
        self.sock.settimeout(DEADLINE_S)

    def opened(self, outcome: Outcome, detail: str) -> None:
        assert self.outcome is None, "opened is reported once"
        self.outcome = (outcome, detail)

    def end(self, to_endpoint: int, to_client: int) -> None:
        assert self.ended is None, "ended is reported once"
        self.ended = (to_endpoint, to_client)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection; the second is non-blocking, as accepted clients are."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outer = socket.create_connection(listener.getsockname())
        inner, _ = listener.accept()
    inner.setblocking(False)
    return outer, inner


class Node:
    """A Link and what it told its control process."""

    def __init__(self, name: str, loop: Loop, issuer: Issuer, limits: LinkLimits) -> None:
        self.name = name
        self.sent: list[FromWorker] = []
        self.connector = Connector(loop)
        self.link = Link(loop, self.sent.append, self.connector, port=0, limits=limits)
        self.credentials = issuer.credentials(name)
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


class World:
    """Nodes on one loop. ``call`` runs something on the loop's thread and returns its value."""

    def __init__(self, directory: Path, limits: LinkLimits) -> None:
        self.loop = Loop()
        self.issuer = Issuer(directory)
        self._limits = limits
        self.nodes: dict[str, Node] = {}
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        box: list[T] = []
        failed: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                box.append(function())
            except BaseException as error:
                failed.append(error)
            done.set()

        self.loop.call_threadsafe(run)
        assert done.wait(DEADLINE_S), "the loop does not answer"
        if failed:
            raise failed[0]
        return box[0]

    def node(self, name: str) -> Node:
        node = self.nodes[name] = Node(name, self.loop, self.issuer, self._limits)

        def start() -> int:
            node.link.handle(node.credentials)
            return node.link.start()

        node.port = self.call(start)
        return node

    def put_peer(self, node: Node, peer: str, *paths: PathSpec) -> None:
        self.call(lambda: node.link.handle(PutPeer(peer, paths)))

    def carry(self, node: Node, peer: str, port: int, service: str = "web") -> Stream:
        stream = Stream()
        request = StreamRequest("shop", service, "127.0.0.1", port)
        self.call(lambda: node.link.carrier.carry(peer, request, stream.inner, stream.opened, stream.end))
        return stream

    def open(self, node: Node, peer: str, port: int) -> Stream:
        """Carry, and see it opened."""
        stream = self.carry(node, peer, port)
        outcome = eventually(lambda: stream.outcome)
        assert outcome[0] is Outcome.OPENED, outcome
        return stream

    def stop(self) -> None:
        for node in self.nodes.values():
            self.call(node.link.stop)
        self.loop.stop()
        self._thread.join(DEADLINE_S)


@contextmanager
def world(directory: Path, limits: LinkLimits | None = None) -> Iterator[World]:
    made = World(directory, limits or LinkLimits(crew=1))
    try:
        yield made
    finally:
        made.stop()


class Endpoint:
    """A listening socket; ``accept`` gives the endpoint's side of the next stream."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.settimeout(DEADLINE_S)
        self.port: int = self._listener.getsockname()[1]

    def accept(self) -> socket.socket:
        sock, _ = self._listener.accept()
        sock.settimeout(DEADLINE_S)
        return sock

    def close(self) -> None:
        self._listener.close()
