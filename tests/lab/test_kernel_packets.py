"""Packets of pods and of host processes reach the proxy, or do not, as the rule table says: every backend and handover,
TCP and UDP, IPv4 and IPv6, beside the rules that Docker and kube-proxy leave."""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from kernel_foreign import lay
from kernel_node import Node, ask_tcp, ask_udp, inside, running_node, serve_name, settings

from isthmus.kernel.original_destination import Method
from isthmus.kernel.sockets import mark_own
from isthmus.model.settings import Backend
from isthmus.plan.interception import Handover

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

CASES = [
    (backend, handover, foreign)
    for backend in (Backend.NFTABLES, Backend.IPTABLES)
    for handover in Handover
    for foreign in ("", "legacy", "nft")
]

WEB = {4: "10.96.0.80", 6: "fd00:10:96::80"}
API = {4: "10.96.0.1", 6: "fd00:10:96::1"}
DNS = {4: "10.96.0.10", 6: "fd00:10:96::10"}
VIRTUAL = {4: "240.96.0.7", 6: "fd00:a9fe:6011::7"}
CLIENT = {4: "172.17.0.2", 6: "fd00:17::2"}
ROUTED = {4: "10.244.9.2", 6: "fd00:9::2"}

versions = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
protocols = pytest.mark.parametrize("ask", [ask_tcp, ask_udp], ids=["TCP", "UDP"])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(part or "no foreign rules" for part in case))
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    backend, handover, foreign = request.param
    with running_node("p", tmp_path_factory.mktemp("state")) as made:
        made.foreign = foreign
        lay(made.node, foreign)
        made.apply(settings(backend, handover))
        made.start_taker(Method.GETSOCKOPT if handover is Handover.DNAT else Method.TPROXY)
        made.start(made.endpoint, lambda ready: serve_name(ready, "endpoint", 6443))
        yield made


@versions
@protocols
@pytest.mark.parametrize("address", [WEB, VIRTUAL], ids=["service range", "virtual range"])
def test_what_a_bridged_pod_sends_arrives_with_its_destination(
    node: Node, ask: Any, address: dict[int, str], version: int
) -> None:
    answer = ask(node.client, address[version], 80)
    assert answer["destination"] == [address[version], 80]
    assert answer["client"] == answer["me"]
    assert answer["me"][0] == CLIENT[version]


@versions
@protocols
def test_what_a_routed_pod_sends_arrives_with_its_destination(node: Node, ask: Any, version: int) -> None:
    answer = ask(node.routed, WEB[version], 81)
    assert answer["destination"] == [WEB[version], 81]
    assert answer["client"] == answer["me"]
    assert answer["me"][0] == ROUTED[version]


@versions
@protocols
@pytest.mark.parametrize("address", [WEB, VIRTUAL], ids=["service range", "virtual range"])
def test_what_a_host_process_sends_arrives_with_its_destination(
    node: Node, ask: Any, address: dict[int, str], version: int
) -> None:
    answer = ask(node.node, address[version], 80)
    assert answer["destination"] == [address[version], 80]
    assert answer["client"] == answer["me"]


@versions
@pytest.mark.parametrize("source", ["client", "node", "routed"])
def test_an_opted_out_service_reaches_the_rules_of_kube_proxy_where_there_are_any(
    node: Node, source: str, version: int
) -> None:
    namespace = getattr(node, source)
    if node.foreign:
        assert ask_tcp(namespace, API[version], 443)["name"] == "endpoint"
        assert ask_udp(namespace, DNS[version], 53)["name"] == "endpoint"
        return
    with pytest.raises(OSError):
        ask_tcp(namespace, API[version], 443, timeout_s=0.2)


@versions
def test_one_port_of_a_client_that_talks_to_two_services_is_told_apart(node: Node, version: int) -> None:
    """After DNAT both flows have the same peer; netfilter then changes the port, and conntrack knows the real one."""

    def act() -> list[Any]:
        answers = []
        with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(3)
            for port in (1001, 1002, 1001):
                sock.sendto(b"x", (WEB[version], port))
                answer, sender = sock.recvfrom(65536)
                answers.append((json.loads(answer), sender[:2], sock.getsockname()[1]))
        return answers

    for (answer, sender, port), asked in zip(inside(node.client, act), (1001, 1002, 1001), strict=True):
        assert answer["destination"] == [WEB[version], asked]
        assert sender == (WEB[version], asked)
        assert answer["client"] == [CLIENT[version], port]


@versions
def test_a_large_datagram_that_was_cut_in_fragments_arrives_whole(node: Node, version: int) -> None:
    assert ask_udp(node.client, WEB[version], 80, "x" * 9000)["payload"] == "x" * 9000
    assert ask_udp(node.node, WEB[version], 80, "x" * 9000)["payload"] == "x" * 9000


@versions
def test_our_own_sockets_are_never_intercepted(node: Node, version: int) -> None:
    """Marked, the connection leaves for the service's address itself, and there is nobody; unmarked it is taken."""

    def act() -> None:
        with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET) as sock:
            mark_own(sock)
            sock.settimeout(0.3)
            sock.connect((VIRTUAL[version], 80))

    with pytest.raises(OSError):
        inside(node.node, act)
