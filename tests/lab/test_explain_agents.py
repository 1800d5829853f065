"""status, trace, doctor and uninstall of real agents: what they say is what packets do, and faults are found by name.

The lab is drawn in agents_lab.py.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from agents_lab import LAB, http, isthmus, manifests, service, write
from labkit import LabMaker, eventually

from isthmus.lab.cluster import Lab


@pytest.fixture(scope="module")
def lab(make_module_lab: LabMaker, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_module_lab(LAB, name="explain", manifests=manifests(tmp_path_factory.mktemp("explain") / "manifests"))


def ask(lab: Lab, node: str, *arguments: str) -> tuple[int, Any]:
    """Exit code and JSON of a command on a node."""
    done = isthmus(lab, node, *arguments, "-o", "json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def trace(lab: Lab, node: str, source: str, destination: str, *more: str) -> tuple[int, dict[str, Any]]:
    code, result = ask(lab, node, "trace", source, destination, *more)
    return code, {"conclusion": result["conclusion"]} | {hop["hop"]: hop for hop in result["hops"]}


def checks(lab: Lab, node: str) -> dict[str, dict[str, Any]]:
    return {one["code"]: one for one in ask(lab, node, "doctor")[1]["results"]}


def test_a_trace_tells_the_path_that_traffic_takes(lab: Lab) -> None:
    # How soon it answers is the matter of test_agent_reach.py; here it only has to.
    eventually(lambda: http(lab, "client-a", "http://b.shop/"), 20.0)
    code, hops = trace(lab, "edge-1", "client-a", "b.shop")
    assert code == 0, hops
    assert [hops[name]["held"] for name in ("dns", "interception", "endpoint", "path")] == ["ok"] * 4
    assert hops["path"]["rule"] == "relayed" and hops["endpoint"]["outcome"] == "172.17.0.2:8080 on edge-2"
    assert hops["dns"]["object"] == "Service shop/b" and ".yaml:" in hops["dns"]["place"]


def test_a_direct_path_and_an_endpoint_here_are_told_apart(lab: Lab) -> None:
    eventually(lambda: http(lab, "client-a", "http://cloud.shop/"))
    code, hops = trace(lab, "edge-1", "client-a", "cloud.shop")
    assert (code, hops["path"]["rule"], hops["path"]["held"]) == (0, "direct-works", "ok")
    assert trace(lab, "edge-1", "client-a", "a.shop")[1]["path"]["rule"] == "same-node"


def test_a_name_that_does_not_exist_is_the_same_to_trace_and_to_dig(lab: Lab) -> None:
    code, hops = trace(lab, "edge-1", "client-a", "nothing.shop.svc.cluster.local.")
    assert (code, hops["dns"]["rule"], hops["dns"]["held"]) == (1, "no-such-service", "ok")
    assert "NXDOMAIN" in lab.run("client-a", ["dig", "nothing.shop.svc.cluster.local"]).stdout


def test_an_endpoint_that_refused_is_told_to_rest(lab: Lab) -> None:
    write(lab, "dead.yaml", service("dead", "10.96.1.90", [("edge-1", "172.17.0.3")]))

    def rests() -> bool:
        http(lab, "client-a", "http://10.96.1.90/", 1.0)
        return bool(trace(lab, "edge-1", "client-a", "10.96.1.90:80")[1]["endpoint"]["rule"] == "all-resting")

    eventually(rests)
    rows = ask(lab, "edge-1", "dump", "endpoints")[1]
    assert [row["resting"] for row in rows if row["name"] == "dead"] == [True]


def test_rules_that_somebody_deleted_are_a_difference_until_they_are_back(lab: Lab) -> None:
    def differs() -> bool:
        lab.run("edge-2", ["nft", "delete", "table", "inet", "isthmus"])
        code, hops = trace(lab, "edge-2", "client-b", "10.96.1.1:80")
        return code == 1 and hops["interception"]["held"] == "differs"

    eventually(differs, what="trace sees that the rules are gone")
    eventually(lambda: trace(lab, "edge-2", "client-b", "10.96.1.1:80")[0] == 0, 15.0, "they are put back")
    assert checks(lab, "edge-2")["interception"]["state"] == "warning", "somebody deletes our rules"


EARLY = "table inet early { chain pre { type nat hook prerouting priority -195; tcp dport 80 dnat ip to 192.0.2.1; }; }"


def test_rules_of_others_that_act_before_ours_are_found(lab: Lab) -> None:
    assert checks(lab, "cloud-1")["firewall"]["state"] == "ok"
    assert lab.run("cloud-1", ["nft", EARLY]).returncode == 0
    try:
        found = checks(lab, "cloud-1")["firewall"]
        assert found["state"] == "warning" and found["details"][0].startswith("inet early pre: NAT at prerouting")
    finally:
        lab.run("cloud-1", ["nft", "delete", "table", "inet", "early"])


def test_a_dns_worker_that_hangs_is_found_and_a_trace_does_not_guess(lab: Lab) -> None:
    workers = ask(lab, "edge-1", "status")[1]["workers"]
    pid = next(worker["pid"] for worker in workers if worker["name"] == "dns")
    os.kill(pid, signal.SIGSTOP)
    try:
        _, hops = trace(lab, "edge-1", "client-a", "a.shop")
        assert hops["dns"]["held"] == "not checked"
        found = checks(lab, "edge-1")["dns"]
        assert found["state"] == "error" and "does not answer" in found["text"]
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: checks(lab, "edge-1")["dns"]["state"] == "ok")


def test_a_broken_manifest_is_told_with_file_and_line(lab: Lab) -> None:
    write(lab, "broken.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\nspec: {ports: 5}\n")
    try:
        eventually(lambda: "broken.yaml" in isthmus(lab, "edge-1", "status").stdout)
        assert checks(lab, "edge-1")["store"]["state"] == "warning"
    finally:
        (lab.store_directory / "broken.yaml").unlink()
    eventually(lambda: "broken.yaml" not in isthmus(lab, "edge-1", "status").stdout)


def test_a_node_that_was_uninstalled_is_gone_for_others_and_clean_itself(lab: Lab) -> None:
    """Last, for the lab is not whole after it."""
    config = str(Path(lab.environment("edge-2")["ISTHMUS_RUN_DIRECTORY"]).parent / "agent.yaml")
    assert isthmus(lab, "edge-2", "uninstall", "-c", config).returncode == 1, "not under a running agent"
    code, outcome = ask(lab, "edge-2", "uninstall", "-c", config, "--force")
    assert code == 0 and any("rules" in text for text in outcome["removed"])
    assert "isthmus" not in lab.run("edge-2", ["nft", "list", "ruleset"]).stdout.lower()
    assert "isthmus0" not in lab.run("edge-2", ["ip", "link"]).stdout
    done = isthmus(lab, "edge-2", "status")
    assert done.returncode == 1 and "[agent.absent]" in done.stderr

    def lost() -> bool:
        http(lab, "client-a", "http://b.shop/", 1.0)
        code, hops = trace(lab, "edge-1", "client-a", "b.shop")
        return code == 1 and hops["path"]["rule"] == "no-path"

    eventually(lost, 15.0, "the other node finds out")
    found = checks(lab, "edge-1")["peers"]
    assert found["state"] == "warning" and any("edge-2" in text for text in found["details"])
