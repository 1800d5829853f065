"""10,000 services with 50,000 endpoints: how soon one change is effective, and what start and memory cost.

A real agent in a namespace. A change is a manifest renamed into the store; it is effective when a connection to the
service's address reaches the new endpoint, and when DNS answers with it. Both are asked for every millisecond.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dns.message
import dns.rdatatype
from pyroute2 import netns

from bench.harness import Row

SPACE = "bench-scale"
SIZES = (100, 10_000)
ENDPOINTS = 5
PER_FILE = 100
CHANGES = 11
PROXIED, NAMED = "10.96.0.10", "named.watched.svc.cluster.local"
HOME = "172.17.0.1"
PORTS = (9001, 9002)
PROCESSES = {"isthmus.dns.worker": "dns", "isthmus.agent.data_worker": "data", "agent": "control"}
ADDRESSES = ("172.17.9.1", "172.17.9.2")

SERVER = f"""
import socket
from selectors import *
chosen = DefaultSelector()
for port in {PORTS}:
    s = socket.create_server(("{HOME}", port), backlog=512)
    chosen.register(s, EVENT_READ, str(port).encode())
while True:
    for key, _ in chosen.select():
        c, _ = key.fileobj.accept(); c.sendall(key.data); c.close()
"""


def _service(
    namespace: str, name: str, ip: str, port: int, endpoints: list[tuple[str, str]]
) -> list[dict[str, object]]:
    ports = [{"name": "http", "port": port, "protocol": "TCP"}]
    meta = {"name": f"{name}-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": name}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
    }
    piece = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": meta,
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [{"addresses": [address], "nodeName": node} for node, address in endpoints],
    }
    return [service, piece]


def _write(path: Path, documents: list[dict[str, object]]) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text("\n---\n".join(json.dumps(document, indent=1) for document in documents) + "\n")
    fresh.rename(path)


def fill(store: Path, services: int) -> None:
    """Write ``services`` services with five endpoints each on some hundred nodes, a hundred services a file."""
    for first in range(0, services, PER_FILE):
        documents: list[dict[str, object]] = []
        for number in range(first, first + PER_FILE):
            ip = f"10.{100 + number // 65_536}.{number // 256 % 256}.{number % 256}"
            endpoints = [
                (f"node-{(number + each) % 100}", f"10.{200 + each}.{number // 256 % 256}.{number % 256}")
                for each in range(ENDPOINTS)
            ]
            documents += _service(f"team-{number % 50}", f"service-{number}", ip, 8080, endpoints)
        _write(store / f"services-{first:06}.yaml", documents)


def point(store: Path, turn: int) -> None:
    """Point the two watched services at the other endpoint."""
    _write(store / "proxied.yaml", _service("watched", "proxied", PROXIED, PORTS[turn % 2], [("n1", HOME)]))
    _write(store / "named.yaml", _service("watched", "named", "None", 80, [("n1", ADDRESSES[turn % 2])]))


def _run(*command: str) -> None:
    subprocess.run(["ip", "netns", "exec", SPACE, *command], check=True)


@contextmanager
def namespace() -> Iterator[None]:
    """A network namespace with a bridge that everything is routed to."""
    subprocess.run(["ip", "netns", "del", SPACE], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "add", SPACE], check=True)
    try:
        for line in ("link set lo up", "link add br0 type bridge", "addr add 172.17.0.1/16 dev br0", "link set br0 up"):
            _run("ip", *line.split())
        _run("ip", "route", "add", "default", "dev", "br0")
        yield
    finally:
        subprocess.run(["ip", "netns", "del", SPACE], check=False)


@contextmanager
def agent(directory: Path) -> Iterator[float]:
    """An agent on ``directory``'s store; yields the seconds until it was ready."""
    settings = {
        "node": "n1",
        "store": str(directory / "store"),
        "state-directory": str(directory / "state"),
        "run-directory": str(directory / "run"),
        "intercept": {"service-cidrs": ["10.96.0.0/12"]},
    }
    (directory / "agent.yaml").write_text(json.dumps(settings))
    start_s = time.monotonic()
    process = subprocess.Popen(
        ["ip", "netns", "exec", SPACE, sys.executable, "-m", "isthmus", "agent", "-c", str(directory / "agent.yaml")],
        stderr=(directory / "log").open("wb"),
    )
    server = subprocess.Popen(["ip", "netns", "exec", SPACE, sys.executable, "-c", SERVER])
    try:
        until(lambda: (directory / "run" / "agent.sock").exists(), 120)
        yield time.monotonic() - start_s
    finally:
        for each in (process, server):
            each.terminate()
            each.wait(20)


