"""Which way a stream takes between nodes: direct, dialled by the peer, or relayed; and how soon each is found."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from agents_lab import LAB, http, isthmus, manifests, status, within
from labkit import LabMaker, eventually

from isthmus.lab.agents import start_agent, start_relay
from isthmus.lab.cluster import Lab

TWO_RELAYS = LAB.replace(
    "  - {name: relay-host, address: 203.0.113.100}\n",
    "  - {name: relay-host, address: 203.0.113.100}\n  - {name: spare-host, address: 203.0.113.101}\n",
).replace(
    "  - {name: relay-1, at: relay-host}\n",
    "  - {name: relay-1, at: relay-host}\n  - {name: relay-2, at: spare-host}\n",
)


@pytest.fixture(scope="module")
def lab(make_module_lab: LabMaker, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_module_lab(
        TWO_RELAYS, name="paths", manifests=manifests(tmp_path_factory.mktemp("paths") / "manifests")
    )


def links(lab: Lab, node: str, peer: str) -> list[dict[str, object]]:
    """The open connections of ``node`` to ``peer``."""
    rows = json.loads(isthmus(lab, node, "dump", "links", "-o", "json").stdout)
    return [row for row in rows if row["node"] == peer and row["state"] != "no connection"]


def test_the_first_relayed_request_succeeds_within_two_seconds_of_the_last_process(lab: Lab) -> None:
    assert eventually(lambda: http(lab, "client-a", "http://b.shop/"))
    for kind, name in (("agent", "edge-1"), ("agent", "edge-2"), ("relay", "relay-1"), ("relay", "relay-2")):
        lab.stop(kind, name)
    for name in ("relay-1", "relay-2"):
        start_relay(lab, name)
    start_agent(lab, "edge-2")
    eventually(lambda: (lab.node_directory("edge-2") / "run" / "agent.sock").exists(), 15)
    start = time.monotonic()
    start_agent(lab, "edge-1")
    within(10, lambda: http(lab, "client-a", "http://10.96.1.3/", 0.25).get("node") == "edge-2")
    took_s = time.monotonic() - start
    assert {row["path"] for row in links(lab, "edge-1", "edge-2")} == {"relayed"}
    print(f"first relayed request after {took_s:.2f} s")
    assert took_s < 2.0 * _slowness(), f"{took_s:.2f} s"


def _slowness() -> float:
    """How much slower this machine starts a Python process than 100 ms, at least 1: other work may share it."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import asyncio, ssl, msgspec, cryptography.x509"], check=True)
    return max(1.0, (time.monotonic() - start) / 0.15)


def test_a_node_behind_a_nat_is_reached_by_asking_it_to_dial(lab: Lab) -> None:
    assert eventually(lambda: http(lab, "client-cloud", "http://a.shop/").get("node") == "edge-1")
    assert eventually(lambda: "reverse" in {row["path"] for row in links(lab, "cloud-1", "edge-1")}, 10)
    trace = isthmus(lab, "cloud-1", "trace", "default/client-cloud", "a.shop").stdout
    assert "reverse" in trace


@contextlib.contextmanager
def closed(lab: Lab, node: str, port: int) -> Iterator[None]:
    """Packets from others to a TCP port of ``node`` vanish."""
    rules = (
        f"table inet closed {{\n chain in {{\n type filter hook input priority -300\n tcp dport {port} drop\n }}\n}}\n"
    )
    lab.run(node, ["nft", "-f", "-"], stdin=rules, check=True)
    try:
        yield
    finally:
        lab.run(node, ["nft", "delete", "table", "inet", "closed"], check=True)


def test_a_direct_path_that_closes_is_replaced_and_used_again_when_it_opens(lab: Lab) -> None:
    assert eventually(lambda: http(lab, "client-b", "http://cloud.shop/"))
    assert eventually(lambda: "direct" in {row["path"] for row in links(lab, "edge-2", "cloud-1")})
    with closed(lab, "cloud-1", 20006):
        lab.stop("agent", "edge-2")
        start_agent(lab, "edge-2")
        start = time.monotonic()
        assert eventually(lambda: http(lab, "client-b", "http://cloud.shop/", 2), 15)
        assert time.monotonic() - start < 8
        assert {row["path"] for row in links(lab, "edge-2", "cloud-1")} == {"relayed"}

    def direct_again() -> bool:
        assert http(lab, "client-b", "http://cloud.shop/", 2)
        return "direct" in {row["path"] for row in links(lab, "edge-2", "cloud-1")}

    assert eventually(direct_again, 40)


