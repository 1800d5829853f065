"""A node for tests of kernel/: namespaces, foreign rules, and a process that takes what is intercepted.

           far 192.0.2.2
               |  veth (default route)
+--------------+--------------------------------------- node -+
|  br0 172.17.0.1/16 fd00:17::1/64          10.244.9.1 (veth) |
|   |            |                               |            |
+---+------------+-------------------------------+------------+
 client        endpoint                        routed
 172.17.0.2    172.17.0.3                      10.244.9.2 (no bridge)
 fd00:17::2    fd00:17::3                      fd00:9::2
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from isthmus.kernel.intake import Intake
from isthmus.kernel.interception import Interception
from isthmus.kernel.original_destination import Method, reader
from isthmus.kernel.sockets import client_socket, peer_of, transparent_listener
from isthmus.model.marks import FROM_CLIENT
from isthmus.model.settings import Backend, InterceptSettings, OriginalDestination
from isthmus.plan.interception import (
    Handover,
    Ignored,
    InterceptionPlan,
    Preserved,
    plan_interception,
)

SERVICE_RANGES = ("10.96.0.0/12", "fd00:10:96::/112")
VIRTUAL_RANGES = ("240.96.0.0/16", "fd00:a9fe:6011::/112")
IGNORED = {
    "10.96.0.1": Ignored("default", "kubernetes", "left to the cluster"),
    "fd00:10:96::1": Ignored("default", "kubernetes", "left to the cluster"),
    "10.96.0.10": Ignored("kube-system", "kube-dns", "left to the cluster"),
    "fd00:10:96::10": Ignored("kube-system", "kube-dns", "left to the cluster"),
}
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_fork = multiprocessing.get_context("fork")


def enter(namespace: str) -> None:
    """Move the calling thread into a named network namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"entering {namespace}")


def inside(namespace: str, act: Callable[[], Any]) -> Any:
    """``act()`` on a thread of its own in the namespace: for sockets, which stay where they were made."""
    result: list[Any] = []

    def body() -> None:
        try:
            enter(namespace)
            result.append(act())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def child(namespace: str, act: Callable[[], Any]) -> Any:
    """``act()`` in a forked process in the namespace: for what reads /proc or runs tools. The result is pickled."""
    ours, theirs = _fork.Pipe()

    def body() -> None:
        try:
            enter(namespace)
            theirs.send(act())
        except BaseException as error:
            theirs.send(error)

    process = _fork.Process(target=body)
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    finally:
        process.join(10)
    if isinstance(result, BaseException):
        raise result
    return result


