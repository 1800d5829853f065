"""A lab comes up as its file says, and goes without a trace, however it ends."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labkit import LabMaker, eventually, heed_ctrl_c, residue

from isthmus.lab.cluster import Lab
from isthmus.lab.foreign import take_listing
from isthmus.lab.loader import parse_lab_file
from isthmus.lab.processes import in_namespace, processes_in
from isthmus.lab.removal import LabBusy, LabExists, take_down
from isthmus.lab.resident import create_namespace, remove_namespace
from isthmus.model.errors import UsageError

TWO_SITES = """
sites:
  - {name: cloud, public: true}
  - {name: edge, nat: {type: symmetric}}
nodes:
  - {name: cloud-1, site: cloud, foreign: [flannel, kube-proxy], agent: false}
  - {name: edge-1, site: edge, foreign: [docker, kube-proxy, libvirt], iptables: legacy, agent: false}
  - {name: edge-2, site: edge, foreign: [docker], agent: false}
pods:
  - {name: web, node: cloud-1, serve: {http: [80], tcp: [9000], udp: [9001]}}
  - {name: far, namespace: field, node: edge-1, address: 172.17.0.9, serve: {http: [80]}}
  - {name: near, namespace: field, node: edge-2, address: 172.17.0.9, serve: {http: [80]}}
  - {name: client, namespace: field, node: edge-2}
