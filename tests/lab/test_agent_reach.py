"""A service name works from any site, for TCP and UDP, from pods and host processes, and changes are live at once."""

import json
import subprocess
from pathlib import Path

import pytest
from agents_lab import LAB, A, B, http, isthmus, manifests, python, service, status, udp, within, write
from labkit import LabMaker, eventually

from isthmus.lab.cluster import Lab

PODS = ("client-cloud", "client-a", "client-b")
HOME = {"cloud": "cloud-1", "a": "edge-1", "b": "edge-2"}


@pytest.fixture(scope="module")
def lab(make_module_lab: LabMaker, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_module_lab(LAB, name="reach", manifests=manifests(tmp_path_factory.mktemp("reach") / "manifests"))


@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("name", HOME)
def test_a_service_answers_by_name_from_every_site(lab: Lab, pod: str, name: str) -> None:
    answer = eventually(lambda: http(lab, pod, f"http://{name}.shop/"), what=f"{pod} calls {name}")
    assert isinstance(answer, dict)
    assert answer["node"] == HOME[name]


@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("name", HOME)
def test_datagrams_come_back_from_every_site(lab: Lab, pod: str, name: str) -> None:
    answer = eventually(lambda: udp(lab, pod, f"{name}.shop.svc.cluster.local"), what=f"{pod} sends to {name}")
    assert isinstance(answer, dict)
    assert answer["node"] == HOME[name]


@pytest.mark.parametrize("name", HOME)
def test_a_process_of_the_node_itself_reaches_services(lab: Lab, name: str) -> None:
    address = {"cloud": "10.96.1.1", "a": "10.96.1.2", "b": "10.96.1.3"}[name]
    answer = eventually(lambda: http(lab, "edge-1", f"http://{address}/"))
    assert isinstance(answer, dict)
    assert answer["node"] == HOME[name]
    assert udp(lab, "edge-1", address)["node"] == HOME[name]


def test_every_endpoint_of_a_service_takes_its_turn(lab: Lab) -> None:
    seen = {http(lab, "client-a", "http://all.shop/").get("node") for _ in range(6)}
    assert seen == {"cloud-1", "edge-1", "edge-2"}


def test_a_member_on_another_site_with_our_own_address_is_the_one_that_was_meant(lab: Lab) -> None:
    """web-a and web-b both have 172.17.0.2: DNS gives the far one a virtual address."""
    answers = lab.run("client-a", ["dig", "+short", "members.shop.svc.cluster.local"]).stdout.split()
    assert "172.17.0.2" in answers
    assert len([address for address in answers if address.startswith("240.96.")]) == 2
    nodes = {http(lab, "client-a", f"http://{address}:8080/").get("node") for address in answers}
    assert nodes == {"cloud-1", "edge-1", "edge-2"}


SIX_ENDPOINTS = """
import socket, sys, threading
s = socket.socket(socket.AF_INET6); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("::", 8006)); s.listen()
print("up", flush=True)
c, _ = s.accept(); c.sendall(b"six " + c.recv(100)); c.close()
"""


def test_ipv6_services_are_intercepted_too(lab: Lab) -> None:
    address = next(text for text in lab.place("web-a").addresses if ":" in text)
    six = json.loads(service("six", "fd00:10:96::6", [("edge-1", address)]).split("\n---\n")[0])
    del six
    ports = [{"port": 8006, "name": "six", "protocol": "TCP"}]
    text = json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "six", "namespace": "shop"},
            "spec": {"clusterIP": "fd00:10:96::6", "ipFamilies": ["IPv6"], "ports": ports},
        }
    )
    text += "\n---\n" + json.dumps(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "six-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "six"}},
            "addressType": "IPv6",
            "ports": ports,
            "endpoints": [{"addresses": [address], "nodeName": "edge-1"}],
        }
    )
    write(lab, "six.yaml", text)
    ask = "import socket,sys; s=socket.create_connection((sys.argv[1],8006),3); s.sendall(b'x'); print(s.recv(99))"
    for client in ("client-a", "client-b"):
        server = subprocess.Popen(
            lab.command("web-a", ["python3", "-c", SIX_ENDPOINTS]),
            stdout=subprocess.PIPE,
            text=True,
            env=lab.environment("web-a"),
        )
        assert server.stdout is not None
        server.stdout.readline()
        try:
            done = eventually(lambda who=client: _ok(python(lab, who, ask, "six.shop.svc.cluster.local")))
            assert "six x" in str(done)
        finally:
            server.kill()
            server.wait()


