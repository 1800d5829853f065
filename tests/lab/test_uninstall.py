"""``isthmus uninstall`` in a real network namespace: what was there before the agent is there after it, byte for byte.

namespace cli-PID: lo, and foreign rules as Docker and kube-proxy leave them
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ISTHMUS = [sys.executable, "-m", "isthmus"]

FOREIGN = """
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A DOCKER -i docker0 -j RETURN
COMMIT
"""

APPLY = """
import sys
from pathlib import Path
from isthmus.kernel.interception import Interception
from isthmus.model.settings import Backend, InterceptSettings, OriginalDestination
from isthmus.plan.interception import Ignored, Preserved, plan_interception

settings = InterceptSettings(backend=Backend(sys.argv[2]), original_destination=OriginalDestination(sys.argv[3]))
interception = Interception(settings, Path(sys.argv[1]), "boot")
plan = plan_interception(
    settings, ["240.96.0.0/16"], {"10.96.0.10": Ignored("kube-system", "kube-dns")},
    [Preserved("172.17.0.2", 8080)], [], interception.capabilities(),
)
print(interception.apply(plan).changed)
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    name = f"cli-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        inside(name, "ip", "link", "set", "lo", "up")
        inside(name, "iptables-restore", text=FOREIGN)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def inside(namespace: str, *command: str, text: str = "") -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *command], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def listings(namespace: str) -> dict[str, str]:
    """Everything that interception may touch."""
    commands = {
        "nft": ["nft", "list", "ruleset"],
        "iptables": ["iptables-save"],
        "links": ["ip", "-o", "address"],
        "rules": ["ip", "rule"],
        "rules6": ["ip", "-6", "rule"],
        "routes": ["ip", "route", "show", "table", "all"],
        "sysctls": [
            "sysctl",
            "net.netfilter.nf_conntrack_udp_timeout",
            "net.netfilter.nf_conntrack_udp_timeout_stream",
        ],
    }
    found = {name: inside(namespace, *command) for name, command in commands.items()}
    # Counters, the date of a listing, and tables without a rule (once loaded, legacy iptables keeps them) are no rules.
    found["nft"] = re.sub(r"counter packets \d+ bytes \d+", "counter", found["nft"])
    found["nft"] = re.sub(r"table \S+ \S+ \{\n(\tchain \S+ \{\n\t\ttype [^\n]*\n\t\}\n\n?)*\}\n", "", found["nft"])
    found["iptables"] = "\n".join(line for line in found["iptables"].splitlines() if line[:1] not in "#:")
    found["iptables"] = re.sub(r"\*\w+\nCOMMIT\n?", "", found["iptables"])
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "boot_id").write_text("boot\n")
    file = tmp_path / "agent.yaml"
    directories = f"run-directory: {tmp_path}/run\nstate-directory: {tmp_path}/state\n"
    file.write_text(f"{directories}boot-id-file: {tmp_path}/boot_id\n")
    return file


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("method", ["so-original-dst", "tproxy"])
def test_the_host_is_as_it_was_and_a_second_time_finds_nothing(
    namespace: str, config: Path, tmp_path: Path, backend: str, method: str
) -> None:
    before = listings(namespace)
    inside(namespace, sys.executable, "-c", APPLY, str(tmp_path / "state"), backend, method)
    during = listings(namespace)
    assert during != before

    command = [*ISTHMUS, "uninstall", "--config", str(config), "-o", "json"]
    told = json.loads(inside(namespace, *command, "--dry-run"))
    assert any("rules" in text for text in told["removed"]) and any("device" in text for text in told["removed"])
    assert listings(namespace) == during, "a dry run changes nothing"

    done = json.loads(inside(namespace, *command, "--purge"))
    assert not done["failed"] and not done["kept"]
    assert listings(namespace) == before
    assert not (tmp_path / "state").exists()

    again = json.loads(inside(namespace, *command, "--purge"))
    assert (again["removed"], again["failed"]) == ([], [])


def test_it_works_where_the_state_was_lost(namespace: str, config: Path, tmp_path: Path) -> None:
    before = listings(namespace)
    inside(namespace, sys.executable, "-c", APPLY, str(tmp_path / "elsewhere"), "nftables", "so-original-dst")
    inside(namespace, *ISTHMUS, "uninstall", "--config", str(config))
    after = listings(namespace)
    # What the settings were before stands only in the state that was lost.
    del before["sysctls"], after["sysctls"]
    assert after == before


def test_what_the_kernel_refuses_is_told_and_keeps_nothing_else(namespace: str, config: Path, tmp_path: Path) -> None:
    inside(namespace, sys.executable, "-c", APPLY, str(tmp_path / "state"), "nftables", "so-original-dst")
    (tmp_path / "run").mkdir()
    weak = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *weak, *ISTHMUS, "uninstall", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "[uninstall.incomplete]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
