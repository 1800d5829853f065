"""Three namespaces and real processes, for tests of relay and identity.

    a 10.99.1.2 ──── 10.99.1.1 relay 10.99.2.1 ──── 10.99.2.2 b

The relay's namespace does not forward, so the nodes reach only the relay.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RELAY_A, RELAY_B, PORT = "10.99.1.1", "10.99.2.1", 20004
ISTHMUS = [sys.executable, "-m", "isthmus"]
NODE = [sys.executable, str(Path(__file__).with_name("relay_node.py"))]


def sh(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class NodeProcess:
    """A running relay_node.py, with the events that it told."""

    def __init__(self, net: "Net", name: str) -> None:
        self.net, self.name = net, name
        self.state = net.directory / name
        self.events: list[dict[str, Any]] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        side = 1 if self.name == "a" else 2
        command = [*NODE, self.name, str(self.state), f"10.99.{side}.2:20006", f"10.99.{side}.1:{PORT}"]
        log = (self.net.directory / f"{self.name}.log").open("a")
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.net.namespace(self.name), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # log lines are not JSON
                self.events.append(json.loads(line))

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def connect(self, node: str) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(f"connect {node} r1\n")
        self.process.stdin.flush()

    def told(self, event: str, since_s: float = 0.0, **fields: object) -> list[dict[str, Any]]:
        """Events of a kind with these fields."""
        return [
            one
            for one in list(self.events)
            if one["event"] == event and one["at"] >= since_s and fields.items() <= one.items()
        ]


class Net:
    """The namespaces, the authority, the relay process, two nodes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tag = f"relay-{os.getpid()}"
        self.ca = directory / "ca"
        self.relay: subprocess.Popen[bytes] | None = None
        self.nodes = {name: NodeProcess(self, name) for name in ("a", "b")}

    def namespace(self, name: str) -> str:
        return f"{self.tag}-{name}"

    def up(self) -> None:
        for name in ("relay", "a", "b"):
            sh("ip", "netns", "add", self.namespace(name))
            sh("ip", "-n", self.namespace(name), "link", "set", "lo", "up")
        for side, name in ((1, "a"), (2, "b")):
            relay, node = self.namespace("relay"), self.namespace(name)
            sh("ip", "-n", relay, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", node)
            sh("ip", "-n", relay, "addr", "add", f"10.99.{side}.1/24", "dev", f"to-{name}")
            sh("ip", "-n", node, "addr", "add", f"10.99.{side}.2/24", "dev", "eth0")
            sh("ip", "-n", relay, "link", "set", f"to-{name}", "up")
            sh("ip", "-n", node, "link", "set", "eth0", "up")
        sh(*ISTHMUS, "ca", "init", "--dir", str(self.ca))

    def down(self) -> None:
        for node in self.nodes.values():
            if node.process is not None:
                node.kill()
        if self.relay is not None:
            self.relay.kill()
            self.relay.wait()
        for name in ("relay", "a", "b"):
            subprocess.run(["ip", "netns", "del", self.namespace(name)], check=False, capture_output=True)

    def start_relay(self, *, hours: float = 24.0, limit: int = 0) -> None:
        """``limit``: its limit on open files, 0 for the machine's."""
        config = self.directory / "relay.yaml"
        where = self.directory / "relay"
        config.write_text(
            f"name: r1\nlisten: 0.0.0.0:{PORT}\nca-directory: {self.ca}\ncertificate-hours: {hours}\n"
            f"state-directory: {where}/state\nrun-directory: {where}/run\n"
        )
        limited = ["prlimit", f"--nofile={limit}:{limit}"] if limit else []
        log = (self.directory / "relay.log").open("a")
        self.relay = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace("relay"), *limited, *ISTHMUS, "relay", "--config", str(config)],
            stdout=log,
            stderr=log,
        )

    def stop_relay(self, number: signal.Signals) -> int:
        assert self.relay is not None
        self.relay.send_signal(number)
        return self.relay.wait(10)

    def relay_report(self) -> dict[str, Any]:
        """The relay's own report; empty while it does not answer."""
        found = subprocess.run(
            [*ISTHMUS, "relay", "--config", str(self.directory / "relay.yaml"), "--status", "-o", "json"],
            capture_output=True,
            text=True,
            check=False,
        )
        return json.loads(found.stdout) if found.stdout else {}

    def token(self, node: str) -> None:
        """Make a token, as an administrator does, and put it where the node looks."""
        side = 1 if node == "a" else 2
        issuer = f"10.99.{side}.1:{PORT}"
        text = sh(*ISTHMUS, "token", "create", "--dir", str(self.ca), "--node", node, "--issuer", issuer)
        self.nodes[node].state.mkdir(exist_ok=True)
        (self.nodes[node].state / "token").write_text(text)

    def revoke(self, node: str) -> float:
        """Returns when."""
        at_s = time.time()
        sh(*ISTHMUS, "node", "revoke", node, "--dir", str(self.ca))
        return at_s


@contextlib.contextmanager
def net(directory: Path) -> Iterator[Net]:
    """Namespaces for one test."""
    made = Net(directory)
    try:
        made.up()
        yield made
    finally:
        made.down()
