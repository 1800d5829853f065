"""A small server for pods of the lab: ``python -m isthmus.lab.server --pod NS/NAME --node NODE --http 80 --udp 9001``.

Every answer says who answered: a line of JSON with the pod, its node, the port and the client's address as seen here.

- HTTP: the line is the body, with method and path; connections are kept (HTTP/1.1).
- TCP: the line comes first, then everything received comes back, until the client has sent its end.
- UDP: the line, and after it the datagram received.

Standard library only, so that it starts in some ten milliseconds.
"""

import argparse
import asyncio
import contextlib
import json
import socket
from functools import partial
from typing import cast

_READ_BYTES = 65536


class Answerer:
    """Knows who it is, and says so."""

    def __init__(self, pod: str, node: str) -> None:
        self._self = {"pod": pod, "node": node}

    def line(self, port: int, client: object, **more: str) -> bytes:
        """Return the line of JSON for ``client``, a socket address of Python's."""
        host, number = (str(client[0]), int(client[1])) if isinstance(client, tuple) else ("", 0)
        return json.dumps({**self._self, "port": port, "client": host, "client-port": number, **more}).encode() + b"\n"

    async def http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer requests on one connection until it ends; a request's body is read and left."""
        port = writer.get_extra_info("sockname")[1]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, *_ = [*head[0].split(" "), "", ""]
                fields = {key.lower(): value.strip() for key, _, value in (each.partition(":") for each in head[1:])}
                await reader.readexactly(int(fields.get("content-length", "0")))
                body = self.line(port, writer.get_extra_info("peername"), method=method, path=path)
                keep = fields.get("connection", "").lower() != "close"
                writer.write(_response(body, keep))
                await writer.drain()
                if not keep:
                    break
        writer.close()

    async def tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Introduce, echo, and end when the client ends."""
        with contextlib.suppress(ConnectionError):
            writer.write(self.line(writer.get_extra_info("sockname")[1], writer.get_extra_info("peername")))
            while data := await reader.read(_READ_BYTES):
                writer.write(data)
                await writer.drain()
            await writer.drain()
        writer.close()


class UdpEcho(asyncio.DatagramProtocol):
    """Answers each datagram."""

    def __init__(self, answerer: Answerer, port: int) -> None:
        self._answerer = answerer
        self._port = port
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Python 3.11's own datagram transport is no instance of the class that its documentation promises.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self._transport is not None
        self._transport.sendto(self._answerer.line(self._port, addr) + data, addr)


def _response(body: bytes, keep: bool) -> bytes:
    connection = "keep-alive" if keep else "close"
    fields = ("Content-Type: application/json", f"Content-Length: {len(body)}", f"Connection: {connection}")
    return "\r\n".join(("HTTP/1.1 200 OK", *fields, "", "")).encode() + body


def _udp_socket(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    endpoint = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        endpoint.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    endpoint.setblocking(False)
    endpoint.bind((host, port))
    return endpoint


async def serve(answerer: Answerer, http: list[int], tcp: list[int], udp: list[int]) -> None:
    """Listen on all addresses of both families, and serve until cancelled."""
    loop = asyncio.get_running_loop()
    for port in http:
        await asyncio.start_server(answerer.http, None, port, backlog=4096)
    for port in tcp:
        await asyncio.start_server(answerer.tcp, None, port, backlog=4096)
    for port in udp:
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            endpoint = _udp_socket(family, host, port)
            await loop.create_datagram_endpoint(partial(UdpEcho, answerer, port), sock=endpoint)
    await asyncio.Event().wait()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="isthmus.lab.server")
    parser.add_argument("--pod", required=True)
    parser.add_argument("--node", required=True)
    for kind in ("http", "tcp", "udp"):
        parser.add_argument(f"--{kind}", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(Answerer(arguments.pod, arguments.node), arguments.http, arguments.tcp, arguments.udp))


if __name__ == "__main__":
    main()