def sh(command: str, namespace: str = "", text: str | None = None) -> str:
    """Run a command line; its output. Fails with what it said."""
    words = (["ip", "netns", "exec", namespace] if namespace else []) + ["sh", "-ec", command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Node:
    """The namespaces of one node, and our interception in it."""

    def __init__(self, tag: str, state_dir: Path) -> None:
        start = f"kern-{os.getpid() % 0x10000:x}{tag}"
        self.node, self.client, self.endpoint, self.routed, self.far = (
            f"{start}-{name}" for name in ("node", "client", "end", "routed", "far")
        )
        self.state_dir = state_dir
        self._processes: list[Any] = []
        self.foreign = ""

    def up(self) -> None:
        for name in (self.node, self.client, self.endpoint, self.routed, self.far):
            sh(f"ip netns add {name}; ip -n {name} link set lo up")
            sh("sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0", name)
        sh(
            """
            sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
            ip link add br0 address 02:42:ac:11:00:01 type bridge; ip link set br0 up
            ip addr add 172.17.0.1/16 dev br0; ip addr add fd00:17::1/64 dev br0 nodad
            """,
            self.node,
        )
        self._pod(self.client, "172.17.0.2/16", "fd00:17::2/64", "172.17.0.1", "fd00:17::1", bridge=True)
        self._pod(self.endpoint, "172.17.0.3/16", "fd00:17::3/64", "172.17.0.1", "fd00:17::1", bridge=True)
        self._pod(self.routed, "10.244.9.2/24", "fd00:9::2/64", "10.244.9.1", "fd00:9::1", bridge=False)
        self._pod(self.far, "192.0.2.2/24", "fd00:c0::2/64", "192.0.2.1", "fd00:c0::1", bridge=False)
        sh("ip route add default via 192.0.2.2; ip -6 route add default via fd00:c0::2", self.node)

    def _pod(self, name: str, v4: str, v6: str, gateway4: str, gateway6: str, *, bridge: bool) -> None:
        device = name.rsplit("-", 1)[1]
        sh(
            f"""
            ip -n {self.node} link add {device} type veth peer name eth0 netns {name}
            ip -n {self.node} link set {device} up {"master br0" if bridge else ""}
            ip -n {name} link set eth0 up
            ip -n {name} addr add {v4} dev eth0; ip -n {name} addr add {v6} dev eth0 nodad
            """
        )
        if not bridge:
            length4, length6 = v4.split("/")[1], v6.split("/")[1]
            sh(
                f"ip addr add {gateway4}/{length4} dev {device}; ip addr add {gateway6}/{length6} dev {device} nodad",
                self.node,
            )
        sh(f"ip route add default via {gateway4}; ip -6 route add default via {gateway6}", name)

    def down(self) -> None:
        self.stop()
        for name in (self.node, self.client, self.endpoint, self.routed, self.far):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def stop(self) -> None:
        """End the processes of this node."""
        for process in self._processes:
            process.kill()
            process.join(5)
        self._processes.clear()

    def interception(self, settings: InterceptSettings) -> Interception:
        """Only for use within ``child(self.node, ...)``."""
        return Interception(settings, self.state_dir, "boot")

    def plan(
        self,
        settings: InterceptSettings,
        ignored: dict[str, Ignored] | None = None,
        preserved: tuple[Preserved, ...] = (),
    ) -> InterceptionPlan:
        """Only for use within ``child(self.node, ...)``."""
        return plan_interception(
            settings,
            VIRTUAL_RANGES,
            IGNORED if ignored is None else ignored,
            preserved,
            ("192.0.2.1", "172.17.0.1", "fd00:17::1"),
            self.interception(settings).capabilities(),
        )

    def apply(self, settings: InterceptSettings, **plan: Any) -> tuple[str, ...]:
        """Apply from a new process, as after a restart; what was changed."""
        return child(self.node, lambda: self.interception(settings).apply(self.plan(settings, **plan)).changed)

    def remove(self, settings: InterceptSettings) -> tuple[str, ...]:
        return child(self.node, lambda: self.interception(settings).remove().changed)

    def start(self, namespace: str, serve: Callable[[Callable[[], None]], None]) -> None:
        """Run ``serve(ready)`` in a process in the namespace; returns when it has said that it is ready."""
        ours, theirs = _fork.Pipe()

        def body() -> None:
            enter(namespace)
            serve(lambda: theirs.send("ready"))

        process = _fork.Process(target=body, daemon=True)
        process.start()
        self._processes.append(process)
        assert ours.poll(10) and ours.recv() == "ready"

    def start_taker(self, method: Method = Method.GETSOCKOPT, *, preserve_to: int = 0) -> None:
        """The process that the rules lead to: it says what it has learnt of each connection and datagram."""
        self.start(self.node, lambda ready: take(ready, method, preserve_to))


def settings(backend: Backend, handover: Handover, **more: Any) -> InterceptSettings:
    """Settings of a test case."""
    original = OriginalDestination.TPROXY if handover is Handover.TPROXY else OriginalDestination.AUTO
    return InterceptSettings(service_cidrs=SERVICE_RANGES, backend=backend, original_destination=original, **more)


def take(ready: Callable[[], None], method: Method, preserve_to: int) -> None:
    """Serve TCP and UDP on both interception addresses until killed."""
    defaults = InterceptSettings()
    listeners = {}
    intakes = {}
    poller = select.epoll()
    for address in (defaults.address_v4, defaults.address_v6):
        listener = transparent_listener(address, defaults.port)
        listeners[listener.fileno()] = listener, reader(method, {(address, defaults.port)})
        intake = Intake(address, defaults.port)
        intakes[intake.fileno()] = intake
        poller.register(listener, select.EPOLLIN)
        poller.register(intake, select.EPOLLIN)
    ready()
    while True:
        for fd, _events in poller.poll():
            if fd in intakes:
                _answer_datagram(intakes[fd])
            else:
                listener, read = listeners[fd]
                connection, name = listener.accept()
                with connection:
                    _answer_connection(connection, peer_of(name), read(connection), preserve_to)


def _answer_datagram(intake: Intake) -> None:
    received = intake.receive()
    if received is not None:
        payload, flow = received
        answer = {"client": flow.client, "destination": flow.destination, "payload": payload.decode()}
        intake.reply(flow, json.dumps(answer).encode())


def _answer_connection(connection: socket.socket, client: Any, destination: Any, preserve_to: int) -> None:
    answer: dict[str, Any] = {"client": client, "destination": destination}
    if preserve_to:
        answer["endpoint"] = _from_the_client(client, preserve_to)
    connection.setblocking(True)
    connection.sendall(json.dumps(answer).encode())
    connection.shutdown(socket.SHUT_WR)


def _from_the_client(client: tuple[str, int], port: int) -> str:
    """What the endpoint says to a connection that comes from the client's own address."""
    with client_socket(client) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, FROM_CLIENT)
        sock.settimeout(3)
        try:
            sock.connect(("fd00:17::3" if ":" in client[0] else "172.17.0.3", port))
            return read_all(sock)
        except OSError as error:
            return f"failed: {error}"