def _ok(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_annotated_service_sees_its_client_s_address_on_its_own_node(lab: Lab) -> None:
    kept = service("kept", "10.96.2.7", [A], annotations={"isthmus.dev/preserve-client-address": "true"})
    write(lab, "kept.yaml", kept)
    answer = eventually(lambda: http(lab, "client-a", "http://10.96.2.7/", 2), what="a client on the endpoint's node")
    assert isinstance(answer, dict)
    assert answer["client"] == lab.place("client-a").addresses[0]
    assert eventually(lambda: http(lab, "client-b", "http://10.96.2.7/", 2), what="a client elsewhere")
    plain = http(lab, "client-a", "http://a.shop/")
    assert plain["client"] == "172.17.0.1", "by default endpoints see the node's address"


def test_an_ignored_service_is_left_to_others(lab: Lab) -> None:
    rules = isthmus(lab, "edge-1", "dump", "rules").stdout
    assert "ignore shop/ignored service" in rules
    assert http(lab, "client-a", "http://10.96.1.9/", timeout_s=1) == {}
    trace = isthmus(lab, "edge-1", "trace", "default/client-a", "ignored.shop").stdout
    assert "ignored-service" in trace
    assert "noproxy=edgemesh" in trace
    assert "Isthmus leaves it alone" in trace


def test_a_change_of_the_store_is_live_within_a_second(lab: Lab) -> None:
    write(lab, "moved.yaml", service("moved", "10.96.2.1", [A]))
    assert eventually(lambda: http(lab, "client-a", "http://10.96.2.1/").get("node") == "edge-1")
    write(lab, "moved.yaml", service("moved", "10.96.2.1", [B]))
    assert within(1.0, lambda: http(lab, "client-a", "http://10.96.2.1/").get("node") == "edge-2") < 1.0


def test_a_broken_file_is_named_and_the_last_good_state_stays(lab: Lab) -> None:
    write(lab, "broken.yaml", service("broken", "10.96.2.2", [A]))
    assert eventually(lambda: http(lab, "client-b", "http://10.96.2.2/"))
    text = service("broken", "10.96.2.2", [A]).replace('"port": 80,', '"port": 99999,')
    write(lab, "broken.yaml", text)
    problem = eventually(lambda: [p for p in _problems(lab) if "broken.yaml:" in p and "spec.ports[0].port" in p])
    assert problem
    assert http(lab, "client-b", "http://10.96.2.2/")
    (lab.store_directory / "broken.yaml").unlink()
    assert eventually(lambda: not _problems(lab))
    assert eventually(lambda: not http(lab, "client-b", "http://10.96.2.2/", timeout_s=1))


def _problems(lab: Lab) -> list[str]:
    store = status(lab, "edge-2")["store"]
    assert isinstance(store, dict)
    return list(store["problems"])


def test_trace_names_every_hop_and_ends_well(lab: Lab) -> None:
    done = isthmus(lab, "edge-1", "trace", "default/client-a", "b.shop:80")
    assert done.returncode == 0, done.stdout + done.stderr
    for hop in ("dns", "interception", "endpoint", "path", "admission"):
        assert f". {hop}:" in done.stdout
    assert "relayed by relay-1" in done.stdout
    assert "b.yaml:1" in done.stdout


def test_status_is_healthy_and_machine_readable(lab: Lab, tmp_path: Path) -> None:
    for node in ("cloud-1", "edge-1", "edge-2"):
        done = isthmus(lab, node, "status", "-o", "json")
        assert json.loads(done.stdout)["healthy"], done.stdout
        assert done.returncode == 0
