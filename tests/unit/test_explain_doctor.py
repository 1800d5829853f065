"""``isthmus doctor``: each check finds its fault, a root cause hides its consequences, the unknown is not claimed."""

import json

import msgspec
import pytest
from answering_agent import NOW_S, a_status, answering
from hypothesis import given
from hypothesis import strategies as st
from trace_facts import RULES, SETTINGS, answer_facts, facts

from isthmus.cli.main import run
from isthmus.explain.check import Check, Descriptors, Hooked, State, ok
from isthmus.explain.doctor import CHECKS, diagnose
from isthmus.explain.foreign import from_iptables, from_nft
from isthmus.model.errors import IsthmusError
from isthmus.wire.local import IdentityStatus, PeerStatus, RelayStatus, RuleRow, TroubleRow, WorkerStatus

ADDRESSES = frozenset({"169.254.96.16", "fd00:a9fe:6010::16", "192.168.1.5"})
UPSTREAMS = ("192.0.2.53", "192.0.2.54")


class Names:
    def __init__(self, answer):
        self.answer = answer

    def resolve(self, name, record_type):
        return self.answer


class Table:
    """A node as a table: healthy, with changes."""

    def __init__(self, **changes):
        self.now_s = NOW_S
        self.error = None
        self.status = a_status()
        self.facts = facts(settings=settings(UPSTREAMS))
        self.dns = Names(frozenset({"169.254.96.16"}))
        self.answers = {
            "rules": RULES,
            "local_addresses": ADDRESSES,
            "ask_upstream": "",
            "descriptors": Descriptors(40, 20_000),
            "hooked": (),
            "clock_error_s": 0.01,
            "certificate_from_s": NOW_S - 3600,
        }
        self.sysctls = {"net/netfilter/nf_conntrack_count": "10", "net/netfilter/nf_conntrack_max": "100"}
        for name, value in changes.items():
            if name in self.answers:
                self.answers[name] = value
            else:
                setattr(self, name, value)

    def rules(self):
        return self.answers["rules"]

    def local_addresses(self):
        return self.answers["local_addresses"]

    def ask_upstream(self, server):
        given = self.answers["ask_upstream"]
        return given.get(server, "") if isinstance(given, dict) else given

    def descriptors(self, pid):
        return self.answers["descriptors"]

    def sysctl(self, name):
        return self.sysctls.get(name)

    def hooked(self):
        return self.answers["hooked"]

    def clock_error_s(self):
        return self.answers["clock_error_s"]

    def certificate_from_s(self):
        return self.answers["certificate_from_s"]


def settings(upstreams):
    return msgspec.structs.replace(SETTINGS, dns=msgspec.structs.replace(SETTINGS.dns, upstreams=upstreams))


def status(part="", **changes):
    if part:
        return a_status(**{part: msgspec.structs.replace(getattr(a_status(), part), **changes)})
    return a_status(**changes)


def result(code, **changes):
    return next(one for one in diagnose(Table(**changes)).results if one.code == code)


def identity(state="valid", **changes):
    return status(identity=IdentityStatus(state, **changes))


EARLY_NAT = Hooked("ip other prerouting", "nat", "prerouting", -300, False, "dnat to 1.2.3.4")
LATE_NAT = Hooked("ip nat PREROUTING", "nat", "prerouting", -100, False, "jump DOCKER")
CLOSED = Hooked("inet filter input", "filter", "input", 0, True, "jump accepted", "tcp dport 22 accept")
OPENED = CLOSED._replace(table_text="ip daddr 169.254.96.16 accept")


def test_a_healthy_node_has_nothing_wrong_and_every_check_made():
    diagnosis = diagnose(Table())
    assert diagnosis.healthy
    assert diagnosis.conclusion == f"nothing wrong in {len(CHECKS)} checks"
    assert {one.state for one in diagnosis.results} == {State.OK}


