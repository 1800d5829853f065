"""The parts of the lab that need no root: registry, process files, the server, listings, observations."""

import json
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cli.options import RUN_DIRECTORY_VARIABLE
from isthmus.lab import cluster
from isthmus.lab.demo import STORY, answered_by, contains, line_with
from isthmus.lab.examples import DEMO
from isthmus.lab.foreign import Listing, foreign_rules
from isthmus.lab.labfile import ForeignSet
from isthmus.lab.loader import load_lab_file
from isthmus.lab.natprobe import Behaviour, Observation
from isthmus.lab.processes import read_pid, start_time, wait_until
from isthmus.lab.registry import Entry, Kind, Registry


def test_a_registry_gives_back_what_was_noted(tmp_path):
    registry = Registry(tmp_path / "r")
    registry.note(Kind.NAMESPACE, "isthmus-a-b")
    registry.note(Kind.UP, "a")
    assert list(registry.entries()) == [Entry(Kind.NAMESPACE, "isthmus-a-b"), Entry(Kind.UP, "a")]
    assert registry.complete


@given(st.integers(0, 200))
def test_a_torn_registry_loses_at_most_its_last_line(cut):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "r"
        registry = Registry(path)
        for number in range(4):
            registry.note(Kind.NAMESPACE, f"isthmus-a-{number}")
        whole = path.read_bytes()
        path.write_bytes(whole[: min(cut, len(whole))])
        kept = whole[:cut].count(b"\n")
        names = [entry.name for entry in registry.entries()]
        assert names[:kept] == [f"isthmus-a-{number}" for number in range(kept)]
        assert len(names) <= kept + 1


def test_a_lab_that_was_never_made_has_an_empty_registry(tmp_path):
    assert list(Registry(tmp_path / "none").entries()) == []


