"""``isthmus trace``: each hop names the rule and object that decided, and is held against what is reported."""

import json

import msgspec
import pytest
from answering_agent import a_status, answering
from hypothesis import given
from hypothesis import strategies as st
from trace_facts import PEERS, PLANNED, PODS, RULES, Table, answer_facts, facts

from isthmus.cli.main import run
from isthmus.explain.hop import Flow, Held, Source
from isthmus.explain.hop_dns import choose, search_path
from isthmus.explain.source import find_source
from isthmus.explain.trace import follow, split_destination, trace
from isthmus.model.cluster import Pod, Protocol
from isthmus.model.errors import UsageError
from isthmus.wire.local import EndpointState, IdentityStatus, RuleRow


def traced(source, destination, *, protocol=Protocol.TCP, witness=None, **changes):
    return trace(source, destination, protocol, answer_facts(**changes), witness or Table())


def hop(result, name):
    return next(report for report in result.hops if report.hop == name)


def rules(result):
    return [f"{report.hop}:{report.rule}" for report in result.hops]


TCP = Protocol.TCP
UDP = Protocol.UDP
CLIENT = "shop/client"


@pytest.mark.parametrize(
    ("source", "destination", "protocol", "arrives", "expected"),
    [
        # a short name goes through the search path of the pod's namespace
        (CLIENT, "web", TCP, True, "dns:cluster-ip interception:service-range endpoint:round-robin path:direct-works "
                                   "path:relayed admission:own-endpoint"),
        # an endpoint on this node needs no path
        (CLIENT, "local:443", TCP, False, "dns:cluster-ip interception:service-range endpoint:no-endpoint"),
        (CLIENT, "local", TCP, True, "dns:cluster-ip interception:service-range endpoint:round-robin path:same-node"),
        # an address needs no name
        ("host", "10.96.0.20:80", TCP, True, "interception:service-range endpoint:round-robin path:direct-works "
                                             "path:relayed admission:own-endpoint"),
        # a hash has one first choice
        (CLIENT, "sticky", TCP, True, "dns:cluster-ip interception:service-range endpoint:client-hash path:relayed "
                                      "admission:own-endpoint"),
        # opted out: routed as if we were not there
        (CLIENT, "kube-dns.kube-system", UDP, True, "dns:cluster-ip interception:ignored-service"),
        # a headless member of another site has a virtual address
        (CLIENT, "db-0.db", TCP, True, "dns:member interception:virtual-range endpoint:round-robin path:relayed "
                                       "admission:own-endpoint"),
        # a headless member that can be routed to is left alone
        (CLIENT, "db-1.db", TCP, True, "dns:member interception:not-in-range"),
        # an alias inside the cluster
        (CLIENT, "front:80", TCP, True, "dns:external-name interception:service-range endpoint:round-robin "
                                        "path:direct-works path:relayed admission:own-endpoint"),
        # the node itself has no search path
        ("host", "web", TCP, False, "dns:not-ours"),
        ("host", "web.shop.svc.cluster.local.", TCP, True, "dns:cluster-ip interception:service-range "
                                                           "endpoint:round-robin path:direct-works path:relayed "
                                                           "admission:own-endpoint"),
        # the ways in which a connection does not arrive
        ("ops/client", "web.nowhere.svc.cluster.local.", TCP, False, "dns:no-such-namespace"),
        (CLIENT, "nothing.shop.svc.cluster.local.", TCP, False, "dns:no-such-service"),
        (CLIENT, "web:81", TCP, False, "dns:cluster-ip interception:service-range endpoint:no-such-port"),
        (CLIENT, "web:80", UDP, False, "dns:cluster-ip interception:service-range endpoint:no-such-port"),
        (CLIENT, "10.96.9.9:80", TCP, False, "interception:service-range endpoint:no-such-service"),
        (CLIENT, "empty", TCP, False, "dns:cluster-ip interception:service-range endpoint:no-endpoint"),
        (CLIENT, "lost", TCP, False, "dns:cluster-ip interception:service-range endpoint:round-robin path:no-path"),
        (CLIENT, "192.0.2.99:22", TCP, True, "interception:not-in-range"),
    ],
)  # fmt: skip
def test_the_rules_that_decide_are_named_in_the_order_of_the_packets_way(
    source, destination, protocol, arrives, expected
):
    result = traced(source, destination, protocol=protocol)
    assert " ".join(rules(result)) == expected
    assert result.arrives is arrives
    assert ("does NOT arrive" in result.conclusion) is not arrives


