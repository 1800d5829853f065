"""A minimal data worker for tests and measurements of links: plain accept, Link, plain connect. One JSON argument.

    {"node": "a", "port": 20006, "files": [CA, CERTIFICATE, KEY], "peers": {"b": [["direct", "127.0.0.1:20007", ""]]},
     "listen": [["127.0.0.1", 4000, "b", "127.0.0.1", 5000]]}

Each ``listen`` entry is an address and port to accept on, and the node and endpoint its connections are carried to.
Prints one JSON line when ready; then a line of counters and links for each line that it reads.
"""

import errno
import json
import os
import socket
import sys
from collections.abc import Callable

from isthmus.link.link import Link
from isthmus.loop.loop import GONE, READ, WRITE, Loop
from isthmus.model.ports import DatagramEndpoint, Outcome, StreamRequest
from isthmus.wire.worker import Credentials, PathSpec, PutPeer


class PlainUdp:
    """A connected UDP socket on the loop."""

    def __init__(self, loop: Loop, address: tuple[str, int], received: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._received = received
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.connect(address)
        loop.add(self._sock.fileno(), READ, self._ready)

    def _ready(self, _events: int) -> None:
        try:
            self._received(self._sock.recv(65_536))
        except OSError:
            pass

    def send(self, payload: bytes) -> None:
        try:
            self._sock.send(payload)
        except OSError:
            pass

    def close(self) -> None:
        self._loop.discard(self._sock)


class PlainConnector:
    """Connects to whatever is asked for."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def connect(
        self, peer: str, request: StreamRequest, done: Callable[[Outcome, socket.socket | None, str], None]
    ) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex((request.address, request.port))
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            done(Outcome.REFUSED, None, os.strerror(code))
            return

        def connected(events: int) -> None:
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & GONE else 0
            self._loop.remove(sock.fileno())
            if code:
                sock.close()
                done(Outcome.REFUSED, None, os.strerror(code))
            else:
                done(Outcome.OPENED, sock, "")

        self._loop.add(sock.fileno(), WRITE, connected)

    def open_datagrams(
        self, peer: str, request: StreamRequest, received: Callable[[bytes], None]
    ) -> tuple[Outcome, DatagramEndpoint | None, str]:
        return Outcome.OPENED, PlainUdp(self._loop, (request.address, request.port), received), ""


def listen(loop: Loop, link: Link, entry: list[object]) -> None:
    """Accept on an address; carry to a node's endpoint; reset the client where that fails."""
    host, port, node, address, endpoint_port = entry
    listener = socket.create_server((str(host), int(str(port))), backlog=4096, reuse_port=False)
    listener.setblocking(False)
    request = StreamRequest("bench", "bench", str(address), int(str(endpoint_port)))

    def accept(_events: int) -> None:
        for _ in range(64):
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.carrier.carry(
                str(node), request, client, lambda outcome, _detail, c=client: answered(outcome, c), lambda _a, _b: None
            )

    def answered(outcome: Outcome, client: socket.socket) -> None:
        if outcome is not Outcome.OPENED:
            client.close()

    loop.add(listener.fileno(), READ, accept)


def main() -> None:
    spec = json.loads(sys.argv[1])
    loop = Loop()
    link = Link(loop, lambda _message: None, PlainConnector(loop), port=spec["port"])
    link.handle(Credentials(*spec["files"]))
    port = link.start()
    for node, paths in spec.get("peers", {}).items():
        link.handle(PutPeer(node, tuple(PathSpec(*path) for path in paths)))
    for entry in spec.get("listen", []):
        listen(loop, link, entry)
    print(json.dumps({"port": port}), flush=True)

    def asked(_events: int) -> None:
        if not sys.stdin.readline():
            loop.stop()
            return
        print(json.dumps({"counters": link.counters(), "links": link.links(), "paths": link.paths()}), flush=True)

    loop.add(sys.stdin.fileno(), READ, asked)
    loop.run()
    link.stop()


if __name__ == "__main__":
    main()