def test_a_pid_that_is_used_again_is_not_taken_for_the_process(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    try:
        file = tmp_path / "pid"
        file.write_text(f"{process.pid} {start_time(process.pid)}\n")
        assert read_pid(file) == process.pid
        file.write_text(f"{process.pid} {start_time(process.pid) - 1}\n")
        assert read_pid(file) == 0
    finally:
        process.kill()
        process.wait()
    assert start_time(process.pid) == 0


def test_a_zombie_is_dead(tmp_path):
    process = subprocess.Popen(["true"])
    assert wait_until(lambda: start_time(process.pid) == 0, 5.0)
    process.wait()


def test_the_command_line_and_the_lab_mean_the_same_variable():
    assert cluster.RUN_DIRECTORY_VARIABLE == RUN_DIRECTORY_VARIABLE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server():
    http, tcp, udp = free_port(), free_port(), free_port()
    ports = ["--http", str(http), "--tcp", str(tcp), "--udp", str(udp)]
    process = subprocess.Popen([sys.executable, "-m", "isthmus.lab.server", "--pod", "ns/p", "--node", "n", *ports])

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", tcp)) == 0

    try:
        assert wait_until(listens, 10.0)
        yield http, tcp, udp
    finally:
        process.kill()
        process.wait()


def receive_all(client: socket.socket) -> bytes:
    client.settimeout(5)
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_server_answers_http_on_a_kept_connection(server, host):
    with socket.create_connection((host, server[0])) as client:
        for path in ("/one", "/two"):
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc".encode())
        client.sendall(b"GET /end HTTP/1.1\r\nConnection: close\r\n\r\n")
        text = receive_all(client).decode()
    bodies = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [body["path"] for body in bodies] == ["/one", "/two", "/end"]
    assert (bodies[0]["pod"], bodies[0]["node"], bodies[0]["client"]) == ("ns/p", "n", host)


def test_the_server_echoes_until_the_client_has_sent_its_end(server):
    with socket.create_connection(("127.0.0.1", server[1])) as client:
        client.sendall(b"x" * 100_000)
        client.shutdown(socket.SHUT_WR)
        line, _, echo = receive_all(client).partition(b"\n")
    assert json.loads(line)["port"] == server[1]
    assert echo == b"x" * 100_000


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_server_answers_datagrams(server, family, host):
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(b"hello", (host, server[2]))
        line, _, echo = client.recv(4096).partition(b"\n")
    assert (json.loads(line)["client"], echo) == (host, b"hello")


def test_garbage_ends_one_connection_only(server):
    with socket.create_connection(("127.0.0.1", server[0])) as client:
        client.sendall(b"\x00" * 70_000)
        client.shutdown(socket.SHUT_WR)
        receive_all(client)
    with socket.create_connection(("127.0.0.1", server[0])) as client:
        client.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in receive_all(client)


def test_the_foreign_sets_are_loaded_in_one_order_whatever_the_files():
    wanted = [ForeignSet.DOCKER, ForeignSet.LIBVIRT]
    text = foreign_rules(wanted, "172.17.0.0/16", "docker0")
    assert text == foreign_rules(reversed(wanted), "172.17.0.0/16", "docker0")
    assert "-s 172.17.0.0/16 ! -o docker0 -j MASQUERADE" in text


def test_our_own_rules_are_left_out_of_a_listing_with_all_their_lines():
    nft = ("table ip isthmus {", "chain a {", "x", "}", "}", "table ip other {", "chain b {", "}", "}")
    legacy = (
        "*nat",
        ":ISTHMUS - [0:0]",
        "-A PREROUTING -j DOCKER",
        '-A OUTPUT -m comment --comment "isthmus root chain"',
    )
    left = Listing({"nftables": nft, "iptables-legacy": legacy}).foreign().lines
    assert left["nftables"] == nft[5:]
    assert left["iptables-legacy"] == ("*nat", "-A PREROUTING -j DOCKER")


A, B, C, D = ("192.0.2.1", 1), ("192.0.2.1", 2), ("192.0.2.1", 3), ("192.0.2.1", 4)


@pytest.mark.parametrize(
    ("sources", "mapping"),
    [
        ((A, A, A, A), Behaviour.ENDPOINT_INDEPENDENT),
        ((A, A, B, B), Behaviour.ADDRESS_DEPENDENT),
        ((A, B, C, D), Behaviour.ADDRESS_AND_PORT_DEPENDENT),
    ],
)
def test_the_mapping_is_named_as_in_rfc_4787(sources, mapping):
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert Observation(dict(zip(places, sources, strict=True)), frozenset()).mapping == mapping


@pytest.mark.parametrize(
    ("let_in", "filtering"),
    [
        ({(0, 0), (0, 1), (1, 0), (1, 1)}, Behaviour.ENDPOINT_INDEPENDENT),
        ({(0, 0), (0, 1)}, Behaviour.ADDRESS_DEPENDENT),
        ({(0, 0)}, Behaviour.ADDRESS_AND_PORT_DEPENDENT),
    ],
)
def test_the_filtering_is_named_as_in_rfc_4787(let_in, filtering):
    assert Observation({}, frozenset(let_in)).filtering == filtering


def test_waiting_ends_at_its_deadline():
    started = time.monotonic()
    assert not wait_until(lambda: False, 0.05)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("check", "output", "told"),
    [
        (contains("a", "b"), "b and a", True),
        (contains("a", "b"), "a", False),
        (line_with("plant-1", "relayed"), "shop direct\nplant-1 relayed", True),
        (line_with("plant-1", "relayed"), "plant-1 direct\nshop relayed", False),
        (answered_by("ns/p"), '{"pod": "ns/p"}', True),
        (answered_by("ns/p"), '{"pod": "ns/q"}', False),
        (answered_by("ns/p"), "curl: (28) timed out", False),
    ],
)
def test_a_step_of_the_demo_holds_what_it_must(check, output, told):
    assert (check(output) == "") is told


def test_every_step_of_the_demo_is_in_a_place_of_its_lab():
    lab = cluster.Lab(load_lab_file(DEMO))
    assert all(lab.place(step.place) for step in STORY)


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "isthmus", "lab", *arguments], capture_output=True, text=True)


def test_no_command_is_wrong_use():
    done = run("exec", "machine", "--")
    assert (done.returncode, "there is no command after --" in done.stderr) == (2, True)


def test_an_option_after_the_place_is_wrong_use_and_says_where_it_goes():
    done = run("exec", "machine", "--name", "x", "--", "true")
    assert (done.returncode, "options go before the node or pod" in done.stderr) == (2, True)


def test_a_lab_that_is_not_there_is_wrong_use():
    done = run("status", "--name", "nosuchlab")
    assert (done.returncode, "there is no lab 'nosuchlab'" in done.stderr) == (2, True)