"""


def write(directory: Path, text: str, name: str) -> Path:
    path = directory / "lab.yaml"
    path.write_text(f"name: {name}\n{text}")
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "isthmus", "lab", *arguments]


def lab_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


def root_namespace() -> str:
    """Everything that a lab could have changed in the namespace it was started from."""
    listings = [
        ["ip", "-o", "link"],
        ["ip", "-o", "addr"],
        ["ip", "route", "show", "table", "all"],
        ["ip", "rule"],
        ["nft", "-s", "list", "ruleset"],
        ["iptables-legacy-save"],
        ["sysctl", "-a", "-r", r"^net\.(ipv4\.(ip_forward|conf)|netfilter\.nf_conntrack_(udp|tcp)_timeout)"],
    ]
    texts = [subprocess.run(each, capture_output=True, text=True, check=False).stdout for each in listings]
    return "\n".join(line for text in texts for line in text.splitlines() if not line.startswith("#"))


@pytest.fixture(scope="module")
def lab(make_module_lab: LabMaker) -> Lab:
    return make_module_lab(TWO_SITES, name="life")


def answer(lab: Lab, place: str, url: str) -> dict[str, object]:
    def ask() -> dict[str, object] | None:
        done = lab.run(place, ["curl", "-s", "-m", "2", url])
        return json.loads(done.stdout) if done.returncode == 0 else None

    return eventually(ask)


def test_a_pod_behind_a_nat_reaches_a_public_pod_with_the_routers_address(lab):
    router = lab.place("edge.router").addresses[0]
    got = answer(lab, "client", f"http://{lab.place('web').addresses[0]}/x?y")
    assert (got["pod"], got["node"], got["client"], got["path"]) == ("default/web", "cloud-1", router, "/x?y")


def test_pods_of_two_nodes_with_one_address_are_two_pods(lab):
    for node, pod in (("edge-1", "field/far"), ("edge-2", "field/near")):
        assert answer(lab, node, "http://172.17.0.9/")["pod"] == pod


def test_the_servers_tcp_echo_gives_back_every_byte_and_the_half_close(lab):
    payload = "x" * 300_000
    done = lab.run("client", ["socat", "-t5", "-", f"TCP:{lab.place('web').addresses[0]}:9000"], stdin=payload)
    line, _, echo = done.stdout.partition("\n")
    assert (json.loads(line)["pod"], echo) == ("default/web", payload)


def test_the_servers_udp_echo_says_who_answered(lab):
    target = f"UDP:{lab.place('web').addresses[0]}:9001"
    line, _, echo = lab.run("client", ["socat", "-t1", "-", target], stdin="hello").stdout.partition("\n")
    assert (json.loads(line)["pod"], echo) == ("default/web", "hello")


def test_every_node_has_a_boot_id_of_its_own(lab):
    ids = {(lab.node_directory(node) / "boot_id").read_text() for node in ("cloud-1", "edge-1", "edge-2")}
    assert len(ids) == 3


def test_a_pods_resolver_is_the_agent_with_kubernetes_search_path(lab):
    text = lab.run("client", ["cat", "/etc/resolv.conf"]).stdout
    assert text.splitlines() == [
        "search field.svc.cluster.local svc.cluster.local cluster.local",
        "nameserver 169.254.96.16",
        "options ndots:5",
    ]


def test_foreign_rules_are_where_the_file_wants_them(lab):
    legacy, nft = take_listing(lab.place("edge-1").namespace).lines, take_listing(lab.place("cloud-1").namespace).lines
    assert "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE" in legacy["iptables-legacy"]
    assert any("LIBVIRT_PRT" in line for line in legacy["iptables-legacy"])
    assert not legacy["iptables-nft"]
    assert any("KUBE-MARK-MASQ" in line for line in nft["iptables-nft"])
    assert not nft["iptables-legacy"]


def test_a_listing_does_not_change_by_traffic(lab):
    before = take_listing(lab.place("cloud-1").namespace)
    answer(lab, "client", f"http://{lab.place('web').addresses[0]}/")
    assert before.difference(take_listing(lab.place("cloud-1").namespace)) == ""


def test_a_listing_shows_a_foreign_change_and_leaves_our_own_rules_out(lab):
    node = lab.place("edge-2")
    before = take_listing(node.namespace)
    lab.run("edge-2", ["nft", "add table ip isthmus; add chain ip isthmus c"], check=True)
    comment = ["-m", "comment", "--comment", "isthmus root chain", "-j", "RETURN"]
    lab.run("edge-2", ["iptables-nft", "-t", "nat", "-I", "PREROUTING", *comment], check=True)
    assert before.difference(take_listing(node.namespace)) != ""
    assert before.foreign().difference(take_listing(node.namespace).foreign()) == ""
    lab.run("edge-2", ["iptables-nft", "-t", "nat", "-D", "POSTROUTING", "1"], check=True)
    assert "MASQUERADE" in before.foreign().difference(take_listing(node.namespace).foreign())


def test_nothing_of_the_root_namespace_changes(make_lab):
    before = root_namespace()
    lab = make_lab(TWO_SITES, name="root")
    during = root_namespace()
    lab.down()
    assert before == during == root_namespace()


def test_two_labs_with_the_same_addresses_run_side_by_side(make_lab):
    first, second = make_lab(TWO_SITES, name="one"), make_lab(TWO_SITES, name="two")
    address = first.place("web").addresses[0]
    assert answer(first, "client", f"http://{address}/")["pod"] == "default/web"
    first.down()
    assert not any(residue(first.name).values())
    assert answer(second, "client", f"http://{address}/")["pod"] == "default/web"


def test_a_lab_that_is_up_is_not_brought_up_again(lab):
    with pytest.raises(LabExists):
        Lab(lab.file, lab.directory.parent).up()
    assert lab.alive("pod", "default/web")


def test_a_directory_too_long_for_agents_sockets_is_refused_before_anything_is_made(tmp_path):
    file = parse_lab_file(TWO_SITES.replace(", agent: false", ""), "lab.yaml", tmp_path)
    with pytest.raises(UsageError, match="too long a path"):
        Lab(file, tmp_path / ("x" * 100)).up()
    assert not list(tmp_path.iterdir())


def test_a_dead_process_is_reported_and_can_be_started_again(make_lab):
    lab = make_lab(TWO_SITES, name="dead")
    assert lab.stop("pod", "default/web", signal.SIGKILL)
    states = {process.name: process.pid for process in lab.processes()}
    assert states["default.web"] == 0
    assert states["field.far"] > 0
    lab.start("pod", "default/web", "default/web", ["sleep", "60"])
    assert lab.alive("pod", "default/web")


def test_the_command_line_brings_up_runs_and_takes_down(tmp_path, lab_name):
    up = lab_command("up", str(write(tmp_path, TWO_SITES, lab_name)), "--directory", str(tmp_path / "labs"))
    assert up.returncode == 0, up.stderr
    assert f"lab {lab_name} is up: 3 nodes, 4 pods" in up.stdout
    ran = lab_command("exec", "--name", lab_name, "client", "--", "sh", "-c", "cat /etc/resolv.conf; exit 7")
    assert (ran.returncode, "169.254.96.16" in ran.stdout) == (7, True)
    fed = subprocess.run(command("exec", "--name", lab_name, "client", "--", "cat"), input=b"in", capture_output=True)
    assert fed.stdout == b"in"
    # A reader that goes away ends the command by SIGPIPE, as under a shell.
    piped = (
        f"{shlex.join(command('exec', '--name', lab_name, 'client', '--', 'yes'))} | head -1; echo ${{PIPESTATUS[0]}}"
    )
    assert subprocess.run(["bash", "-c", piped], capture_output=True, text=True).stdout.split() == ["y", "141"]
    shown = lab_command("status", "--name", lab_name)
    assert (shown.returncode, "field/client" in shown.stdout) == (0, True)
    rows = json.loads(lab_command("status", "--name", lab_name, "-o", "json").stdout)
    assert {row["name"]: list(row["processes"]) for row in rows}["default/web"] == ["pod"]
    wrong = lab_command("exec", "--name", lab_name, "nobody", "--", "true")
    assert (wrong.returncode, "there is no 'nobody'" in wrong.stderr) == (2, True)
    for said in (f"lab {lab_name} is down", f"there was no lab {lab_name}"):
        down = lab_command("down", "--name", lab_name)
        assert (down.returncode, down.stdout.strip()) == (0, said)
    assert not any(residue(lab_name).values())
    assert not (tmp_path / "labs").exists()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_without_the_privilege_to_make_namespaces_it_says_so_and_leaves_nothing(tmp_path, lab_name):
    without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    arguments = command("up", str(write(tmp_path, TWO_SITES, lab_name)))
    done = subprocess.run([*without, *arguments], capture_output=True, text=True)
    assert (done.returncode, "[kernel.not-permitted]" in done.stderr) == (1, True)
    assert not any(residue(lab_name).values())


def test_a_name_belongs_to_one_lab_wherever_its_files_are(make_lab, tmp_path):
    """Namespaces are named by the lab's name: a second lab of that name would take them over."""
    first = make_lab(TWO_SITES, name="twice")
    with pytest.raises(LabExists, match="there is a lab"):
        Lab(first.file, tmp_path / "elsewhere").up()
    assert first.alive("pod", "default/web")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("made", [2, 9])
