"""A real relay process and two node processes in namespaces that reach only the relay."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import eventually
from relay_net import PORT, RELAY_A, Net, net, sh

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Net]:
    with net(tmp_path) as made:
        yield made


def meet(here: Net) -> float:
    """Start everything; returns the seconds from the start of the last process to the first relayed answer."""
    here.start_relay()
    for name in ("a", "b"):
        here.token(name)
    here.nodes["b"].start()
    begin_s = time.time()
    here.nodes["a"].start()
    eventually(lambda: here.nodes["a"].told("announced", node="b"), 10)
    eventually(lambda: here.nodes["b"].told("announced", node="a"), 10)
    here.nodes["a"].connect("b")
    eventually(lambda: here.nodes["a"].told("heard", text="hello from a"), 10)
    return here.nodes["a"].told("heard")[0]["at"] - begin_s


def test_the_first_relayed_answer_comes_within_two_seconds_of_the_last_start(here: Net) -> None:
    took_s = meet(here)
    print(f"first relayed answer {took_s:.2f} s after the start of the last process, enrolment included")
    assert took_s < 2.0
    report = here.relay_report()
    assert {(row["node"], row["observed"].split(":")[0]) for row in report["nodes"]} == {
        ("a", "10.99.1.2"),
        ("b", "10.99.2.2"),
    }
    assert report["joined"] == 1


def test_a_killed_relay_is_found_again_and_new_connections_go_on(here: Net) -> None:
    meet(here)
    here.stop_relay(signal.SIGKILL)
    eventually(lambda: here.nodes["a"].told("ended") or here.nodes["a"].told("broken"))
    time.sleep(1.0)  # long enough for the clients to back off
    back_s = time.time()
    here.start_relay()
    for node in here.nodes.values():
        eventually(lambda node=node: node.told("relays", back_s, connected=["r1"], present=["a", "b"]), 10)
    here.nodes["a"].connect("b")
    eventually(lambda: here.nodes["a"].told("heard", back_s, text="hello from a"))
    took_s = here.nodes["a"].told("heard", back_s)[0]["at"] - back_s
    print(f"relayed answer {took_s:.2f} s after the relay's start")
    assert took_s < 4.0
    assert len(here.nodes["a"].told("credentials")) == 1  # nobody enrolled again


def test_a_stopped_relay_ends_cleanly(here: Net) -> None:
    meet(here)
    assert here.stop_relay(signal.SIGTERM) == 0
    assert not (here.directory / "relay" / "run" / "relay.sock").exists()
    log = (here.directory / "relay.log").read_text()
    assert "Traceback" not in log and "relay stops" in log
    eventually(lambda: here.nodes["a"].told("ended") or here.nodes["a"].told("broken"))


def test_a_revoked_node_is_out_within_seconds_and_back_with_a_new_token(here: Net) -> None:
    meet(here)
    at_s = here.revoke("b")
    eventually(lambda: here.nodes["a"].told("gone", at_s, node="b"))
    eventually(lambda: here.nodes["a"].told("broken", at_s) or here.nodes["a"].told("ended", at_s))
    took_s = max(here.nodes["a"].told("gone", at_s)[0]["at"] - at_s, 0.0)
    print(f"a revoked node was out {took_s:.2f} s after the command was started")
    assert took_s < 10.0
    assert [row["node"] for row in here.relay_report()["nodes"]] == ["a"]
    assert "revoked" in sh(sys.executable, "-m", "isthmus", "node", "list", "--dir", str(here.ca))
    # A restart does not help it.
    here.nodes["b"].kill()
    here.nodes["b"].start()
    time.sleep(1.5)
    assert [row["node"] for row in here.relay_report()["nodes"]] == ["a"]
    new_s = time.time()
    here.token("b")
    eventually(lambda: here.nodes["b"].told("credentials", new_s), 10)
    eventually(lambda: here.nodes["a"].told("relays", new_s, present=["a", "b"]), 10)


def test_a_node_killed_at_any_moment_of_its_enrolment_converges(here: Net) -> None:
    here.start_relay()
    eventually(here.relay_report)
    here.token("a")
    node = here.nodes["a"]
    for delay_s in (0.25, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6):
        node.start()
        time.sleep(delay_s)  # the moment is what is tested
        node.kill()
    node.start()
    eventually(lambda: node.told("relays", connected=["r1"]), 10)
    report = here.relay_report()
    assert report["counters"].get("enrolment-refused-used-token", 0) == 0
    assert report["counters"]["enrolled"] >= 1


def test_a_flood_of_strangers_leaves_the_nodes_their_relay(here: Net) -> None:
    here.start_relay(limit=160)
    join_both(here)
    with flood(here):
        report = eventually(here.relay_report)
        assert report["counters"]["refused-strangers"] >= 1
        eventually(lambda: answered(here), 12)
        assert here.relay_report()["counters"]["channels"] == 2


def test_without_descriptors_the_relay_refuses_lives_and_recovers(here: Net) -> None:
    here.start_relay()
    join_both(here)
    assert here.relay is not None
    pid = relay_pid(here)
    sh("prlimit", f"--pid={pid}", f"--nofile={here.relay_report()['descriptors'] + 4}:")
    with flood(here):
        sh("prlimit", f"--pid={pid}", "--nofile=1024:")
        report = eventually(here.relay_report, 10)
        assert report["counters"]["no-descriptors"] >= 1
        eventually(lambda: answered(here), 12)  # the strangers' time must end first: they share the node's address
        assert here.relay_report()["counters"]["channels"] == 2  # the channels lived on


def join_both(here: Net) -> None:
    for name in ("a", "b"):
        here.token(name)
        here.nodes[name].start()
    eventually(lambda: here.nodes["a"].told("announced", node="b"), 10)


def answered(here: Net) -> bool:
    """Whether b has answered a over the relay; else ask once more."""
    if not here.nodes["a"].told("heard", text="hello from a"):
        here.nodes["a"].connect("b")
        return False
    return True


def relay_pid(here: Net) -> int:
    """`ip netns exec` becomes the relay."""
    assert here.relay is not None
    return here.relay.pid


@contextlib.contextmanager
def flood(here: Net) -> Iterator[None]:
    """300 connections from node a's namespace that say nothing, kept open as long as the relay lets them."""
    program = (
        "import socket, sys, time\n"
        "held = []\n"
        "for _ in range(300):\n"
        "    sock = socket.socket(); sock.settimeout(2); held.append(sock)\n"
        "    try: sock.connect((sys.argv[1], int(sys.argv[2])))\n"
        "    except OSError: pass\n"
        "print('held', flush=True); time.sleep(60)\n"
    )
    command = ["ip", "netns", "exec", here.namespace("a"), sys.executable, "-c", program, RELAY_A, str(PORT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def test_one_node_that_does_not_read_delays_nobody(here: Net) -> None:
    """Its process is stopped: the kernel acknowledges, nobody reads."""
    meet(here)
    assert here.nodes["b"].process is not None
    os.kill(here.nodes["b"].process.pid, signal.SIGSTOP)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2.0)
            sock.connect(str(here.directory / "relay" / "run" / "relay.sock"))
            assert sock.recv(65_536)
        for _ in range(50):
            here.nodes["a"].connect("b")
        eventually(lambda: len(here.nodes["a"].told("dial", role="client")) >= 51)
        # They are refused for want of their other half, in time.
        eventually(lambda: len(here.nodes["a"].told("broken", node="b")) >= 50, 12)
    finally:
        os.kill(here.nodes["b"].process.pid, signal.SIGCONT)