def test_the_object_that_decided_is_named_with_file_and_line():
    result = traced(CLIENT, "web")
    assert {(r.object, r.place) for r in result.hops if r.object == "Service shop/web"} == {
        ("Service shop/web", "web.yaml:3")
    }
    assert hop(result, "interception").setting == "intercept.service-cidrs"
    assert (hop(result, "path").object, hop(result, "path").place) == ("Node cloud-1", "nodes.yaml:1")


def test_lower_ranked_paths_and_passed_over_endpoints_are_alternatives():
    result = traced(CLIENT, "web")
    assert hop(result, "endpoint").alternatives == ("passed over: 172.17.0.2:8080 on edge-9, not ready",)
    assert hop(result, "path").alternatives == (
        "ranked lower: relayed by cloud at 192.0.2.10:20004 (relay cloud holds both nodes, 12.0 ms from here)",
        "not reverse: this node has no address that another site can dial",
    )


def test_names_tried_before_are_told_with_their_reason():
    result = traced("ops/client", "web.shop")
    assert result.arrives
    assert "tried before: web.shop.ops.svc.cluster.local" in hop(result, "dns").alternatives[0]


def test_a_resting_endpoint_is_passed_over_and_the_other_one_chosen():
    resting = (EndpointState("shop/web", 80, "TCP", "cloud-1", "10.1.0.5", 8080, 4.5, 0),)
    result = traced(CLIENT, "web", endpoints=resting)
    endpoint = hop(result, "endpoint")
    assert endpoint.outcome == "172.17.0.2:8080 on edge-2"
    assert "10.1.0.5:8080 on cloud-1, rests for 4.5 s" in endpoint.alternatives[0]
    assert [one.rule for one in result.hops if one.hop == "path"] == ["relayed"]


def test_endpoints_that_all_rest_are_tried_anyhow():
    resting = tuple(
        EndpointState("shop/web", 80, "TCP", node, address, 8080, 4.5, 0)
        for node, address in (("cloud-1", "10.1.0.5"), ("edge-2", "172.17.0.2"))
    )
    result = traced(CLIENT, "web", endpoints=resting)
    assert hop(result, "endpoint").rule == "all-resting" and result.arrives


def test_without_a_valid_certificate_no_other_node_is_reached():
    result = traced(CLIENT, "web", identity=IdentityStatus("expired", error="the issuer is away"))
    path = hop(result, "path")
    assert path.rule == "no-certificate" and "the issuer is away" in path.because and not result.arrives
    assert traced(CLIENT, "local", identity=IdentityStatus("none")).arrives, "an endpoint here needs none"


@pytest.mark.parametrize(
    ("destination", "ends"),
    [
        ("local", "arrives at 172.17.0.9:8080 on edge-1, this node"),
        (
            "web",
            "arrives at one of 2 endpoints by round-robin, on cloud-1 (direct to 192.0.2.11:20006) "
            "or edge-2 (relayed by cloud at 192.0.2.10:20004)",
        ),
    ],
)
def test_the_conclusion_is_one_line(destination, ends):
    assert traced(CLIENT, destination).conclusion.endswith(ends)


def test_the_conclusion_claims_nothing_of_a_way_that_was_not_tried():
    peer = msgspec.structs.replace(PEERS[2], seen=())
    result = traced(CLIENT, "lost", peers=(peer,))
    assert result.conclusion.endswith("direct to 203.0.113.7:20006, if that answers: it was not tried lately")


def test_the_conclusion_names_the_way_that_serves_otherwise():
    peer = msgspec.structs.replace(PEERS[1], seen=())
    result = traced(CLIENT, "db-0.db", peers=(peer,), links=())
    assert result.conclusion.endswith(
        "on edge-2, direct to 203.0.113.9:20006 if that answers, else relayed by cloud at 192.0.2.10:20004"
    )


def test_one_node_without_a_path_is_told_and_does_not_end_the_connection():
    result = traced(CLIENT, "web", peers=PEERS[1:])
    assert rules(result)[3:5] == ["path:unknown-node", "path:relayed"]
    assert result.arrives


def test_a_better_way_that_is_not_known_to_work_is_told():
    result = traced(CLIENT, "db-0.db")
    path = hop(result, "path")
    assert path.outcome == "to edge-2 (site office): relayed by cloud at 192.0.2.10:20004"
    assert path.alternatives[0] == (
        "better, and not known to work: direct to 203.0.113.9:20006 (203.0.113.9:20006 failed 20 s ago: timed out)"
    )


