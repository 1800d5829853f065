"""Rules of others are the same, byte for byte, after everything that happens to ours; ours are repaired and removed."""

import json
import os
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_foreign import lay, listing
from kernel_node import (
    IGNORED,
    Node,
    ask_tcp,
    child,
    enter,
    inside,
    running_node,
    serve_name,
    settings,
    sh,
    wait_until,
)

from isthmus.kernel.interception import Interception
from isthmus.kernel.original_destination import Method
from isthmus.kernel.sockets import family_of
from isthmus.model.errors import KernelError
from isthmus.model.settings import Backend, InterceptSettings
from isthmus.plan.interception import Handover, Ignored, Preserved

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

CASES = [
    (backend, handover, foreign)
    for backend in (Backend.NFTABLES, Backend.IPTABLES)
    for handover in Handover
    for foreign in ("legacy", "nft", "both")
]
PRESERVED = (Preserved("172.17.0.3", 8080), Preserved("fd00:17::3", 8080))


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Node, InterceptSettings]]:
    backend, handover, foreign = request.param
    with running_node("f", tmp_path) as made:
        for flavour in ("legacy", "nft") if foreign == "both" else (foreign,):
            lay(made.node, flavour)
        yield made, settings(backend, handover)


def test_foreign_rules_survive_start_change_kill_restart_stop_and_uninstall(
    node: tuple[Node, InterceptSettings],
) -> None:
    made, how = node
    before = listing(made.node)
    assert "KUBE-SERVICES" in before and "DOCKER" in before

    assert "rules made" in made.apply(how)
    assert _foreign(made) == before, "start"
    made.apply(how, ignored={**IGNORED, "10.96.0.77": Ignored("shop", "cart")}, preserved=PRESERVED)
    assert _foreign(made) == before, "change"
    _kill_in_the_middle_of_apply(made, how)
    assert _foreign(made) == before, "kill -9"
    made.apply(how)
    assert _foreign(made) == before, "restart"
    assert made.apply(how) == (), "nothing to do does nothing"
    assert made.remove(how)
    after = sh("nft list ruleset; iptables-legacy-save; iptables-nft-save; ipset save; ip -o link; ip rule", made.node)
    assert "isthmus" not in after.lower()
    assert listing(made.node) == before, "uninstall"
    assert made.remove(how) == (), "uninstall may be repeated"


def _foreign(made: Node) -> str:
    """The listing without the settings that we change on purpose, which uninstall puts back."""
    text = listing(made.node)
    return text.replace("nf_conntrack_udp_timeout = 200", "nf_conntrack_udp_timeout = 30").replace(
        "nf_conntrack_udp_timeout_stream = 200", "nf_conntrack_udp_timeout_stream = 120"
    )


def _kill_in_the_middle_of_apply(made: Node, how: InterceptSettings) -> None:
    """Apply in turn two plans that differ in everything, in a process that is killed at moments spread over that."""
    many = {f"10.97.{n >> 8}.{n & 255}": Ignored("many", f"service-{n}") for n in range(2000)}
    for delay_s in (0.02, 0.08, 0.2):
        child_pid = os.fork()
        if child_pid == 0:
            try:
                os.setsid()
                enter(made.node)
                ours = made.interception(how)
                for plan in (made.plan(how, ignored=many, preserved=PRESERVED), made.plan(how)) * 50:
                    ours.apply(plan, verify=True)
            finally:
                os._exit(0)
        time.sleep(delay_s)
        os.killpg(child_pid, signal.SIGKILL)
        os.waitpid(child_pid, 0)
    wait_until(lambda: not _tools_running(made.node), "tools that were started have ended")


def _tools_running(namespace: str) -> bool:
    return bool(sh(f"ip netns pids {namespace}").split())


DRIFTS = {
    Backend.NFTABLES: {
        "table deleted": "nft delete table inet isthmus",
        "table emptied": "nft flush table inet isthmus",
        "jump deleted": "nft flush chain inet isthmus prerouting",
        "exceptions deleted": "nft flush set inet isthmus exceptions4",
        "ranges deleted": "nft flush set inet isthmus ranges6",
        "stranger's exception": "nft add element inet isthmus exceptions4 '{ 10.96.0.80 }'",
        "stranger's rule": "nft insert rule inet isthmus isthmus counter return",
    },
    Backend.IPTABLES: {
        "tables emptied": "for t in iptables ip6tables; do $t-legacy -t nat -F; done",
        "jump deleted": "iptables-legacy -t nat -D PREROUTING 1",
        "jump no longer first": "iptables-legacy -t nat -I PREROUTING 1 -j KUBE-SERVICES",
        "jump twice": "iptables-legacy -t nat -A PREROUTING -m comment --comment 'isthmus root chain' -j ISTHMUS",
        "chain emptied": "ip6tables-legacy -t nat -F ISTHMUS",
        "exceptions deleted": "ipset flush isthmus-exceptions4",
        "stranger's exception": "ipset add isthmus-exceptions4 10.96.0.80",
    },
}