@pytest.mark.parametrize(
    ("code", "changes", "state", "says"),
    [
        ("workers", {"status": status(workers=[WorkerStatus("data", 1, "ready", 0)])}, State.ERROR, "dns"),
        (
            "workers",
            {"status": status(workers=[WorkerStatus("dns", 1, "down", 0), WorkerStatus("data", 1, "ready", 0)])},
            State.ERROR,
            "not ready: dns",
        ),
        (
            "workers",
            {"status": status(workers=[WorkerStatus("dns", 1, "ready", 2), WorkerStatus("data", 1, "ready", 0)])},
            State.WARNING,
            "dns 2 times",
        ),
        ("store", {"status": status("store", offline=True)}, State.WARNING, "the copy on disk is served"),
        (
            "store",
            {"status": status("store", problems=["web.yaml:3: spec.ports[0].port: x"])},
            State.WARNING,
            "1 problem",
        ),
        ("store", {"status": status("store", objects={})}, State.WARNING, "holds no objects"),
        ("interception", {"status": status("interception", applied=False, error="no nft")}, State.ERROR, "no nft"),
        ("interception", {"status": status("interception", applied=False)}, State.ERROR, "not been applied yet"),
        ("interception", {"local_addresses": frozenset()}, State.ERROR, "no device of this node has 169.254.96.16"),
        ("interception", {"rules": ()}, State.ERROR, "nothing of ours"),
        (
            "interception",
            {"rules": (*RULES, RuleRow("x", "", "", "dnat", "", False))},
            State.ERROR,
            "1 rule missing",
        ),
        ("interception", {"rules": None}, State.NOT_CHECKED, "could not be read"),
        ("interception", {"status": status("interception", repairs=3)}, State.WARNING, "repaired 3 times"),
        ("firewall", {"hooked": (EARLY_NAT,)}, State.WARNING, "come in the way"),
        ("firewall", {"hooked": (LATE_NAT,)}, State.OK, "1 foreign chain, none in the way"),
        ("firewall", {"hooked": (EARLY_NAT._replace(text=""),)}, State.OK, "none in the way"),  # an empty chain
        ("firewall", {"hooked": (CLOSED,)}, State.WARNING, "come in the way"),
        ("firewall", {"hooked": (OPENED,)}, State.OK, "none in the way"),
        ("firewall", {"hooked": None}, State.NOT_CHECKED, "could not be read"),
        ("dns", {"dns": Names(None)}, State.ERROR, "does not answer"),
        ("dns", {"dns": Names(frozenset({"10.0.0.1"}))}, State.ERROR, "another server answers"),
        ("dns", {"dns": Names(frozenset())}, State.ERROR, "another server answers"),
        ("upstreams", {"facts": facts(settings=settings(()))}, State.NOT_CHECKED, "resolv.conf"),
        ("upstreams", {"ask_upstream": {"192.0.2.53": "refused"}}, State.WARNING, "silent: 192.0.2.53"),
        ("upstreams", {"ask_upstream": "no answer"}, State.ERROR, "no upstream answers"),
        (
            "upstreams",
            {"status": status(troubles=[TroubleRow("dns.no-upstreams", "warning", "no upstreams")])},
            State.WARNING,
            "no upstreams",
        ),
        (
            "clock",
            {"status": status(troubles=[TroubleRow("identity.clock", "warning", "+90 s apart")])},
            State.WARNING,
            "+90 s apart",
        ),
        ("clock", {"certificate_from_s": NOW_S + 7200}, State.ERROR, "at least 2 h behind"),
        ("clock", {"clock_error_s": 90.0}, State.WARNING, "off by 1 min 30 s"),
        ("clock", {"clock_error_s": float("inf")}, State.NOT_CHECKED, "nothing on this node keeps"),
        ("clock", {"clock_error_s": None}, State.NOT_CHECKED, "does not say"),
        ("certificate", {"status": identity("none")}, State.ERROR, "no certificate"),
        (
            "certificate",
            {"status": status(identity=IdentityStatus("none"), peers=[], relays=[])},
            State.OK,
            "no other node",
        ),
        ("certificate", {"status": identity("enrolling", error="refused")}, State.WARNING, "enrolling: refused"),
        ("certificate", {"status": identity("revoked")}, State.ERROR, "revoked"),
        ("certificate", {"status": identity(expires_at=NOW_S - 1)}, State.ERROR, "expired"),
        (
            "certificate",
            {"status": identity(expires_at=NOW_S + 60, renews_at=NOW_S - 3600, error="issuer away")},
            State.WARNING,
            "1 h overdue: issuer away",
        ),
        ("relays", {"status": status(relays=[])}, State.OK, "none is configured"),
        (
            "relays",
            {"status": status(relays=[RelayStatus("r", "x:1", False, error="refused")])},
            State.ERROR,
            "no relay",
        ),
        (
            "relays",
            {"status": status(relays=[RelayStatus("r", "x:1", False), RelayStatus("s", "y:1", True)])},
            State.WARNING,
            "not connected: r at x:1",
        ),
        ("peers", {"status": status(peers=[])}, State.OK, "no other node"),
        ("peers", {"status": status(peers=[PeerStatus("n", "", "store", [])])}, State.WARNING, "1 of 1 peer without"),
        ("descriptors", {"descriptors": Descriptors(900, 1000)}, State.WARNING, "nearly all"),
        ("descriptors", {"descriptors": Descriptors(9, 1024)}, State.WARNING, "limit is low"),
        ("descriptors", {"descriptors": None}, State.NOT_CHECKED, "ask as root"),
        ("conntrack", {"sysctls": {}}, State.NOT_CHECKED, "does not say"),
        (
            "conntrack",
            {"sysctls": {"net/netfilter/nf_conntrack_count": "95", "net/netfilter/nf_conntrack_max": "100"}},
            State.WARNING,
            "95 of 100",
        ),
    ],
)
def test_each_check_finds_its_fault(code, changes, state, says):
    found = result(code, **changes)
    assert found.state is state and says in found.text
    if state in (State.ERROR, State.WARNING):
        assert found.advice, "a fault comes with what to do"


