"""An endpoint on the same node: Isthmus beside the direct connection and HAProxy, in one run.

    client pod ── node (Isthmus on the intercepted service address | HAProxy on a port of the node) ── server pod

Direct is the client pod to the server pod over the node's bridge. Both proxies have one thread. Throughput: one sender
and one receiver that discards in the kernel (bench/load.py). Requests and new connections: wrk against nginx. All
ways have the same two processors: the client is pinned to the first, the proxy to the second, the server has both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.bed import NODE, SERVERS, SERVICE_V4, Bed, ProxyProcess
from bench.harness import Row, Way, interleave, medians, version
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

ROUNDS = 5
RUN_S = 2
CLIENT_CPU = int(os.environ.get("BENCH_CLIENT_CPU", "0"))
PROXY_CPU = int(os.environ.get("BENCH_PROXY_CPU", "1"))
HTTP, BULK = 8080, 5201
LOAD = Path(__file__).with_name("load.py")

_NGINX = """
master_process off; daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log crit;
events {{ worker_connections 8192; }}
http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f;
  uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  server {{ listen {address}:{port} backlog=4096; location / {{ return 200 "ok\\n"; }} }} }}
"""

_HAPROXY = """
global
  nbthread 1
  maxconn 7000
defaults
  mode tcp
  option splice-auto
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen http
  bind {node}:{http}
  server s1 {server}:{http}
listen bulk
  bind {node}:{bulk}
  server s1 {server}:{bulk}
"""

# Each way's address as the client pod sees it; the ports are the same everywhere.
WAYS = {"direct": SERVERS[0], "isthmus": SERVICE_V4, "haproxy": NODE}


@contextmanager
def stage() -> Iterator[Bed]:
    """Everything running: nginx and a sink in the server pod, both proxies on the node."""
    bed = Bed("bench")
    with tempfile.TemporaryDirectory() as name:
        try:
            for space in (bed.node, bed.client, bed.servers[0]):
                _tune(bed, space)
            _start_servers(bed, Path(name))
            proxy = ProxyProcess(bed, cpu=PROXY_CPU)
            members = (Member("n1", SERVERS[0], Distance.SAME_NODE, {"http": HTTP, "bulk": BULK}),)
            ports = (PortPlan(HTTP, "http"), PortPlan(BULK, "bulk"))
            proxy.put(ServicePlan("bench", "web", ServiceKind.CLUSTER_IP, (SERVICE_V4,), ports=ports, members=members))
            for address in WAYS.values():
                _until_answered(bed, address)
            yield bed
        finally:
            bed.close()


def _tune(bed: Bed, space: str) -> None:
    """What the agent sets on a node (tcp_tw_reuse), and room for a load generator's ports."""
    bed.run(space, ["sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1"])
    bed.run(space, ["sysctl", "-qw", "net.ipv4.ip_local_port_range=10000 65000"])


def _start_servers(bed: Bed, directory: Path) -> None:
    nginx, haproxy = directory / "nginx.conf", directory / "haproxy.cfg"
    nginx.write_text(_NGINX.format(directory=directory, address=SERVERS[0], port=HTTP))
    haproxy.write_text(_HAPROXY.format(node=NODE, server=SERVERS[0], http=HTTP, bulk=BULK))
    bed.start(bed.servers[0], ["nginx", "-c", str(nginx)], stdout=subprocess.DEVNULL)
    bed.start(bed.servers[0], [sys.executable, str(LOAD), "server", SERVERS[0], str(BULK)], stdout=subprocess.DEVNULL)
    bed.start(bed.node, ["haproxy", "-q", "-f", str(haproxy)], cpu=PROXY_CPU)


def _until_answered(bed: Bed, address: str, deadline_s: float = 6.0) -> None:
    until_s = time.monotonic() + deadline_s
    while True:
        with suppress(OSError):
            for port in (HTTP, BULK):
                sock = bed.socket_in(bed.client)
                sock.settimeout(1)
                sock.connect((address, port))
                sock.close()
            return
        if time.monotonic() > until_s:
            raise RuntimeError(f"nothing answers on {address}")
        time.sleep(0.1)


def gbits(bed: Bed, address: str, streams: int) -> float:
    """Throughput from the client, Gbit/s."""
    command = [sys.executable, str(LOAD), "bulk", address, str(BULK), str(streams), str(RUN_S)]
    return float(json.loads(bed.run(bed.client, command, cpu=CLIENT_CPU))["value"])


def rate(bed: Bed, address: str, connections: int, *, close: bool = False) -> float:
    """Requests a second; with ``close`` each on a connection of its own."""
    headers = ["-H", "Connection: close"] if close else []
    command = ["wrk", "-t1", f"-c{connections}", f"-d{RUN_S}s", *headers, f"http://{address}:{HTTP}/"]
    for line in bed.run(bed.client, command, cpu=CLIENT_CPU).splitlines():
        if line.startswith("Requests/sec:"):
            return float(line.split()[1])
    raise RuntimeError("wrk printed no rate")


def rows(rounds: int = ROUNDS) -> Iterator[Row]:
    """The table's row ``same node`` and the comparison with HAProxy."""
    peer = f"{version('haproxy', '-v').split(' ')[2]}"
    with stage() as bed:

        def measure(unit: str, way: Callable[[str], Way]) -> tuple[dict[str, float], str]:
            found = medians(interleave({name: way(address) for name, address in WAYS.items()}, rounds))
            figures = ", ".join(f"{name} {value:,.3g}" for name, value in found.items())
            return found, f"{figures} {unit}"

        for streams, target in ((1, 0.80), (8, 0.75)):
            found, text = measure("Gbit/s", lambda to, n=streams: lambda: gbits(bed, to, n))
            yield Row(f"{streams} stream(s), of direct", found["isthmus"] / found["direct"], text, target)
            yield Row(
                f"{streams} stream(s), of HAProxy {peer}", found["isthmus"] / found["haproxy"], "splice-auto", 2.0
            )
        found, text = measure("requests/s", lambda to: lambda: rate(bed, to, 16))
        yield Row("requests/s, 16 kept connections, of direct", found["isthmus"] / found["direct"], text, 0.60)
        yield Row("requests/s, 16 kept connections, of HAProxy", found["isthmus"] / found["haproxy"], "")
        found, text = measure("requests/s", lambda to: lambda: rate(bed, to, 1))
        yield Row("requests/s, 1 kept connection, of direct", found["isthmus"] / found["direct"], text, 0.60)
        added = {name: 1e6 / value - 1e6 / found["direct"] for name, value in found.items()}
        text = ", ".join(f"{name} {added[name]:.1f}" for name in ("isthmus", "haproxy")) + " µs a request"
        yield Row("added latency, of HAProxy's", added["isthmus"] / added["haproxy"], text, 1.2, at_most=True)
        for connections in (16, 1):
            found, text = measure("connections/s", lambda to, n=connections: lambda: rate(bed, to, n, close=True))
            title = f"new connections/s, {connections} at a time"
            yield Row(f"{title}, of direct", found["isthmus"] / found["direct"], text, 0.60)
            yield Row(f"{title}, of HAProxy", found["isthmus"] / found["haproxy"], "", 0.6)
