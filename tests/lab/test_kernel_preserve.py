"""A preserved client: the endpoint sees the pod's own address, and its answers come back to the proxy, although both
pods are ports of one bridge."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_foreign import lay
from kernel_node import Node, ask_tcp, child, running_node, serve_name, settings, sh

from isthmus.kernel.interception import Interception
from isthmus.kernel.original_destination import Method
from isthmus.model.settings import Backend
from isthmus.plan.interception import Handover, Preserved

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

ENDS = (Preserved("172.17.0.3", 8080), Preserved("fd00:17::3", 8080))
WEB = {4: "10.96.0.80", 6: "fd00:10:96::80"}
ENDPOINT = {4: "172.17.0.3", 6: "fd00:17::3"}


@pytest.fixture(
    scope="module",
    params=[
        (backend, handover, bridged)
        for backend in (Backend.NFTABLES, Backend.IPTABLES)
        for handover in Handover
        for bridged in (1, 0)
    ],
    ids=lambda case: f"{case[0]}-{case[1]}-bridge-nf-call-iptables={case[2]}",
)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    backend, handover, bridged = request.param
    with running_node("c", tmp_path_factory.mktemp("state")) as made:
        sh(
            f"sysctl -qw net.bridge.bridge-nf-call-iptables={bridged} net.bridge.bridge-nf-call-ip6tables={bridged}",
            made.node,
        )
        lay(made.node, "legacy")
        made.apply(settings(backend, handover), preserved=ENDS)
        made.start_taker(Method.GETSOCKOPT if handover is Handover.DNAT else Method.TPROXY, preserve_to=8080)
        made.start(made.endpoint, lambda ready: serve_name(ready, "endpoint", 8080))
        yield made


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("source", ["client", "routed"])
def test_the_endpoint_sees_the_address_and_port_of_the_client(node: Node, source: str, version: int) -> None:
    for _ in range(3):
        answer = ask_tcp(getattr(node, source), WEB[version], 80, timeout_s=5)
        seen = answer["endpoint"]
        assert seen.startswith("{"), seen
        assert json.loads(seen)["client"] == answer["me"]


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("source", ["client", "node"])
def test_connections_that_are_not_the_proxys_reach_the_endpoint_as_before(
    node: Node, source: str, version: int
) -> None:
    assert ask_tcp(getattr(node, source), ENDPOINT[version], 8080)["name"] == "endpoint"


def test_a_bridge_that_changes_its_hardware_address_is_followed(tmp_path: Path) -> None:
    how = settings(Backend.NFTABLES, Handover.DNAT)
    with running_node("m", tmp_path) as made:
        made.apply(how, preserved=ENDS)
        made.start_taker(preserve_to=8080)
        made.start(made.endpoint, lambda ready: serve_name(ready, "endpoint", 8080))
        sh("ip link set br0 address 02:42:ac:11:00:77", made.node)
        assert made.apply(how, preserved=ENDS) == ("bridge rules changed",)
        assert '"name": "endpoint"' in ask_tcp(made.client, WEB[4], 80, timeout_s=5)["endpoint"]


def test_one_endpoint_more_is_one_element_and_the_last_one_takes_all_away(tmp_path: Path) -> None:
    how = settings(Backend.NFTABLES, Handover.DNAT)

    def act() -> list[tuple[str, ...]]:
        ours = Interception(how, tmp_path, "boot")
        plans = [made.plan(how, preserved=ends) for ends in ((), ENDS[:1], ENDS, ())]
        return [ours.apply(plan).changed for plan in plans]

    with running_node("l", tmp_path) as made:
        first, one, two, none = child(made.node, act)
        assert "rules made" in first and "bridge rules made" in one
        assert two == ("1 elements changed", "bridge rules changed")
        assert "bridge rules deleted" in none
        assert "isthmus" not in sh("nft list tables bridge; ip rule", made.node)