@pytest.mark.parametrize("gone", ["relay-1", "relay-2"])
def test_when_one_relay_is_gone_the_other_serves(lab: Lab, gone: str) -> None:
    assert eventually(lambda: http(lab, "client-a", "http://b.shop/"), 15)
    assert eventually(lambda: _present(lab, "edge-1") == _present(lab, "edge-2") == {"relay-1", "relay-2"}, 15)
    lab.stop("relay", gone)
    try:
        within(5, lambda: http(lab, "client-a", "http://b.shop/", 1).get("node") == "edge-2")
    finally:
        start_relay(lab, gone)


def _present(lab: Lab, node: str) -> set[str]:
    """The relays that ``node`` has a channel to."""
    return {row["name"] for row in status(lab, node)["relays"] if row["connected"]}  # type: ignore[attr-defined]


def test_nodes_that_share_no_relay_learn_of_each_other_over_their_link(lab: Lab) -> None:
    for kind, name in (("relay", "relay-1"), ("relay", "relay-2"), ("agent", "edge-1"), ("agent", "cloud-1")):
        lab.stop(kind, name)
    try:
        for name in ("cloud-1", "edge-1"):
            start_agent(lab, name)
        assert eventually(lambda: http(lab, "client-a", "http://cloud.shop/", 2), 15)
        for here, there in (("cloud-1", "edge-1"), ("edge-1", "cloud-1")):
            assert eventually(lambda here=here, there=there: "announcement" in _sources(lab, here)[there])
    finally:
        for name in ("relay-1", "relay-2"):
            start_relay(lab, name)
    assert eventually(lambda: http(lab, "client-a", "http://b.shop/", 2), 15)


def _sources(lab: Lab, node: str) -> dict[str, str]:
    """Where ``node`` knows each of its peers from."""
    return {row["node"]: row["source"] for row in status(lab, node)["peers"]}  # type: ignore[attr-defined]


def test_an_endpoint_that_is_not_the_node_s_own_is_refused_and_counted(lab: Lab) -> None:
    """edge-2's store says that edge-1 has an endpoint which edge-1's own store does not give it."""
    before = _admission(lab, "edge-1")
    lab.stop("agent", "edge-2")
    directory = lab.node_directory("edge-2")
    settings = directory / "agent.yaml"
    text = settings.read_text()
    lying = directory / "lying"
    subprocess.run(["cp", "-r", str(lab.store_directory), str(lying)], check=True)
    other = (lying / "a.yaml").read_text().replace("172.17.0.2", "172.17.0.3").replace('"port": 8080', '"port": 22')
    (lying / "a.yaml").write_text(other)
    settings.write_text(text.replace(str(lab.store_directory), str(lying)))
    try:
        start_agent(lab, "edge-2")
        eventually(lambda: status(lab, "edge-2").get("healthy"), 15)
        assert http(lab, "client-b", "http://a.shop/", 2) == {}
        assert eventually(lambda: _admission(lab, "edge-1") > before)
    finally:
        lab.stop("agent", "edge-2")
        settings.write_text(text)
        start_agent(lab, "edge-2")
    assert eventually(lambda: http(lab, "client-b", "http://a.shop/", 2), 15)


def _admission(lab: Lab, node: str) -> int:
    counters = status(lab, node)["counters"]
    assert isinstance(counters, dict)
    return sum(number for reason, number in counters["data"]["admission"].items() if reason != "own-endpoint")


def test_a_revoked_node_is_out_everywhere_within_a_minute(lab: Lab) -> None:
    """Last in this file: the node stays out."""
    assert eventually(lambda: http(lab, "client-cloud", "http://b.shop/"))
    done = lab.run(
        "relay-host",
        [sys.executable, "-m", "isthmus", "node", "revoke", "edge-2", "--dir", str(lab.authority_directory)],
    )
    assert done.returncode == 0, done.stderr
    took_s = within(
        60,
        lambda: (
            not links(lab, "cloud-1", "edge-2")
            and http(lab, "client-cloud", "http://b.shop/", 1) == {}
            and http(lab, "client-a", "http://b.shop/", 1) == {}
            and http(lab, "client-b", "http://cloud.shop/", 1) == {}
        ),
    )
    assert took_s < 60
    done = isthmus(lab, "edge-2", "status")
    assert done.returncode == 1
    assert "revoked" in done.stdout