def test_ways_that_all_failed_are_told_with_what_became_of_them():
    path = hop(traced(CLIENT, "lost"), "path")
    assert path.because == "every way to it failed lately" and "refused" in path.alternatives[0]
    assert any("node edge-7 has no channel to relay cloud" in text for text in path.alternatives)


def test_the_dns_server_itself_is_asked_and_a_different_answer_is_a_problem():
    stale = Table({("web.shop.svc.cluster.local", "A"): {"10.96.0.99"}})
    result = traced(CLIENT, "web", witness=stale)
    assert hop(result, "dns").held is Held.DIFFERS and not result.arrives
    assert "A 10.96.0.99" in result.conclusion
    assert "endpoint" in {report.hop for report in result.hops}, "the rest of the way is still told"


def test_a_silent_dns_server_is_not_checked_and_not_a_difference():
    result = traced(CLIENT, "web", witness=Table(silent=True))
    assert hop(result, "dns").held is Held.NOT_CHECKED and result.arrives


def test_what_the_upstreams_say_of_an_outside_name_is_asked():
    witness = Table({("mail.shop.svc.cluster.local", "A"): {"198.51.100.25"}})
    result = traced(CLIENT, "mail:25", witness=witness)
    assert (result.address, rules(result)) == ("198.51.100.25", ["dns:external-name", "interception:not-in-range"])


@pytest.mark.parametrize(
    ("changed", "held", "says"),
    [
        ({"rules": None}, Held.NOT_CHECKED, "could not be read"),
        ({"rules": ()}, Held.DIFFERS, "nothing of ours is in the kernel"),
        (
            {"rules": (*RULES[:2], RuleRow("taken", "isthmus", "ip daddr 10.96.0.0/12", "dnat", "", False))},
            Held.DIFFERS,
            "missing in the kernel: taken",
        ),
        (
            {"rules": (*RULES, RuleRow("stale", "isthmus", "ip daddr 10.96.0.20", "return", "ignore old", True))},
            Held.DIFFERS,
            "the kernel returns 10.96.0.20: ignore old",
        ),
    ],
)
def test_a_kernel_that_differs_from_the_plan_is_told(changed, held, says):
    report = hop(traced(CLIENT, "web", **changed), "interception")
    assert report.held is held and says in report.held_text
    assert report.passes is (held is not Held.DIFFERS)


def test_an_exception_that_the_kernel_lacks_is_told():
    result = traced(CLIENT, "10.96.0.10:53", protocol=UDP, rules=(RULES[0], RULES[2]))
    assert "the kernel has no exception for 10.96.0.10" in result.conclusion


def test_without_a_plan_nothing_is_claimed():
    interception = a_status().interception
    result = traced(CLIENT, "10.96.0.20:80", planned=None, interception=interception)
    assert rules(result) == ["interception:not-planned"] and not result.arrives


def test_a_virtual_address_that_is_not_intercepted_does_not_arrive():

    off = msgspec.structs.replace(PLANNED, virtual_ranges=())
    result = traced(CLIENT, "240.96.0.7:5432", planned=off)
    assert not result.arrives and "virtual address" in hop(result, "interception").outcome


def test_facts_that_the_worker_did_not_give_are_not_checked():
    result = traced(CLIENT, "web", endpoints=None, links=None)
    assert hop(result, "endpoint").held is Held.NOT_CHECKED
    assert hop(result, "path").held is Held.NOT_CHECKED and result.arrives


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shop/client", "pod shop/client"),
        ("cart", "pod shop/cart"),  # unique by name
        ("172.17.0.5", "pod ops/client"),
        ("fd00:17:0:0::6", "pod shop/cart"),
        ("10.9.9.9", "address 10.9.9.9"),  # Pod objects are not needed
        ("host", "node edge-1"),
        ("node", "node edge-1"),
        ("edge-1", "node edge-1"),
        ("192.168.1.5", "node edge-1"),
    ],
)
def test_a_source_is_found_by_name_or_address(text, expected):
    assert find_source(text, facts()).name == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("client", "say which: ops/client, shop/client"),
        ("shop/far", "run `isthmus trace` on edge-2"),
        ("nobody", "known here: ops/client"),
        ("ops/cart", "no pod “ops/cart”"),
    ],
)
def test_a_source_that_cannot_be_meant_is_wrong_use(text, says):
    with pytest.raises(UsageError) as caught:
        find_source(text, facts())
    assert says in str(caught.value)


def test_without_pods_in_the_store_the_hint_says_what_will_do():
    with pytest.raises(UsageError, match="give the pod's address"):
        find_source("x", facts(pods=()))