@pytest.mark.parametrize(("now", "state"), [("1", State.OK), ("2", State.WARNING), (None, State.OK)])
def test_a_setting_that_somebody_changed_back_is_told(now, state):
    changed = status("interception", sysctls=["sysctl net/ipv4/tcp_tw_reuse: 2 -> 1"])
    assert result("sysctls", status=changed, sysctls={"net/ipv4/tcp_tw_reuse": now}).state is state


def test_a_missing_agent_hides_what_follows_from_it():
    node = Table(error=IsthmusError("no agent here", hint="start it"), status=None, facts=None)
    results = {one.code: one for one in diagnose(node).results}
    assert (results["agent"].state, results["agent"].advice) == (State.ERROR, "start it")
    assert {one.hidden_by for code, one in results.items() if code not in ("agent", "conntrack")} == {"agent"}
    assert results["conntrack"].state is State.OK, "what can be known without the agent still is"


def test_a_chain_of_causes_names_the_root():
    node = Table(certificate_from_s=NOW_S + 7200, status=identity("expired"))
    results = {one.code: one for one in diagnose(node).results}
    assert results["clock"].state is State.ERROR
    assert {results[code].hidden_by for code in ("certificate", "relays", "peers")} == {"clock"}


def test_a_warning_hides_nothing_and_leaves_the_node_healthy():
    diagnosis = diagnose(Table(clock_error_s=90.0))
    assert diagnosis.healthy and diagnosis.conclusion == f"1 warning in {len(CHECKS)} checks"


def test_codes_are_unique_and_what_a_check_depends_on_comes_before_it():
    seen = []
    for check in CHECKS:
        assert check.code not in seen and set(check.depends_on) <= set(seen)
        seen.append(check.code)


def test_a_check_is_added_with_one_value():
    extra = Check("masquerade", "masquerade", lambda node: ok("fine"), ("agent",))
    assert diagnose(Table(), (*CHECKS, extra)).results[-1].text == "fine"


NFT = {
    "nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "isthmus", "handle": 1}},
        {"chain": {"family": "inet", "table": "isthmus", "name": "prerouting", "type": "nat", "hook": "prerouting",
                   "prio": -190, "policy": "accept"}},
        {"chain": {"family": "inet", "table": "filter", "name": "input", "type": "filter", "hook": "input", "prio": 0,
                   "policy": "drop"}},
        {"chain": {"family": "inet", "table": "filter", "name": "allowed"}},
        {"rule": {"family": "inet", "table": "filter", "chain": "input", "expr": [{"jump": {"target": "allowed"}}]}},
        {"rule": {"family": "inet", "table": "filter", "chain": "allowed",
                  "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "isthmus0"}}]}},
    ]
}  # fmt: skip


def test_nft_listings_give_the_chains_of_others():
    (chain,) = from_nft(json.dumps(NFT))
    assert (chain.name, chain.kind, chain.hook, chain.priority, chain.drops) == (
        *("inet filter input", "filter", "input", 0, True),
    )
    assert "isthmus0" in chain.table_text and "isthmus0" not in chain.text


IPTABLES = """\
# Generated by iptables-save
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m comment --comment "isthmus root chain" -j ISTHMUS
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "isthmus root chain" -j ISTHMUS
COMMIT
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
-A INPUT -d 169.254.96.16/32 -j ACCEPT
COMMIT
"""


def test_iptables_rules_before_our_jump_count_as_before_ours():
    chains = from_iptables(IPTABLES)
    assert [(chain.name, chain.priority, chain.drops) for chain in chains] == [
        ("iptables nat PREROUTING", -190, False),
        ("iptables nat PREROUTING", -189, False),
        ("iptables filter INPUT", -189, True),
    ]
    assert "DOCKER" in chains[0].text and "KUBE" not in chains[0].text
    found = result("firewall", hooked=chains)
    assert found.state is State.WARNING and len(found.details) == 1


@given(
    st.text(max_size=200)
    | st.sampled_from(['{"nftables": 5}', "[]", '{"nftables": [5]}', '{"nftables": [{"chain": {}}]}'])
)
def test_any_listing_is_read_or_refused(text):
    from_iptables(text)
    try:
        from_nft(text)
    except ValueError:
        pass


def test_the_command_says_one_line_a_check_and_gathers_consequences(tmp_path, capsys):
    assert run(["doctor", "--run-directory", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("error        agent: no agent here")
    assert "not checked for that reason: worker processes, store, rules in the kernel" in out
    assert out.splitlines()[-1].startswith("1 error in ")


def test_json_has_the_documented_fields(tmp_path, capsys):
    with answering(tmp_path, {"status": a_status(), "facts": answer_facts()}):
        run(["doctor", "-o", "json", "--run-directory", str(tmp_path)])
    diagnosis = json.loads(capsys.readouterr().out)
    assert list(diagnosis) == ["healthy", "conclusion", "results"]
    assert [one["code"] for one in diagnosis["results"]] == [check.code for check in CHECKS]
    assert list(diagnosis["results"][0]) == ["code", "title", "state", "text", "advice", "details", "hidden_by"]
