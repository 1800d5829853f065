"""A revoked node is out, everywhere: real agents, a real relay, connections that are open at that moment."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from agents_lab import LAB, http, manifests, status
from labkit import LabMaker, eventually

from isthmus.lab.cluster import Lab

ADDRESSES = {"cloud": "10.96.1.1", "a": "10.96.1.2", "b": "10.96.1.3"}

HOLD = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 9000), 5); s.settimeout(2)
while True:
    try:
        s.sendall(b"ping"); answer = s.recv(100)
    except OSError as error:
        print("ended", error, flush=True); break
    if not answer:
        print("ended", flush=True); break
    print("open", flush=True); time.sleep(0.1)
"""


@pytest.fixture
def lab(make_lab: LabMaker, tmp_path: Path) -> Lab:
    return make_lab(LAB, name="revoke", manifests=manifests(tmp_path / "manifests"))


class Held:
    """A connection that is kept busy; ``ended_s`` is when it ended."""

    def __init__(self, lab: Lab, pod: str, host: str, log: Path) -> None:
        self._log = log
        command = lab.command(pod, [sys.executable, "-c", HOLD, host])
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=lab.environment(pod))

    @property
    def is_open(self) -> bool:
        return "open" in self._log.read_text() and self.process.poll() is None


def authority(lab: Lab, *arguments: str) -> str:
    command = [sys.executable, "-m", "isthmus", *arguments, "--dir", str(lab.authority_directory)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_revoked_node_is_out_everywhere_and_back_with_a_new_token(lab: Lab, tmp_path: Path) -> None:
    for pod in ("client-a", "client-b", "client-cloud"):
        for name in ("cloud", "a", "b"):
            eventually(
                lambda pod=pod, name=name: http(lab, pod, f"http://{ADDRESSES[name]}/"), 30, f"{pod} calls {name}"
            )
    out_of_it = {
        "the node's own, direct": Held(lab, "client-a", "10.96.1.1", tmp_path / "1"),
        "to the node, relayed": Held(lab, "client-b", "10.96.1.2", tmp_path / "2"),
    }
    others = Held(lab, "client-b", "10.96.1.1", tmp_path / "3")
    for held in (*out_of_it.values(), others):
        eventually(lambda held=held: held.is_open, 10)

    begin_s = time.monotonic()
    authority(lab, "node", "revoke", "edge-1")
    for what, held in out_of_it.items():
        eventually(lambda held=held: held.process.poll() is not None, 30, what)
        print(f"{what}: ended {time.monotonic() - begin_s:.1f} s after the command was started")
    assert others.is_open
    assert http(lab, "client-b", "http://10.96.1.2/", 3) == {}
    assert http(lab, "client-a", "http://10.96.1.1/", 3) == {}
    assert http(lab, "client-b", "http://10.96.1.1/")
    identity = status(lab, "edge-1")["identity"]
    assert isinstance(identity, dict) and identity["state"] == "revoked"
    assert others.is_open
    others.process.kill()
    others.process.wait()

    token = lab.node_directory("edge-1") / "token"
    issuer = ("--issuer", "203.0.113.100:20004")
    token.write_text(authority(lab, "token", "create", "--node", "edge-1", *issuer))
    eventually(lambda: http(lab, "client-b", "http://10.96.1.2/", 2), 20)
    eventually(lambda: http(lab, "client-a", "http://10.96.1.1/", 2), 20)
