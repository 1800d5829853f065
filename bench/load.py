"""Load for bench/link.py, one process a role: ``server``, or a client that prints one JSON line.

load.py server ADDRESS PORT         PORT: sink, PORT+1: kept request and response, PORT+2: one request a connection
load.py bulk ADDRESS PORT STREAMS SECONDS
load.py requests ADDRESS PORT CONNECTIONS SECONDS
load.py connections ADDRESS PORT CLIENTS SECONDS
load.py latency ADDRESS PORT SECONDS
"""

import json
import select
import socket
import sys
import threading
import time

CHUNK = 256 * 1024
REQUEST = b"GET / HTTP/1.1\r\nHost: web.shop.svc.cluster.local\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 128\r\nContent-Type: text/plain\r\n\r\n" + b"x" * 128


def connect(address: str, port: int) -> socket.socket:
    sock = socket.create_connection((address, port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def server(address: str, port: int) -> None:
    """Serve all three ports until killed."""
    threading.Thread(target=discard, args=(address, port), daemon=True).start()
    answer(address, port)


def discard(address: str, port: int) -> None:
    """Take what comes and throw it away in the kernel (MSG_TRUNC), so that the reader's copy limits nobody."""
    epoll = select.epoll()
    listener = socket.create_server((address, port), backlog=512)
    epoll.register(listener.fileno(), select.EPOLLIN)
    socks: dict[int, socket.socket] = {}
    buffer = bytearray(4 * CHUNK)
    while True:
        for fd, _ in epoll.poll():
            if fd == listener.fileno():
                sock = listener.accept()[0]
                socks[sock.fileno()] = sock
                epoll.register(sock.fileno(), select.EPOLLIN)
                continue
            try:
                more = socks[fd].recv_into(buffer, len(buffer), socket.MSG_TRUNC | socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                more = 0
            if not more:
                socks.pop(fd).close()


def answer(address: str, port: int) -> None:
    """Requests on kept and on new connections, one epoll loop."""
    epoll = select.epoll()
    kept, fresh = (socket.create_server((address, port + n), backlog=4096) for n in (1, 2))
    socks: dict[int, socket.socket] = {}
    once: set[int] = set()
    for listener in (kept, fresh):
        listener.setblocking(False)
        epoll.register(listener.fileno(), select.EPOLLIN)
    print("ready", flush=True)
    while True:
        for fd, _ in epoll.poll():
            if fd == kept.fileno() or fd == fresh.fileno():
                try:
                    sock, _ = (kept if fd == kept.fileno() else fresh).accept()
                except BlockingIOError:
                    continue
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                socks[sock.fileno()] = sock
                if fd == fresh.fileno():
                    once.add(sock.fileno())
                epoll.register(sock.fileno(), select.EPOLLIN)
                continue
            sock = socks[fd]
            try:
                data = sock.recv(4096)
                if data:
                    sock.send(RESPONSE)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data or fd in once:
                once.discard(fd)
                del socks[fd]
                sock.close()


def bulk(address: str, port: int, streams: int, seconds: float) -> dict[str, float]:
    """Gbit/s towards the sink, all streams together, sent by one thread."""
    chunk = memoryview(b"z" * CHUNK)
    epoll = select.epoll()
    socks = {}
    for _ in range(streams):
        sock = connect(address, port)
        socks[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLOUT)
    total, start = 0, time.monotonic()
    until = start + seconds
    while time.monotonic() < until:
        for fd, _ in epoll.poll():
            try:
                total += socks[fd].send(chunk, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
    return {"value": total * 8 / (time.monotonic() - start) / 1e9}


def requests(address: str, port: int, connections: int, seconds: float) -> dict[str, float]:
    """Requests a second over kept connections, one outstanding on each."""
    epoll = select.epoll()
    socks = {}
    for _ in range(connections):
        sock = connect(address, port + 1)
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLIN)
        sock.send(REQUEST)
    done = 0
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        for fd, _ in epoll.poll():
            if not socks[fd].recv(4096):
                raise SystemExit("closed by the server")
            done += 1
            socks[fd].send(REQUEST)
    return {"value": done / (time.monotonic() - start)}


def connections(address: str, port: int, clients: int, seconds: float) -> dict[str, float]:
    """Connections a second: connect, one request, one response, close; ``clients`` at a time."""
    epoll = select.epoll()
    socks: dict[int, socket.socket] = {}
    done = failed = 0

    def begin() -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((address, port + 2))
        socks[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLOUT)

    for _ in range(clients):
        begin()
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        for fd, events in epoll.poll(1.0):
            sock = socks[fd]
            try:
                if events & select.EPOLLOUT:
                    sock.send(REQUEST)
                    epoll.modify(fd, select.EPOLLIN)
                    continue
                ok = bool(sock.recv(4096))
            except OSError:
                ok = False
            done += ok
            failed += not ok
            del socks[fd]
            sock.close()
            begin()
    return {"value": done / (time.monotonic() - start), "failed": failed}


def latency(address: str, port: int, seconds: float) -> dict[str, float]:
    """Microseconds of a request on a kept connection, one every two milliseconds: median, p99 and worst."""
    sock = connect(address, port + 1)
    times = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        start = time.perf_counter()
        sock.send(REQUEST)
        sock.recv(4096)
        times.append((time.perf_counter() - start) * 1e6)
        time.sleep(0.002)
    times.sort()
    return {
        "value": times[len(times) // 2],
        "p99": times[int(len(times) * 0.99)],
        "most": times[-1],
        "requests": len(times),
    }


def main() -> None:
    role, address, port, *rest = sys.argv[1:]
    match role:
        case "server":
            server(address, int(port))
        case "latency":
            print(json.dumps(latency(address, int(port), float(rest[0]))))
        case _:
            run = {"bulk": bulk, "requests": requests, "connections": connections}[role]
            print(json.dumps(run(address, int(port), int(rest[0]), float(rest[1]))))


if __name__ == "__main__":
    main()
