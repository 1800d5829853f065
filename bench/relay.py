"""Through the relay: links between two nodes that only a relay joins, beside the direct connection.

    client ── node A ────────── node B ── server        direct is routed over both nodes
                 └─── relay ───────┘                    every process of this on the same processors

The relay is the real command with a test authority; nodes enrol nothing here, their certificates come from it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from bench import link
from bench.harness import Row, interleave, medians
from isthmus.relay import authority
from isthmus.relay.keystore import KeyStore
from isthmus.wire.identity import Holder, Role

HERE = Path(__file__).parent
RELAY = "link-bench-r"
RELAY_PORT = 20004
ROUNDS, SECONDS = 3, 1.5

MEASURED = {  # load, arguments, least share of direct, unit
    "one stream": ("bulk", ["1"], 0.20, "Gbit/s"),
    "eight streams": ("bulk", ["8"], 0.15, "Gbit/s"),
    "requests/s, kept connection": ("requests", ["1"], 0.25, "/s"),
    "new connections/s": ("connections", ["16"], 0.20, "/s"),
}


def rows() -> Iterable[Row]:
    """Measure; for ``python -m bench relay``."""
    os.environ["PYTHONPATH"] = os.pathsep.join((str(HERE.parent / "src"), str(HERE)))
    processes = link.Processes()
    with tempfile.TemporaryDirectory() as text:
        try:
            _lay_out()
            _start(processes, Path(text))
            for title, (role, arguments, target, unit) in MEASURED.items():
                ways = {
                    way: (lambda way=way, role=role, args=arguments: link.load(way, role, args, SECONDS)["value"])
                    for way in ("direct", "isthmus")
                }
                runs = interleave(ways, ROUNDS)
                shares = sorted(mine / direct for mine, direct in zip(runs["isthmus"], runs["direct"], strict=True))
                middle = medians(runs)
                detail = f"relayed {middle['isthmus']:.1f} {unit}, direct {middle['direct']:.1f} {unit}"
                yield Row(title, shares[len(shares) // 2], detail, target)
        finally:
            processes.stop()
            link.clear()
            subprocess.run(["ip", "netns", "del", RELAY], check=False, stderr=subprocess.DEVNULL)


def _lay_out() -> None:
    link.lay_out()
    subprocess.run(["ip", "netns", "del", RELAY], check=False, stderr=subprocess.DEVNULL)
    link.sh(f"ip netns add {RELAY}")
    link.sh(f"ip -n {RELAY} link set lo up")
    for node, net in ((link.NODE_A, 4), (link.NODE_B, 5)):
        link.sh(f"ip link add v{net} netns {RELAY} type veth peer name v{net} netns {node}")
        link.sh(f"ip -n {RELAY} addr add 10.77.{net}.1/24 dev v{net}")
        link.sh(f"ip -n {node} addr add 10.77.{net}.2/24 dev v{net}")
        link.sh(f"ip -n {RELAY} link set v{net} up")
        link.sh(f"ip -n {node} link set v{net} up")


def start_relay(processes: link.Processes, directory: Path, space: str, listen: str) -> authority.Authority:
    """A relay with a fresh authority in namespace ``space``; returns the authority once the relay listens."""
    made = authority.init(directory / "ca", "bench", now_s=time.time())
    config = directory / "relay.yaml"
    config.write_text(
        f"name: r1\nlisten: {listen}\nca-directory: {directory}/ca\n"
        f"state-directory: {directory}/relay\nrun-directory: {directory}/run\n"
    )
    processes.start(space, [sys.executable, "-m", "isthmus", "relay", "--config", str(config)])
    return made


def credentials(made: authority.Authority, directory: Path, node: str) -> list[str]:
    """Files of a node's certificate: authority, certificate, key."""
    store = KeyStore(directory / node)
    store.prepare()
    certificate = made.issue_local(store.pending_key(), (Holder(Role.NODE, node),), now_s=time.time(), life_s=3_600)
    files = store.install(certificate, made.certificate).files
    return [files.ca_file, files.certificate_file, files.key_file]


def _start(processes: link.Processes, directory: Path) -> None:
    server = ["server", "10.77.3.2", str(link.SERVER_PORT)]
    processes.start(link.SERVER, [sys.executable, str(HERE / "load.py"), *server])
    made = start_relay(processes, directory, RELAY, f"0.0.0.0:{RELAY_PORT}")
    ends = []
    for node, space, net in (("b", link.NODE_B, 5), ("a", link.NODE_A, 4)):
        spec = {
            "node": node,
            "port": link.LINK_PORT,
            "files": credentials(made, directory, node),
            "address": f"10.77.{net}.2:{link.LINK_PORT}",
            "relays": [["r1", f"10.77.{net}.1:{RELAY_PORT}"]],
            "listen": [["10.77.1.2", link.AGENT_PORT + n, "b", "10.77.3.2", link.SERVER_PORT + n] for n in range(3)]
            if node == "a"
            else [],
        }
        ends.append(processes.start(space, [sys.executable, str(HERE / "relaynode.py"), json.dumps(spec)]))
    assert ends[-1].stdout is not None
    ends[-1].stdout.readline()  # node A knows of node B


if __name__ == "__main__":
    for row in rows():
        print(f"{row.title:30} share {row.value:.3f} (target {row.target}) {row.detail}", flush=True)
