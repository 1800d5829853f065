"""A node with pods in network namespaces, and the netfilter rules that intercept its service range.

    client pod 10.77.0.2 ──┐
                           ├── node: bridge 10.77.0.1 (or one routed veth a pod), 169.254.96.16 and fd00:a9fe:6010::16
    server pods .11, .12 ──┘         10.96.0.0/12 and fd00:96::/112 are intercepted (DNAT)

Used by the benchmarks and by tests/lab/test_proxy_*.py. Everything is named for this process and goes with ``close``.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from isthmus.plan.serving import ServicePlan

ROOT = Path(__file__).resolve().parent.parent
SERVICE_V4, SERVICE_V6 = "10.96.0.10", "fd00:96::10"
CLIENT, SERVERS = "10.77.0.2", ("10.77.0.11", "10.77.0.12")
CLIENT_V6, SERVERS_V6 = "fd00:77::2", ("fd00:77::11", "fd00:77::12")
NODE, NODE_V6 = "10.77.0.1", "fd00:77::1"
NOWHERE = "10.77.0.99"  # on the pods' network, held by nobody, its packets vanish

_RULES = """
table ip isthmus_bed {
  chain prerouting { type nat hook prerouting priority dstnat;
    ip daddr 10.96.0.0/12 meta l4proto { tcp, udp } dnat to 169.254.96.16:40001; }
}
table ip6 isthmus_bed {
  chain prerouting { type nat hook prerouting priority dstnat;
    ip6 daddr fd00:96::/112 meta l4proto { tcp, udp } dnat to [fd00:a9fe:6010::16]:40001; }
}
"""

Result = TypeVar("Result")
_libc = ctypes.CDLL(None, use_errno=True)


class Bed:
    """The namespaces. ``routed``: pods hang on routed veths, not on a bridge, so all their packets pass the node."""

    def __init__(self, prefix: str, *, routed: bool = False) -> None:
        self.prefix = f"{prefix}-{os.getpid()}"
        self.node, self.client = f"{self.prefix}-node", f"{self.prefix}-client"
        self.servers = tuple(f"{self.prefix}-server{at}" for at in (1, 2))
        self._processes: list[subprocess.Popen[Any]] = []
        try:
            self._build(routed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop what was started in it, remove the namespaces."""
        for process in self._processes:
            process.kill()
            process.wait()
        for name in (self.client, *self.servers, self.node):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def start(
        self, namespace: str, command: Sequence[str], *, cpu: int | None = None, **popen: Any
    ) -> "subprocess.Popen[Any]":
        """Start a command in a namespace, pinned to a processor if one is given; ended by ``close``."""
        pinned = ["taskset", "-c", str(cpu)] if cpu is not None else []
        process = subprocess.Popen(["ip", "netns", "exec", namespace, *pinned, *command], cwd=ROOT, **popen)
        self._processes.append(process)
        return process

    def run(
        self,
        namespace: str,
        command: Sequence[str],
        *,
        cpu: int | None = None,
        timeout_s: float = 60,
        check: bool = True,
    ) -> str:
        """Run a command in a namespace to its end; its standard output. With ``check``, CalledProcessError."""
        pinned = ["taskset", "-c", str(cpu)] if cpu is not None else []
        done = subprocess.run(
            ["ip", "netns", "exec", namespace, *pinned, *command],
            check=check, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        return done.stdout

    def inside(self, namespace: str, call: Callable[[], Result]) -> Result:
        """Call in a thread that has entered the namespace; sockets made there stay in it."""
        box: list[Result | BaseException] = []

        def enter() -> None:
            try:
                with open(f"/run/netns/{namespace}") as handle:
                    if _libc.setns(handle.fileno(), 0x4000_0000):
                        raise OSError(ctypes.get_errno(), f"entering {namespace}")
                box.append(call())
            except BaseException as error:  # handed to the caller's thread
                box.append(error)

        thread = threading.Thread(target=enter, name=f"in {namespace}")
        thread.start()
        thread.join()
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    def socket_in(self, namespace: str, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of that namespace."""
        return self.inside(namespace, lambda: socket.socket(family, kind))

    def _build(self, routed: bool) -> None:
        for name in (self.node, self.client, *self.servers):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        self.run(self.node, ["sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
        _ip("-n", self.node, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.node, "link", "set", "br0", "up")
        for address in ("169.254.96.16/32", "fd00:a9fe:6010::16/128", f"{NODE}/{32 if routed else 24}",
                        f"{NODE_V6}/{128 if routed else 64}"):  # fmt: skip
            _ip("-n", self.node, "addr", "add", address, "dev", "br0", *_kind(address))
        pods = zip((self.client, *self.servers), (CLIENT, *SERVERS), (CLIENT_V6, *SERVERS_V6), strict=True)
        for number, (name, v4, v6) in enumerate(pods):
            self._add_pod(number, name, v4, v6, routed)
        if not routed:
            # A neighbour that is known and never there: what is sent to it vanishes, as to a node that lost power.
            _ip("-n", self.node, "neigh", "add", NOWHERE, "lladdr", "02:00:00:00:00:99", "dev", "br0")
        _ip("-n", self.node, "rule", "add", "fwmark", "0x02/0x0f", "lookup", "100")
        _ip("-n", self.node, "route", "add", "local", "default", "dev", "lo", "table", "100")
        _ip("-n", self.node, "-6", "rule", "add", "fwmark", "0x02/0x0f", "lookup", "100")
        _ip("-n", self.node, "-6", "route", "add", "local", "default", "dev", "lo", "table", "100")
        subprocess.run(["ip", "netns", "exec", self.node, "nft", "-f", "-"], input=_RULES, text=True, check=True)

    def _add_pod(self, number: int, name: str, v4: str, v6: str, routed: bool) -> None:
        peer = f"pod{number}"
        _ip("-n", self.node, "link", "add", peer, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self.node, "link", "set", peer, "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        if routed:
            _ip("-n", self.node, "route", "add", v4, "dev", peer)
            _ip("-n", self.node, "route", "add", v6, "dev", peer)
            self.run(self.node, ["sysctl", "-q", "-w", f"net.ipv6.conf.{peer}.proxy_ndp=1"])
        else:
            _ip("-n", self.node, "link", "set", peer, "master", "br0")
        _ip("-n", name, "addr", "add", f"{v4}/{32 if routed else 24}", "dev", "eth0")
        _ip("-n", name, "addr", "add", f"{v6}/{128 if routed else 64}", "dev", "eth0", "nodad")
        if routed:
            _ip("-n", name, "route", "add", NODE, "dev", "eth0")
            _ip("-n", name, "route", "add", NODE_V6, "dev", "eth0")
        _ip("-n", name, "route", "add", "default", "via", NODE)
        _ip("-n", name, "route", "add", "default", "via", NODE_V6)


def _kind(address: str) -> list[str]:
    """Scope host keeps the interception address from being chosen as the source towards a pod."""
    if ":" in address:
        return ["nodad"]
    return ["scope", "host"] if address.startswith("169.254.") else []


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class ProxyProcess:
    """A real proxy in its own process (bench/proxy_process.py) in the bed's node, driven line by line."""

    def __init__(self, bed: Bed, *, cpu: int | None = None, node: str = "n1", files: int = 0, **settings: Any) -> None:
        command = [sys.executable, "-m", "bench.proxy_process", node, json.dumps(settings)]
        if files:
            command = ["prlimit", f"--nofile={files}:{files}", *command]
        self.process = bed.start(bed.node, command, cpu=cpu, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ask("ready")

    @property
    def pid(self) -> int:
        """The proxy itself: taskset and prlimit have replaced themselves by it."""
        return self.process.pid

    def put(self, *plans: ServicePlan) -> None:
        """Serve ``plans``."""
        for plan in plans:
            self.ask("put", msgspec.to_builtins(plan))

    def drop(self, namespace: str, name: str) -> None:
        """Serve it no longer."""
        self.ask("drop", [namespace, name])

    def ask(self, what: str, argument: Any = None) -> Any:
        """One question, one answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([what, argument]).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def counters(self) -> Any:
        """``Proxy.counters``."""
        return self.ask("counters")

    def connections(self) -> Any:
        """``Proxy.connections``."""
        return self.ask("connections")
