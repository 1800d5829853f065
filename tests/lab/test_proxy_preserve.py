"""A service annotated to preserve client addresses: its endpoint of this node sees the client, answers find back."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.bed import CLIENT, NODE, SERVERS, SERVICE_V4, Bed, ProxyProcess

from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

# What kernel/ renders for such a service: answers to a client's address go to our transparent socket.
ANSWERS = """
table ip isthmus_answers {
  chain prerouting {
    type filter hook prerouting priority mangle;
    ip saddr . tcp sport { 10.77.0.11 . 8080 } socket transparent 1 meta mark set 0x02 accept
  }
}
"""


@pytest.fixture
def bed() -> Iterator[Bed]:
    it = Bed("proxyp", routed=True)
    try:
        subprocess.run(["ip", "netns", "exec", it.node, "nft", "-f", "-"], input=ANSWERS, text=True, check=True)
        yield it
    finally:
        it.close()


@pytest.mark.parametrize(("preserve", "seen"), [(True, CLIENT), (False, NODE)])
def test_the_endpoint_sees(bed: Bed, preserve: bool, seen: str) -> None:
    proxy = ProxyProcess(bed)
    member = Member("n1", SERVERS[0], Distance.SAME_NODE, {"http": 8080})
    ports = (PortPlan(80, "http"),)
    plan = ServicePlan("shop", "web", ServiceKind.CLUSTER_IP, (SERVICE_V4,), ports=ports, members=(member,))
    proxy.put(structs.replace(plan, preserve_client_address=preserve))
    with bed.socket_in(bed.servers[0]) as listener, bed.socket_in(bed.client) as client:
        listener.bind((SERVERS[0], 8080))
        listener.listen(1)
        listener.settimeout(5)
        client.settimeout(5)
        client.connect((SERVICE_V4, 80))
        client.sendall(b"hello")
        conn, peer = listener.accept()
        assert conn.recv(10) == b"hello"
        conn.sendall(b"answer")
        assert client.recv(10) == b"answer"
        assert peer[0] == seen
        assert client.getpeername() == (SERVICE_V4, 80)
        conn.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        conn.close()