def test_an_interrupted_up_takes_down_what_it_made(tmp_path, lab_name, number, made):
    process = start_up(tmp_path, lab_name)
    wait_for_namespaces(process, lab_name, made)
    process.send_signal(number)
    assert process.wait(20) != 0
    assert not any(residue(lab_name).values())
    assert not (tmp_path / "labs").exists()


@pytest.mark.parametrize("made", [1, 3, 6, 9])
def test_down_removes_what_a_killed_up_left(tmp_path, lab_name, made):
    process = start_up(tmp_path, lab_name)
    wait_for_namespaces(process, lab_name, made)
    process.kill()
    process.wait(10)
    assert residue(lab_name)["namespaces"]
    assert take_down(lab_name)
    eventually(lambda: not any(residue(lab_name).values()))


def test_up_after_a_killed_up_starts_afresh(tmp_path, lab_name):
    process = start_up(tmp_path, lab_name)
    wait_for_namespaces(process, lab_name, 5)
    process.kill()
    process.wait(10)
    assert start_up(tmp_path, lab_name).wait(30) == 0


def test_without_its_registry_a_lab_is_found_by_its_prefix(make_lab):
    lab = make_lab(TWO_SITES, name="reg")
    (lab.directory / "registry.jsonl").unlink()
    lab.down()
    assert not any(residue(lab.name).values())


def test_down_takes_nothing_that_is_not_of_the_lab(make_lab):
    """A namespace with a name that only begins alike, and a process of ours in the root namespace, live on."""
    lab = make_lab(TWO_SITES, name="own")
    stranger = f"isthmus-{lab.name}x-node"
    create_namespace(stranger)
    sleeper = subprocess.Popen(in_namespace(stranger, ["sleep", "60"]))
    here = subprocess.Popen(["sleep", "60"])
    try:
        eventually(lambda: sleeper.pid in processes_in([stranger]))
        lab.down()
        assert sleeper.poll() is None
        assert here.poll() is None
    finally:
        for each in (sleeper, here):
            each.kill()
            each.wait()
        remove_namespace(stranger)


def test_a_lab_at_work_is_left_to_who_works_on_it(tmp_path, lab_name):
    process = start_up(tmp_path, lab_name)
    wait_for_namespaces(process, lab_name, 1)
    with pytest.raises(LabBusy):
        take_down(lab_name)
    assert process.wait(30) == 0


def start_up(directory: Path, name: str) -> "subprocess.Popen[bytes]":
    file = write(directory, TWO_SITES, name)
    arguments = command("up", str(file), "--directory", str(directory / "labs"))
    quiet = subprocess.DEVNULL
    return subprocess.Popen(arguments, stdout=quiet, stderr=quiet, preexec_fn=heed_ctrl_c)


def wait_for_namespaces(process: "subprocess.Popen[bytes]", name: str, count: int) -> None:
    """Poll quickly: the whole building takes half a second."""
    end = time.monotonic() + 20
    while len(residue(name)["namespaces"]) < count:
        assert process.poll() is None, "up ended early"
        assert time.monotonic() < end
        time.sleep(0.002)
