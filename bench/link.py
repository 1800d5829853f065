"""An endpoint on another node, encrypted: beside the direct connection and HAProxy (TCP to TLS 1.3 to TCP), in one run.

    client pod ── node A ══════ node B ── server pod        four namespaces; direct is routed over both nodes

HAProxy has one thread a node, the same certificates, both sides authenticated. All ways share the same processors.
``python -m bench link``; the load is bench/load.py.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.harness import Row, interleave, medians
from isthmus.wire import identity

HERE = Path(__file__).parent
ROUNDS, SECONDS = 5, 1.5
SERVER_PORT, AGENT_PORT, HAPROXY_PORT, LINK_PORT, HAPROXY_LINK = 7000, 7100, 7200, 20006, 20443
CLIENT, NODE_A, NODE_B, SERVER = "link-bench-c", "link-bench-a", "link-bench-b", "link-bench-s"
SPACES = (CLIENT, NODE_A, NODE_B, SERVER)

ROWS = {  # title: load, arguments, least share of direct, least multiple of HAProxy, unit
    "one stream": ("bulk", ["1"], 0.25, 1.3, "Gbit/s"),
    "eight streams": ("bulk", ["8"], 0.20, 1.3, "Gbit/s"),
    "requests/s, kept connection": ("requests", ["1"], 0.35, None, "/s"),
    "requests/s, 16 kept connections": ("requests", ["16"], None, None, "/s"),
    "new connections/s, 16 at a time": ("connections", ["16"], 0.30, 0.6, "/s"),
}


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True)


def lay_out() -> None:
    """Four namespaces in a row, routed."""
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], check=False, stderr=subprocess.DEVNULL)
        sh(f"ip netns add {space}")
        sh(f"ip -n {space} link set lo up")
        sh(f"ip netns exec {space} sysctl -qw net.ipv4.ip_forward=1 net.ipv4.tcp_tw_reuse=1")
        ports = "net.ipv4.ip_local_port_range=10000 65000"
        subprocess.run(["ip", "netns", "exec", space, "sysctl", "-qw", ports], check=True)
    for left, right, net in ((CLIENT, NODE_A, 1), (NODE_A, NODE_B, 2), (NODE_B, SERVER, 3)):
        sh(f"ip link add l{net} netns {left} type veth peer name r{net} netns {right}")
        sh(f"ip -n {left} addr add 10.77.{net}.1/24 dev l{net}")
        sh(f"ip -n {right} addr add 10.77.{net}.2/24 dev r{net}")
        sh(f"ip -n {left} link set l{net} up")
        sh(f"ip -n {right} link set r{net} up")
    sh(f"ip -n {CLIENT} route add default via 10.77.1.2")
    sh(f"ip -n {SERVER} route add default via 10.77.3.1")
    sh(f"ip -n {NODE_A} route add 10.77.3.0/24 via 10.77.2.2")
    sh(f"ip -n {NODE_B} route add 10.77.1.0/24 via 10.77.2.1")


def clear() -> None:
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], check=False, stderr=subprocess.DEVNULL)


def certificates(directory: Path) -> dict[str, list[str]]:
    """Credentials of both nodes, as the issuer makes them."""
    now_s = time.time()
    key = identity.new_key()
    authority = identity.new_authority("bench", key, now_s=now_s)
    (directory / "ca.pem").write_bytes(identity.certificate_pem(authority))
    files = {}
    for name in ("a", "b"):
        node_key = identity.new_key()
        holder = identity.Holder(identity.Role.NODE, name)
        certificate = identity.issue(authority, key, node_key.public_key(), (holder,), now_s=now_s)
        (directory / f"{name}.pem").write_bytes(identity.certificate_pem(certificate))
        (directory / f"{name}.key").write_bytes(identity.key_pem(node_key))
        both = identity.certificate_pem(certificate) + identity.key_pem(node_key)
        (directory / f"{name}.both.pem").write_bytes(both)
        files[name] = [str(directory / part) for part in ("ca.pem", f"{name}.pem", f"{name}.key")]
    return files


class Processes:
    """What runs beside the measurement; all of it ends with it."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def start(self, space: str, command: list[str], *, wait: bool = True) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["ip", "netns", "exec", space, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._running.append(process)
        if wait:
            assert process.stdout is not None
            process.stdout.readline()
        return process

    def stop(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


def start_isthmus(processes: Processes, files: dict[str, list[str]]) -> None:
    node = str(HERE / "linknode.py")
    spec_b = {"node": "b", "port": LINK_PORT, "files": files["b"]}
    spec_a = {
        "node": "a",
        "port": LINK_PORT,
        "files": files["a"],
        "peers": {"b": [["direct", f"10.77.2.2:{LINK_PORT}", ""]]},
        "listen": [["10.77.1.2", AGENT_PORT + n, "b", "10.77.3.2", SERVER_PORT + n] for n in range(3)],
    }
    processes.start(NODE_B, [sys.executable, node, json.dumps(spec_b)])
    processes.start(NODE_A, [sys.executable, node, json.dumps(spec_a)])


def start_haproxy(processes: Processes, directory: Path) -> None:
    """TCP to TLS on node A, TLS to TCP on node B; both sides authenticated, sessions resumed as by default."""
    head = (
        "global\n nbthread 1\n maxconn 4000\n ssl-default-bind-options ssl-min-ver TLSv1.3\n"
        "defaults\n mode tcp\n option splice-auto\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n"
    )
    tls = f"ssl verify required ca-file {directory}/ca.pem"
    a, b = [head], [head]
    for n in range(3):
        a.append(
            f"listen l{n}\n bind 10.77.1.2:{HAPROXY_PORT + n}\n"
            f" server b 10.77.2.2:{HAPROXY_LINK + n} {tls} crt {directory}/a.both.pem\n"
        )
        b.append(
            f"listen l{n}\n bind 10.77.2.2:{HAPROXY_LINK + n} {tls} crt {directory}/b.both.pem\n"
            f" server s 10.77.3.2:{SERVER_PORT + n}\n"
        )
    for name, space, text in (("a", NODE_A, a), ("b", NODE_B, b)):
        path = directory / f"haproxy-{name}.cfg"
        path.write_text("".join(text))
        processes.start(space, ["haproxy", "-db", "-f", str(path)], wait=False)
    time.sleep(0.7)


TARGETS = {
    "direct": ("10.77.3.2", SERVER_PORT),
    "isthmus": ("10.77.1.2", AGENT_PORT),
    "haproxy": ("10.77.1.2", HAPROXY_PORT),
}


def load(way: str, role: str, arguments: list[str], seconds: float) -> dict[str, float]:
    address, port = TARGETS[way]
    command = [sys.executable, str(HERE / "load.py"), role, address, str(port), *arguments, str(seconds)]
    done = subprocess.run(["ip", "netns", "exec", CLIENT, *command], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def rows(rounds: int = ROUNDS, ways: tuple[str, ...] = tuple(TARGETS)) -> Iterator[Row]:
    """Measure; for ``python -m bench link``."""
    os.environ["PYTHONPATH"] = str(HERE.parent / "src")
    processes = Processes()
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        try:
            lay_out()
            server = [sys.executable, str(HERE / "load.py"), "server", "10.77.3.2", str(SERVER_PORT)]
            processes.start(SERVER, server)
            start_isthmus(processes, certificates(directory))
            if "haproxy" in ways:
                start_haproxy(processes, directory)
            for title in ROWS:
                yield from _shares(title, rounds, ways)
            yield from beside_bulk(SECONDS * 2)
        finally:
            processes.stop()
            clear()


def _value(way: str, role: str, arguments: list[str]) -> float:
    return load(way, role, arguments, SECONDS)["value"]


def _shares(title: str, rounds: int, ways: tuple[str, ...]) -> Iterator[Row]:
    """Of direct, and of HAProxy: medians of the ratios within a round."""
    role, arguments, share, multiple, unit = ROWS[title]
    loads = {way: partial(_value, way, role, arguments) for way in ways}
    runs = interleave(loads, rounds)
    figures = ", ".join(f"{way} {value:,.4g}" for way, value in medians(runs).items()) + f" {unit}"
    for other, target in (("direct", share), ("haproxy", multiple)):
        if other in runs:
            ratios = [mine / theirs for mine, theirs in zip(runs["isthmus"], runs[other], strict=True)]
            value = medians({title: ratios})[title]
            yield Row(f"{title}, of {other}", value, figures if other == "direct" else "", target)


def beside_bulk(seconds: float) -> Iterator[Row]:
    """A request beside one bulk stream over the same link: how much longer it takes than alone."""
    alone = load("isthmus", "latency", [], seconds)
    address, port = TARGETS["isthmus"]
    command = [sys.executable, str(HERE / "load.py"), "bulk", address, str(port), "1", str(seconds + 1.5)]
    with subprocess.Popen(["ip", "netns", "exec", CLIENT, *command], stdout=subprocess.PIPE, text=True) as bulk:
        time.sleep(0.7)  # the bulk stream is at its speed
        beside = load("isthmus", "latency", [], seconds)
        gbits = json.loads(bulk.communicate()[0])["value"]
    detail = f"alone {alone['value']:.0f} µs, beside {beside['value']:.0f} µs, bulk {gbits:.1f} Gbit/s"
    yield Row("median latency beside bulk, of alone", beside["value"] / alone["value"], detail, 2.0, at_most=True)
    yield Row(
        "p99 latency beside bulk, ms", beside["p99"] / 1000, f"alone {alone['p99'] / 1000:.2f}", 5.0, at_most=True
    )