@pytest.mark.parametrize(
    ("backend", "drift"),
    [(backend, drift) for backend, drifts in DRIFTS.items() for drift in drifts],
    ids=lambda value: str(value),
)
def test_what_someone_else_changed_in_our_rules_is_repaired(tmp_path: Path, backend: Backend, drift: str) -> None:
    how = settings(backend, Handover.DNAT)
    with running_node("d", tmp_path) as made:
        lay(made.node, "legacy")
        made.apply(how)
        made.start_taker()
        sh(DRIFTS[backend][drift], made.node)
        assert made.apply(how), "the difference is seen"
        assert made.apply(how) == (), "and repaired"
        assert ask_tcp(made.client, "10.96.0.80", 80)["destination"] == ["10.96.0.80", 80]
        assert ask_tcp(made.client, "fd00:10:96::80", 80)["destination"] == ["fd00:10:96::80", 80]


@pytest.mark.parametrize(
    ("drift", "handover"),
    [
        ("ip link del isthmus0", Handover.DNAT),
        ("ip link set isthmus0 down", Handover.DNAT),
        ("ip addr flush dev isthmus0", Handover.DNAT),
        ("ip rule del pref 90; ip -6 rule del pref 90", Handover.TPROXY),
        ("ip route flush table 16910; ip -6 route flush table 16910", Handover.TPROXY),
    ],
)
def test_device_addresses_and_routes_are_repaired(tmp_path: Path, drift: str, handover: Handover) -> None:
    how = settings(Backend.NFTABLES, handover)
    with running_node("r", tmp_path) as made:
        made.apply(how)
        sh(drift, made.node)
        assert made.apply(how)
        made.start_taker(Method.TPROXY if handover is Handover.TPROXY else Method.GETSOCKOPT)
        for version_address in ("10.96.0.80", "fd00:10:96::80"):
            assert ask_tcp(made.node, version_address, 80)["destination"] == [version_address, 80]


def test_a_change_from_one_backend_to_the_other_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    with running_node("s", tmp_path) as made:
        lay(made.node, "legacy")
        made.apply(settings(Backend.NFTABLES, Handover.TPROXY))
        made.apply(settings(Backend.IPTABLES, Handover.DNAT))
        assert "isthmus" not in sh("nft list ruleset; ip rule", made.node)
        made.start_taker()
        assert ask_tcp(made.client, "10.96.0.80", 80)["destination"] == ["10.96.0.80", 80]
        made.apply(settings(Backend.NFTABLES, Handover.DNAT))
        assert "ISTHMUS" not in sh("iptables-legacy-save; ip6tables-legacy-save; ipset save", made.node)
        assert ask_tcp(made.client, "10.96.0.80", 80)["destination"] == ["10.96.0.80", 80]


def test_rules_move_to_the_flavour_of_iptables_that_kube_proxy_uses(tmp_path: Path) -> None:
    how = settings(Backend.IPTABLES, Handover.DNAT)
    with running_node("v", tmp_path) as made:
        made.apply(how)
        assert "ISTHMUS" in sh("iptables-legacy-save", made.node)
        lay(made.node, "nft")
        made.apply(how)
        assert "ISTHMUS" not in sh("iptables-legacy-save", made.node)
        made.start_taker()
        assert ask_tcp(made.client, "10.96.0.80", 80)["destination"] == ["10.96.0.80", 80]


def test_a_device_of_the_same_name_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    how = settings(Backend.NFTABLES, Handover.DNAT)
    with running_node("n", tmp_path) as made:
        sh("ip link add isthmus0 type bridge", made.node)
        with pytest.raises(KernelError, match="not ours"):
            made.apply(how)
        made.remove(how)
        assert "isthmus0" in sh("ip -o link", made.node)


def test_a_device_that_was_renamed_in_the_settings_is_replaced(tmp_path: Path) -> None:
    with running_node("o", tmp_path) as made:
        made.apply(settings(Backend.NFTABLES, Handover.DNAT))
        made.apply(settings(Backend.NFTABLES, Handover.DNAT, device="edge7"))
        links = sh("ip -o link", made.node)
        assert "edge7" in links and "isthmus0" not in links


def test_settings_that_were_changed_are_listed_and_restored_unless_someone_changed_them_since(tmp_path: Path) -> None:
    how = settings(Backend.IPTABLES, Handover.DNAT)
    conntrack = "net.netfilter.nf_conntrack_udp_timeout net.netfilter.nf_conntrack_udp_timeout_stream"
    names = f"{conntrack} net.ipv4.tcp_tw_reuse"
    with running_node("c", tmp_path) as made:
        before = sh(f"sysctl {names}", made.node)
        made.apply(how)
        changes = child(made.node, lambda: Interception(how, tmp_path, "boot").read().sysctls)
        assert [(change.before, change.ours) for change in changes] == [("30", "200"), ("120", "200"), ("2", "1")]
        assert (tmp_path / "sysctls.json").stat().st_mode & 0o777 == 0o600
        made.remove(how)
        assert sh(f"sysctl {names}", made.node) == before
        made.apply(how)
        sh("sysctl -qw net.netfilter.nf_conntrack_udp_timeout=77", made.node)
        made.remove(how)
        assert sh("sysctl -n net.netfilter.nf_conntrack_udp_timeout", made.node) == "77\n"


