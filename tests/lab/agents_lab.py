"""A lab of three sites with real agents, its manifests, and small clients that run inside its pods.

                      the internet (203.0.113.0/24)
        ┌───────────────┬──────────┴───┬────────────────────┐
     cloud-1         relay-host   symmetric NAT        symmetric NAT
     web-cloud       relay-1         edge-1               edge-2
     client-cloud                    web-a  client-a      web-b  client-b
                                     172.17.0.2  .3       172.17.0.2  .3

Nothing passes between edge-1 and edge-2 but through the relay; cloud-1 is dialled directly.
"""

import json
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

from isthmus.lab.cluster import Lab

LAB = """
sites:
  - {name: cloud, public: true}
  - {name: one, nat: {type: symmetric}}
  - {name: two, nat: {type: symmetric}}
hosts:
  - {name: relay-host, address: 203.0.113.100}
relays:
  - {name: relay-1, at: relay-host}
nodes:
  - {name: cloud-1, site: cloud, pod-cidr: 10.244.1.0/24, foreign: [flannel, kube-proxy]}
  - {name: edge-1, site: one, foreign: [docker, kube-proxy, libvirt], iptables: legacy}
  - {name: edge-2, site: two, foreign: [docker]}
pods:
  - {name: web-cloud, node: cloud-1, address: 10.244.1.10, serve: {http: [8080], tcp: [9000], udp: [9001]}}
  - {name: client-cloud, node: cloud-1, address: 10.244.1.11}
  - {name: web-a, node: edge-1, address: 172.17.0.2, serve: {http: [8080], tcp: [9000], udp: [9001]}}
  - {name: client-a, node: edge-1, address: 172.17.0.3}
  - {name: web-b, node: edge-2, address: 172.17.0.2, serve: {http: [8080], tcp: [9000], udp: [9001]}}
  - {name: client-b, node: edge-2, address: 172.17.0.3}
generate: [nodes, pods]
dual-stack: true
"""

PORTS = ((80, "http", "TCP", 8080), (9000, "echo", "TCP", 9000), (9001, "dgram", "UDP", 9001))


def service(name: str, ip: str, endpoints: list[tuple[str, str]], *, namespace: str = "shop", **extra: object) -> str:
    """A Service with one EndpointSlice of (node, address), as YAML (JSON documents are YAML)."""
    spec: dict[str, object] = {
        "clusterIP": ip,
        "ports": [{"port": port, "name": name, "protocol": kind} for port, name, kind, _ in PORTS],
    }
    spec |= dict(extra.pop("spec", {}))  # type: ignore[call-overload]
    family = "IPv6" if ":" in (endpoints[0][1] if endpoints else ip) else "IPv4"
    documents = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace} | extra,
            "spec": spec,
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-1",
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": family,
            "ports": [{"port": target, "name": name, "protocol": kind} for _, name, kind, target in PORTS],
            "endpoints": [{"addresses": [address], "nodeName": node} for node, address in endpoints],
        },
    ]
    return "\n---\n".join(json.dumps(document) for document in documents) + "\n"


CLOUD, A, B = ("cloud-1", "10.244.1.10"), ("edge-1", "172.17.0.2"), ("edge-2", "172.17.0.2")


def write(lab: Lab, file: str, text: str) -> None:
    """Replace a manifest of the store, as an editor does."""
    path = lab.store_directory / file
    fresh = path.with_name(f".{file}.new")
    fresh.write_text(text)
    fresh.rename(path)


def python(lab: Lab, label: str, script: str, *arguments: str, timeout_s: float = 30.0) -> CompletedProcess[str]:
    """Run a Python script in a pod or node."""
    return lab.run(label, [sys.executable, "-c", script, *arguments], timeout_s=timeout_s)


def http(lab: Lab, pod: str, url: str, timeout_s: float = 5.0) -> dict[str, object]:
    """The answer of the lab's server, {} for a failure."""
    done = lab.run(pod, ["curl", "-sS", "-m", str(timeout_s), url], timeout_s=timeout_s + 5)
    return json.loads(done.stdout) if done.returncode == 0 else {}


UDP_CLIENT = """
import socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(3); s.connect((host, port))
for n in range(count):
    s.send(b"datagram %d" % n)
    answer = s.recv(65535)
    assert answer.endswith(b"datagram %d" % n), answer
print(answer.decode().splitlines()[0])
"""


def udp(lab: Lab, pod: str, host: str, port: int = 9001, count: int = 3) -> dict[str, object]:
    """Exchange datagrams with the lab's server; its line, {} for a failure."""
    done = python(lab, pod, UDP_CLIENT, host, str(port), str(count))
    return json.loads(done.stdout) if done.returncode == 0 else {}


def isthmus(lab: Lab, node: str, *arguments: str) -> CompletedProcess[str]:
    """Run our command on a node, against that node's agent."""
    return lab.run(node, [sys.executable, "-m", "isthmus", *arguments])


def status(lab: Lab, node: str) -> dict[str, object]:
    """``isthmus status -o json``, {} while there is no agent."""
    done = isthmus(lab, node, "status", "-o", "json")
    return json.loads(done.stdout) if done.returncode in (0, 1) and done.stdout else {}


def within(seconds: float, condition: "object") -> float:
    """Poll ``condition`` quickly; the seconds it took. Fails after ``seconds``."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if condition():  # type: ignore[operator]
            return time.monotonic() - start
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")


def manifests(directory: Path) -> Path:
    """The services that all tests of this lab know."""
    directory.mkdir()
    texts = {
        "cloud.yaml": service("cloud", "10.96.1.1", [CLOUD]),
        "a.yaml": service("a", "10.96.1.2", [A]),
        "b.yaml": service("b", "10.96.1.3", [B]),
        "all.yaml": service("all", "10.96.1.4", [CLOUD, A, B]),
        "members.yaml": service("members", "None", [CLOUD, A, B]),
        "ignored.yaml": service("ignored", "10.96.1.9", [A], labels={"noproxy": "edgemesh"}),
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
    return directory