@pytest.mark.parametrize(("source", "asked"), [("shop/client", 1), ("host", 1), ("cart", 2)])
def test_the_agent_is_asked_again_only_where_the_namespace_was_not_given(source, asked):
    questions = []

    def ask(arguments):
        questions.append(arguments)
        return answer_facts()(arguments)

    assert trace(source, "web.shop.svc.cluster.local.", TCP, ask, Table()).arrives
    assert len(questions) == asked


def test_a_pod_of_the_host_network_has_the_nodes_addresses():
    pods = (*PODS, Pod("ops", "agent", "edge-1", ("192.168.1.5",), host_network=True))
    assert find_source("agent", facts(pods=pods)).addresses == ("192.168.1.5",)


@pytest.mark.parametrize(
    ("name", "namespace", "tried"),
    [
        ("web", "shop", ["web.shop.svc.d", "web.svc.d", "web.d", "web"]),
        ("web.", "shop", ["web"]),
        ("web", "", ["web"]),
        ("a.b.c.d.e.f", "shop", ["a.b.c.d.e.f", "a.b.c.d.e.f.shop.svc.d", "a.b.c.d.e.f.svc.d", "a.b.c.d.e.f.d"]),
    ],
)
def test_the_search_path_is_that_of_a_pod(name, namespace, tried):
    assert search_path(name, namespace, "d") == tried


@pytest.mark.parametrize(
    ("addresses", "own", "chosen"),
    [
        (["fd00::1", "10.0.0.1"], ["10.1.1.1", "fd00::9"], "10.0.0.1"),
        (["fd00::1", "10.0.0.1"], ["fd00::9"], "fd00::1"),
        (["fd00::1"], ["10.1.1.1"], "fd00::1"),  # it will fail, but it is what the client tries
        ([], ["10.1.1.1"], ""),
    ],
)
def test_the_address_of_a_family_that_the_client_has_is_chosen(addresses, own, chosen):
    assert choose(addresses, own)[0] == chosen


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("web", ("web", 0)),
        ("web:80", ("web", 80)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[FD00::1]:80", ("fd00::1", 80)),
        ("fd00::1", ("fd00::1", 0)),
        ("[fd00::1]", ("fd00::1", 0)),
        ("web.shop.svc.cluster.local.:65535", ("web.shop.svc.cluster.local.", 65535)),
    ],
)
def test_a_destination_has_a_host_and_maybe_a_port(text, parts):
    assert split_destination(text) == parts


@pytest.mark.parametrize(
    "text", ["", ":80", "web:", "web:0", "web:65536", "web:x", "web:8 0", "a b", "http://web", "web:²"]
)
def test_a_destination_that_cannot_be_meant_is_wrong_use(text):
    with pytest.raises(UsageError):
        split_destination(text)


@given(st.text(max_size=40))
def test_any_destination_is_traced_or_refused(text):
    try:
        name, port = split_destination(text)
    except UsageError:
        return
    source = Source("pod shop/client", "edge-1", ("172.17.0.4",), "shop")
    result = follow(Flow(source, TCP, name, port=port), facts(name, "shop"), Table())
    assert result.hops and result.conclusion


def test_the_command_prints_every_hop_and_the_conclusion(tmp_path, capsys):
    with answering(tmp_path, {"facts": answer_facts()}):
        code = run(["trace", "host", "10.96.0.20:80", "--run-directory", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0
    assert out.startswith("node edge-1 to 10.96.0.20:80/TCP, seen from edge-1\n\n1. interception: 10.96.0.20:80 is")
    assert "held against ok" in out and "also         ranked lower: relayed by cloud" in out
    assert out.splitlines()[-1].startswith("node edge-1 to 10.96.0.20:80/TCP arrives at one of 2 endpoints")


def test_json_has_the_documented_fields_and_exit_code_1_where_nothing_arrives(tmp_path, capsys):
    with answering(tmp_path, {"facts": answer_facts()}):
        code = run(["trace", "host", "10.96.0.30:80", "-o", "json", "--run-directory", str(tmp_path)])
    result = json.loads(capsys.readouterr().out)
    assert code == 1 and result["arrives"] is False
    assert list(result) == [
        *("node", "source", "destination", "protocol", "address", "port", "service", "arrives", "conclusion", "hops"),
    ]
    assert list(result["hops"][0]) == [
        *("hop", "outcome", "rule", "because", "object", "place", "setting", "held", "held_text", "alternatives"),
        "passes",
    ]