def read_all(sock: socket.socket) -> str:
    """Everything until the end of the stream."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts).decode()


def ask_tcp(namespace: str, address: str, port: int, timeout_s: float = 3.0) -> Any:
    """Connect from a namespace and return the answer, with the connection's own name as ``me``."""

    def act() -> Any:
        with socket.create_connection((address, port), timeout=timeout_s) as sock:
            answer = read_all(sock)
            return {**json.loads(answer), "me": list(peer_of(sock.getsockname()))}

    return inside(namespace, act)


def ask_udp(namespace: str, address: str, port: int, payload: str = "hello", timeout_s: float = 3.0) -> Any:
    """The same with one datagram; a connected socket, so that only an answer from the right address counts."""

    def act() -> Any:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect((address, port))
            sock.send(payload.encode())
            return {**json.loads(sock.recv(65536)), "me": list(peer_of(sock.getsockname()))}

    return inside(namespace, act)


def serve_name(ready: Callable[[], None], name: str, port: int) -> None:
    """Answer every TCP connection and datagram with a name and the peer's address, both families, until killed."""
    poller = select.epoll()
    socks: dict[int, socket.socket] = {}
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen(128)
        socks[sock.fileno()] = sock
        poller.register(sock, select.EPOLLIN)
    ready()
    while True:
        for fd, _events in poller.poll():
            sock = socks[fd]
            if sock.type == socket.SOCK_STREAM:
                connection, peer = sock.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"name": name, "client": _plain(peer)}).encode())
            else:
                _, peer = sock.recvfrom(65536)
                sock.sendto(json.dumps({"name": name, "client": _plain(peer)}).encode(), peer)


def _plain(peer: tuple[Any, ...]) -> tuple[str, int]:
    return peer[0].removeprefix("::ffff:"), peer[1]


@contextlib.contextmanager
def running_node(tag: str, state_dir: Path) -> Iterator[Node]:
    """A node for the time of a test."""
    node = Node(tag, state_dir)
    try:
        node.up()
        yield node
    finally:
        node.down()


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 6.0) -> None:
    """Poll every 100 ms."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.1)