@pytest.mark.parametrize("backend", [Backend.NFTABLES, Backend.IPTABLES])
def test_one_opt_out_among_ten_thousand_costs_less_than_fifty_milliseconds(tmp_path: Path, backend: Backend) -> None:
    how = settings(backend, Handover.DNAT)
    many = {f"10.97.{n >> 8}.{n & 255}": Ignored("many", f"service-{n}") for n in range(10_000)}

    def act() -> tuple[list[float], int]:
        ours = Interception(how, tmp_path, "boot")
        ours.apply(made.plan(how, ignored=many))
        costs = []
        for n in range(10):
            plan = made.plan(how, ignored={**many, "10.98.0.1": Ignored("one", "more")} if n % 2 == 0 else many)
            start = time.perf_counter()
            assert ours.apply(plan).changed == ("1 elements changed",)
            costs.append(time.perf_counter() - start)
        return costs, ours.read().exceptions

    with running_node("t", tmp_path) as made:
        costs, exceptions = child(made.node, act)
        assert exceptions == 10_000
        print(f"median {statistics.median(costs) * 1e3:.1f} ms, least {min(costs) * 1e3:.1f} ms")
        assert statistics.median(costs) < 0.05, costs


def test_an_address_that_is_taken_back_from_the_opt_outs_is_intercepted_at_once(tmp_path: Path) -> None:
    how = settings(Backend.NFTABLES, Handover.DNAT)
    with running_node("b", tmp_path) as made:
        lay(made.node, "legacy")
        made.apply(how, ignored={**IGNORED, "10.96.0.80": Ignored("default", "web")})
        made.start_taker()
        with pytest.raises(OSError):  # kube-proxy sends it to an endpoint that is not there
            ask_tcp(made.client, "10.96.0.80", 80, timeout_s=0.3)
        made.apply(how)
        assert ask_tcp(made.client, "10.96.0.80", 80)["destination"] == ["10.96.0.80", 80]


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("by", ["opt-out", "clean stop"])
def test_a_udp_client_that_keeps_its_port_is_let_go_at_once(tmp_path: Path, by: str, version: int) -> None:
    """Else conntrack would redirect it for as long as it goes on sending."""
    how = settings(Backend.NFTABLES, Handover.DNAT)
    address = {4: "10.96.0.10", 6: "fd00:10:96::10"}[version]
    with running_node("k", tmp_path) as made:
        lay(made.node, "legacy")
        made.start(made.endpoint, lambda ready: serve_name(ready, "endpoint", 6443))
        applied = child(
            made.node, lambda: Interception(how, tmp_path, "boot").apply(made.plan(how, ignored={})).changed
        )
        assert applied
        made.start_taker()

        def ask(sock: socket.socket) -> dict[str, object]:
            sock.send(b"hello")
            answer: dict[str, object] = json.loads(sock.recv(65536))
            return answer

        def act() -> None:
            with socket.socket(family_of(address), socket.SOCK_DGRAM) as sock:
                sock.settimeout(3)
                sock.connect((address, 53))
                assert ask(sock)["destination"] == [address, 53]
                if by == "opt-out":
                    made.apply(how)
                else:
                    assert "1 redirected UDP flows forgotten" in made.remove(how)
                assert ask(sock)["name"] == "endpoint"

        inside(made.client, act)


@pytest.mark.parametrize(
    "drift",
    [
        "nft flush table bridge isthmus",
        "nft delete table bridge isthmus",
        "nft flush map bridge isthmus bridges4",
        "nft flush chain inet isthmus to-socket",
    ],
)
def test_rules_for_preserved_clients_are_repaired(tmp_path: Path, drift: str) -> None:
    how = settings(Backend.NFTABLES, Handover.DNAT)
    with running_node("w", tmp_path) as made:
        made.apply(how, preserved=PRESERVED)
        made.start_taker(preserve_to=8080)
        made.start(made.endpoint, lambda ready: serve_name(ready, "endpoint", 8080))
        sh(drift, made.node)
        assert made.apply(how, preserved=PRESERVED)
        assert made.apply(how, preserved=PRESERVED) == ()
        assert '"name": "endpoint"' in ask_tcp(made.client, "10.96.0.80", 80, timeout_s=5)["endpoint"]


def test_without_ipv6_the_rest_works(tmp_path: Path) -> None:
    how = settings(Backend.NFTABLES, Handover.DNAT)
    with running_node("6", tmp_path) as made:
        sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1", made.node)
        assert made.apply(how)
        assert "fd00:a9fe" not in sh("nft list ruleset; ip -o addr", made.node)
        assert made.apply(how) == ()
