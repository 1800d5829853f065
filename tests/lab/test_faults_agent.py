"""The agent, a relay or an endpoint fails: what goes on, what ends, and how soon all is as before."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agents_lab import CLOUD, LAB, A, B, http, isthmus, manifests, service, status, within, write
from labkit import LabMaker, eventually

from isthmus.lab.agents import start_agent, start_relay
from isthmus.lab.cluster import Lab
from isthmus.lab.foreign import take_listing


@pytest.fixture(scope="module")
def lab(make_module_lab: LabMaker, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = make_module_lab(LAB, name="fault", manifests=manifests(tmp_path_factory.mktemp("fault") / "manifests"))
    for pod in ("client-cloud", "client-a", "client-b"):
        for name in ("cloud", "a", "b"):
            assert eventually(lambda pod=pod, name=name: http(lab, pod, f"http://{name}.shop/"))
    return lab


def kill(lab: Lab, kind: str, name: str) -> None:
    """kill -9, and wait until the process and its workers are gone."""
    process = next(each for each in lab.processes() if (each.kind, each.name) == (kind, name))
    os.kill(process.pid, signal.SIGKILL)
    assert eventually(lambda: not lab.alive(kind, name))


def test_a_killed_agent_leaves_the_others_alone_and_converges_when_it_is_back(lab: Lab) -> None:
    kill(lab, "agent", "edge-1")
    assert http(lab, "client-cloud", "http://cloud.shop/")
    rules = lab.run("edge-1", ["nft", "list", "table", "inet", "isthmus"])
    assert rules.returncode == 0, "the kernel's state must stay after a crash"
    start_agent(lab, "edge-1")
    for pod, name in (("client-a", "cloud"), ("client-b", "a"), ("client-a", "a")):
        assert eventually(lambda pod=pod, name=name: http(lab, pod, f"http://{name}.shop/", 2), 15)
    assert eventually(lambda: status(lab, "edge-1").get("healthy"))


def test_workers_that_are_killed_come_back(lab: Lab) -> None:
    for name in ("data", "dns"):
        workers = {row["name"]: row for row in status(lab, "edge-1")["workers"]}  # type: ignore[attr-defined]
        os.kill(int(workers[name]["pid"]), signal.SIGKILL)
        assert eventually(lambda: http(lab, "client-a", "http://b.shop/", 1))
        after = {row["name"]: row for row in status(lab, "edge-1")["workers"]}  # type: ignore[attr-defined]
        assert after[name]["restarts"] == int(workers[name]["restarts"]) + 1


def test_rules_that_somebody_flushes_are_put_back(lab: Lab) -> None:
    lab.run("edge-1", ["nft", "delete", "table", "inet", "isthmus"], check=True)
    assert eventually(lambda: http(lab, "client-a", "http://b.shop/", 1), 15)
    interception = status(lab, "edge-1")["interception"]
    assert isinstance(interception, dict)
    assert interception["repairs"] >= 1


STEADY = """
import http.client, sys, time
host, seconds = sys.argv[1], float(sys.argv[2])
connection = http.client.HTTPConnection(host, 80, timeout=3)
end, count = time.monotonic() + seconds, 0
while time.monotonic() < end:
    connection.request("GET", "/"); connection.getresponse().read(); count += 1
    time.sleep(0.02)
print(count)
"""


def test_a_relay_that_dies_is_not_noticed_by_direct_links_and_relayed_ones_return(lab: Lab) -> None:
    steady = subprocess.Popen(
        lab.command("client-a", [sys.executable, "-c", STEADY, "cloud.shop", "6"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=lab.environment("client-a"),
    )
    kill(lab, "relay", "relay-1")
    assert http(lab, "client-a", "http://b.shop/", 1) == {}
    start_relay(lab, "relay-1")
    took_s = within(8.0, lambda: http(lab, "client-a", "http://b.shop/", 1))
    out, error = steady.communicate(timeout=30)
    assert steady.returncode == 0, f"the direct connection noticed: {error}"
    assert int(out) > 50
    assert took_s < 8.0


ENDPOINT = """
import socket, sys, time
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("", 8070)); s.listen()
print("up", flush=True)
c, _ = s.accept(); c.recv(10); c.sendall(b"part"); time.sleep(60)
"""
HALF = """
import socket, sys
s = socket.create_connection((sys.argv[1], 80), 5); s.sendall(b"hello"); print(s.recv(4).decode(), flush=True)
try:
    print("end" if s.recv(10) == b"" else "more")
except ConnectionResetError:
    print("reset")
