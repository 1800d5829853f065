"""A lab with real agents: they enrol, serve, die and come back; and the demo tells the truth."""

import json
import signal
import subprocess
import sys
import time

import pytest
from labkit import LabMaker, eventually, heed_ctrl_c, residue

from isthmus.lab import agents
from isthmus.lab.cluster import Lab
from isthmus.lab.registry import Registry
from isthmus.lab.removal import REGISTRY, find_directory, take_down

FILE = """
dual-stack: true
generate: [nodes, pods]
sites:
  - {name: cloud, public: true}
  - {name: edge, nat: {type: symmetric}}
hosts: [{name: relay-host}]
relays: [{name: relay-1, at: relay-host}]
nodes:
  - {name: cloud-1, site: cloud, foreign: [flannel, kube-proxy]}
  - {name: edge-1, site: edge, foreign: [docker, kube-proxy, libvirt], iptables: legacy}
pods:
  - {name: echo-cloud, node: cloud-1, address: 10.244.1.10, serve: {http: [8080], udp: [9001]}}
  - {name: client, node: edge-1}
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: default}
spec:
  clusterIP: 10.96.0.80
  ports:
    - {name: http, port: 80, targetPort: 8080}
    - {name: udp, port: 9001, protocol: UDP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: echo-1, namespace: default, labels: {kubernetes.io/service-name: echo}}
addressType: IPv4
ports:
  - {name: http, port: 8080}
  - {name: udp, port: 9001, protocol: UDP}
endpoints:
  - {addresses: [10.244.1.10], nodeName: cloud-1, conditions: {ready: true}}
"""


@pytest.fixture(scope="module")
def lab(make_module_lab: LabMaker, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    manifests = tmp_path_factory.mktemp("manifests")
    (manifests / "echo.yaml").write_text(SERVICE)
    made = make_module_lab(FILE, name="agents", manifests=manifests)
    agents.wait_ready(made, made.agent_nodes())
    return made


def who_answers(lab: Lab) -> str:
    """The pod that answers the edge's client, '' if none does at once."""
    done = lab.run("client", ["curl", "-s", "-m", "3", "http://echo/"])
    return json.loads(done.stdout)["pod"] if done.returncode == 0 else ""


def test_a_pod_behind_a_nat_calls_a_service_by_its_name(lab):
    assert eventually(lambda: who_answers(lab)) == "default/echo-cloud"


def test_datagrams_travel_as_well(lab):
    def echoed() -> bool:
        done = lab.run("client", ["socat", "-t1", "-", "UDP:10.96.0.80:9001"], stdin="hello")
        return done.stdout.endswith("\nhello")

    eventually(echoed, 10.0)


def test_a_nodes_command_line_finds_its_own_agent(lab):
    for node in ("cloud-1", "edge-1"):
        done = lab.run(node, ["isthmus", "status", "-o", "json"])
        assert json.loads(done.stdout)["node"] == node, done.stderr


def test_foreign_rules_are_unchanged_while_agents_run(lab):
    assert {node: lab.foreign_changes(node) for node in lab.agent_nodes()} == {"cloud-1": "", "edge-1": ""}


def test_a_second_agent_of_a_node_refuses_to_start(lab):
    settings = lab.node_directory("edge-1") / "agent.yaml"
    done = lab.run("edge-1", ["isthmus", "agent", "--config", str(settings)], timeout_s=20)
    assert (done.returncode, "[agent.already-running]" in done.stderr) == (1, True)
    assert lab.run("edge-1", ["isthmus", "status"]).returncode == 0


def test_a_killed_agent_is_seen_to_be_dead_and_serves_again_when_started(lab):
    assert lab.stop("agent", "edge-1", signal.SIGKILL)
    assert [process.pid for process in lab.processes() if process.name == "edge-1"] == [0]
    agents.start_agent(lab, "edge-1")
    assert eventually(lambda: who_answers(lab), 10.0) == "default/echo-cloud"
    assert lab.foreign_changes("edge-1") == ""


def test_a_stopped_agent_leaves_the_nodes_rules_as_they_were(lab):
    assert lab.stop("agent", "edge-1", signal.SIGTERM, 15.0)
    assert lab.foreign_changes("edge-1") == ""
    agents.start_agent(lab, "edge-1")
    eventually(lambda: who_answers(lab), 10.0)


def test_an_agent_that_ends_at_once_is_reported_with_the_end_of_its_log(lab):
    configuration = lab.node_directory("edge-1") / "agent.yaml"
    text = configuration.read_text()
    lab.stop("agent", "edge-1", signal.SIGKILL)
    (lab.node_directory("edge-1") / "run" / "agent.sock").unlink(missing_ok=True)
    configuration.write_text(f"{text}\nnonsense: 1\n")
    try:
        agents.start_agent(lab, "edge-1")
        with pytest.raises(
            agents.LabProcessDied, match=r"(?s)agent of edge-1 has ended.*nonsense: there is no such field"
        ):
            agents.wait_ready(lab, ["edge-1"])
    finally:
        configuration.write_text(text)
        agents.start_agent(lab, "edge-1")
        agents.wait_ready(lab, ["edge-1"])


def demo(name: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "isthmus", "lab", "demo", "--name", name]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **both, text=True, preexec_fn=heed_ctrl_c)


@pytest.mark.slow
def test_the_demo_goes_as_told_and_leaves_nothing(lab_name):
    started = time.monotonic()
    process = demo(lab_name)
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output
    assert "All as told" in output
    assert output.count("✓") == 11
    assert not any(residue(lab_name).values())
    assert time.monotonic() - started < 60  # 25 s is the aim, on an idle machine


def test_a_demo_that_is_interrupted_leaves_nothing(lab_name):
    process = demo(lab_name)
    eventually(lambda: any("agent" in each for each in running(lab_name)), 20.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not any(residue(lab_name).values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_while_it_waits_for_the_agents_leaves_nothing(lab_name, number):
    command = [sys.executable, "-m", "isthmus", "lab", "up", "--name", lab_name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    eventually(lambda: Registry(find_directory(lab_name) / REGISTRY).complete, 30.0)
    process.send_signal(number)
    assert "interrupted" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert not any(residue(lab_name).values())


def test_a_demo_leaves_a_lab_of_its_name_alone(lab):
    process = demo(lab.name)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, "is up already" in output) == (1, True)
    assert lab.alive("agent", "edge-1")


@pytest.mark.parametrize("agents_started", [1, 4])
def test_down_removes_agents_and_relays_that_a_killed_up_left(lab_name, agents_started):
    command = [sys.executable, "-m", "isthmus", "lab", "up", "--name", lab_name]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    eventually(lambda: len(running(lab_name)) >= agents_started, 30.0)
    process.kill()
    process.wait()
    assert residue(lab_name)["processes"]
    assert take_down(lab_name)
    eventually(lambda: not any(residue(lab_name).values()))


def running(name: str) -> list[str]:
    return [path.name for path in find_directory(name).glob("processes/agent.*.pid")]