def until(condition: Callable[[], bool], deadline_s: float = 10.0, every_s: float = 0.001) -> float:
    """Seconds until ``condition`` holds."""
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > deadline_s:
            raise RuntimeError(f"not within {deadline_s} s")
        time.sleep(every_s)
    return time.monotonic() - start_s


@contextmanager
def inside() -> Iterator[None]:
    """This thread, in the namespace: sockets made meanwhile belong to it."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    netns.setns(SPACE)
    try:
        yield
    finally:
        netns.setns(home)
        os.close(home)


def reached() -> bytes:
    """Which endpoint a connection to the service reaches, b'' for none."""
    with inside():
        sock = socket.socket()
    with sock, suppress(OSError):
        sock.settimeout(1)
        sock.connect((PROXIED, 80))
        return sock.recv(16)
    return b""


class Resolver:
    """Asks the agent's DNS for one name, with one socket."""

    def __init__(self) -> None:
        with inside():
            self._socket = socket.socket(type=socket.SOCK_DGRAM)
        self._socket.settimeout(1)
        self._question = dns.message.make_query(NAMED, dns.rdatatype.A).to_wire()

    def answer(self) -> str:
        """The address of the watched name, '' for none."""
        with suppress(OSError):
            self._socket.sendto(self._question, ("169.254.96.16", 53))
            reply = dns.message.from_wire(self._socket.recv(4096))
            return next((item.address for found in reply.answer for item in found), "")
        return ""


def memory_mib() -> dict[str, float]:
    """Proportional set size of the agent's processes, by name."""
    found: dict[str, float] = {}
    for pid in netns_pids():
        with suppress(OSError, StopIteration):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            name = next(name for mark, name in PROCESSES.items() if mark in command)
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            pss_kib = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
            found[name] = found.get(name, 0.0) + pss_kib / 1024
    return found


def netns_pids() -> list[int]:
    """The processes in the namespace."""
    listed = subprocess.run(["ip", "netns", "pids", SPACE], capture_output=True, text=True, check=True)
    return [int(text) for text in listed.stdout.split()]


def measure(services: int) -> tuple[float, list[float], list[float], dict[str, float]]:
    """Cold start in seconds; milliseconds until a change is effective in the proxy and in DNS; memory."""
    with tempfile.TemporaryDirectory() as name, namespace():
        directory = Path(name)
        (directory / "store").mkdir()
        fill(directory / "store", services)
        point(directory / "store", 0)
        with agent(directory) as start_s:
            resolver = Resolver()
            until(lambda: reached() == str(PORTS[0]).encode())
            proxied, named = [], []
            for turn in range(1, CHANGES + 1):
                point(directory / "store", turn)
                proxied.append(1e3 * until(lambda turn=turn: reached() == str(PORTS[turn % 2]).encode()))  # type: ignore[misc]
                until(lambda turn=turn: resolver.answer() == ADDRESSES[turn % 2])  # type: ignore[misc]
                fresh = (turn + 1) % 2
                _write(
                    directory / "store" / "named.yaml",
                    _service("watched", "named", "None", 80, [("n1", ADDRESSES[fresh])]),
                )
                named.append(1e3 * until(lambda fresh=fresh: resolver.answer() == ADDRESSES[fresh]))  # type: ignore[misc]
            return start_s, proxied, named, memory_mib()


def rows() -> Iterator[Row]:
    """The figures of both sizes, and how they compare."""
    found = {size: measure(size) for size in SIZES}
    for size, (_, proxied, named, _) in found.items():
        for what, times in (("reaches the new endpoint", proxied), ("is answered by DNS", named)):
            text = f"slowest of {len(times)}: {max(times):.0f} ms"
            yield Row(f"{size:,} services: a change {what}, ms", statistics.median(times), text, 100, at_most=True)
    small, large = (statistics.median(found[size][1]) for size in SIZES)
    yield Row("the same change, 10,000 services against 100", large / small, "medians", 1.5, at_most=True)
    start_s, _, _, memory = found[SIZES[-1]]
    text = ", ".join(f"{name} {mib:.0f}" for name, mib in sorted(memory.items()))
    yield Row("10,000 services: cold start, s", start_s, f"100 services: {found[SIZES[0]][0]:.1f} s")
    yield Row("10,000 services: memory, MiB", sum(memory.values()), f"{text} (proportional set size)")