"""


def test_an_endpoint_that_dies_mid_connection_ends_the_client_s_too(lab: Lab) -> None:
    text = service("frail", "10.96.3.1", [B]).replace('"port": 8080,', '"port": 8070,')
    write(lab, "frail.yaml", text)
    server = subprocess.Popen(
        lab.command("web-b", [sys.executable, "-c", ENDPOINT]), stdout=subprocess.PIPE, env=lab.environment("web-b")
    )
    assert server.stdout is not None
    server.stdout.readline()

    def connected() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            lab.command("client-a", [sys.executable, "-c", HALF, "10.96.3.1"]),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=lab.environment("client-a"),
        )

    eventually(lambda: "frail" in isthmus(lab, "edge-1", "dump", "services").stdout)
    client = connected()
    assert client.stdout is not None
    assert client.stdout.readline() == "part\n"
    server.kill()
    out, _ = client.communicate(timeout=10)
    assert out.strip() in ("end", "reset")


def test_a_node_that_leaves_is_passed_over(lab: Lab) -> None:
    """Its agent is stopped: connections go to the other endpoints, after one short wait at most."""
    write(lab, "pair.yaml", service("pair", "10.96.3.2", [A, CLOUD]))
    assert eventually(lambda: {http(lab, "client-b", "http://10.96.3.2/").get("node") for _ in range(4)} >= {"edge-1"})
    lab.stop("agent", "edge-1")
    try:
        took: list[float] = []
        for _ in range(10):
            start = time.monotonic()
            assert http(lab, "client-b", "http://10.96.3.2/", 3)["node"] == "cloud-1"
            took.append(time.monotonic() - start)
        assert max(took) < 2.0, took
    finally:
        start_agent(lab, "edge-1")
    assert eventually(lambda: http(lab, "client-b", "http://a.shop/", 2), 15)


SILENT = """
import socket, sys, time
clients = [socket.create_connection((sys.argv[1], 9000), 5) for _ in range(50)]
print("up", flush=True); time.sleep(60)
"""


def test_clients_that_send_nothing_delay_nobody(lab: Lab) -> None:
    silent = subprocess.Popen(
        lab.command("client-b", [sys.executable, "-c", SILENT, "a.shop"]),
        stdout=subprocess.PIPE,
        env=lab.environment("client-b"),
    )
    try:
        assert silent.stdout is not None
        assert silent.stdout.readline() == b"up\n"
        start = time.monotonic()
        assert http(lab, "client-b", "http://a.shop/")
        assert time.monotonic() - start < 1.0
    finally:
        silent.kill()
        silent.wait()


def test_foreign_rules_are_the_same_whatever_happens_to_the_agent(lab: Lab) -> None:
    namespace = lab.place("edge-1").namespace
    before = take_listing(namespace).foreign()

    def unchanged() -> bool:
        return take_listing(namespace).foreign() == before

    assert before
    write(lab, "extra.yaml", service("extra", "10.96.3.3", [A], labels={"isthmus.dev/proxy": "false"}))
    assert eventually(lambda: "ignore shop/extra" in isthmus(lab, "edge-1", "dump", "rules").stdout)
    assert unchanged(), "after a change"
    kill(lab, "agent", "edge-1")
    assert unchanged(), "after kill -9"
    start_agent(lab, "edge-1")
    assert eventually(lambda: status(lab, "edge-1").get("healthy"), 15)
    assert unchanged(), "after a restart"
    lab.stop("agent", "edge-1")
    assert unchanged(), "after a stop"
    assert lab.run("edge-1", ["nft", "list", "table", "inet", "isthmus"]).returncode != 0
    assert lab.run("edge-1", ["ip", "link", "show", "isthmus0"]).returncode != 0
    done = isthmus(lab, "edge-1", "uninstall")
    assert done.returncode == 0, done.stderr
    assert take_listing(namespace) == before, "after uninstall nothing of ours may be left"
    start_agent(lab, "edge-1")
    assert eventually(lambda: http(lab, "client-a", "http://b.shop/", 2), 15)


def test_a_full_disk_stops_no_connection(lab: Lab, tmp_path: Path) -> None:
    """The state directory of one agent becomes a file system without room."""
    state = lab.node_directory("edge-2") / "state"
    lab.stop("agent", "edge-2")
    moved = state.with_name("state.kept")
    state.rename(moved)
    state.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(state)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{moved}/identity", str(state)], check=True)
        filler = state / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
            while True:
                out.write(b"x" * 4096)
        start_agent(lab, "edge-2")
        assert eventually(lambda: http(lab, "client-b", "http://a.shop/", 2), 15)
        write(lab, "late.yaml", service("late", "10.96.3.9", [A]))
        assert eventually(lambda: http(lab, "client-b", "http://10.96.3.9/", 2))
        assert lab.alive("agent", "edge-2")
        lab.stop("agent", "edge-2")
    finally:
        subprocess.run(["umount", str(state)], check=True)
        state.rmdir()
        moved.rename(state)
        start_agent(lab, "edge-2")
    assert eventually(lambda: http(lab, "client-b", "http://a.shop/", 2), 15)
