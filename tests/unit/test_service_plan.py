"""Service plans: what this node serves, and which label, annotation or field decided."""

from typing import Any

import pytest

from isthmus.model import labels
from isthmus.model.cluster import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    Protocol,
    Service,
    ServicePort,
    ServiceType,
)
from isthmus.plan.nodes import Adoption, Me, NodeFacts, describe_me, merge_node
from isthmus.plan.optout import OptOut, opt_out
from isthmus.plan.services import PREFER, plan_service, wanted_virtual
from isthmus.plan.serving import Balance, Distance, Member, ServiceKind, ServicePlan

ME = Me("me", "north", ("172.17.0.0/16",))
NODES = {
    "me": NodeFacts("north", ("172.17.0.0/16",)),
    "near": NodeFacts("north", ("10.1.0.0/24",)),
    "twin": NodeFacts("north", ("172.17.0.0/16",), ("192.168.1.9",)),
    "far": NodeFacts("south", ("172.17.0.0/16",)),
}
HTTP = (EndpointPort(8080, "http"),)


def service(**fields: Any) -> Service:
    return Service("shop", "web", **{"ports": (ServicePort(80, "http"),), "cluster_ips": ("10.96.0.1",), **fields})


def piece(*endpoints: Endpoint, name: str = "web-1", ports: tuple[EndpointPort, ...] = HTTP) -> EndpointSlice:
    return EndpointSlice("shop", name, "web", ports, endpoints)


def plan(of: Service, *slices: EndpointSlice, virtual: dict[tuple[str, str], str] | None = None) -> ServicePlan:
    return plan_service(of, slices, NODES, ME, virtual or {})


def member(of: ServicePlan, node: str) -> Member:
    (found,) = [one for one in of.members if one.node == node]
    return found


def test_members_are_keyed_by_node_and_address() -> None:
    made = plan(
        service(), piece(Endpoint("172.17.0.2", "far"), Endpoint("172.17.0.2", "me"), Endpoint("172.17.0.2", "far"))
    )
    assert [(one.node, one.address) for one in made.members] == [("far", "172.17.0.2"), ("me", "172.17.0.2")]


def test_distances_follow_nodes_and_sites() -> None:
    names = ("me", "near", "far", "stranger")
    made = plan(service(), piece(*(Endpoint(f"10.1.0.{i + 1}", name) for i, name in enumerate(names))))
    assert [member(made, name).distance for name in names] == [
        Distance.SAME_NODE,
        Distance.SAME_SITE,
        Distance.ANYWHERE,
        Distance.ANYWHERE,
    ]


def test_nodes_without_a_site_are_not_on_one_site() -> None:
    made = plan_service(service(), [piece(Endpoint("10.1.0.1", "x"))], {"x": NodeFacts()}, Me("me"), {})
    assert made.members[0].distance is Distance.ANYWHERE


def test_an_endpoint_without_a_node_is_not_served() -> None:
    assert plan(service(), piece(Endpoint("172.17.0.2"))).members == ()


def test_ports_are_joined_by_name_and_protocol_over_all_slices() -> None:
    of = service(
        ports=(ServicePort(80, "http"), ServicePort(53, "dns", Protocol.UDP), ServicePort(9, "s", Protocol.SCTP))
    )
    end = Endpoint("10.1.0.1", "near")
    ports = (EndpointPort(5353, "dns", Protocol.UDP), EndpointPort(1, "http", Protocol.UDP), EndpointPort(2, "other"))
    made = plan(of, piece(end), piece(end, name="web-2", ports=ports))
    assert made.members[0].ports == {"http": 8080, "dns": 5353}
    assert [port.name for port in made.ports] == ["http", "dns"]


def test_an_endpoint_with_none_of_the_ports_is_no_member_unless_the_service_is_headless() -> None:
    other = piece(Endpoint("10.1.0.1", "near"), ports=(EndpointPort(1, "other"),))
    assert plan(service(), other).members == ()
    assert len(plan(service(headless=True, cluster_ips=()), other).members) == 1


def test_terminating_members_serve_only_while_no_other_is_ready() -> None:
    leaving = Endpoint("10.1.0.1", "near", ready=False, serving=True, terminating=True)
    down = Endpoint("10.1.0.3", "far", ready=False, serving=False)
    assert [one.ready for one in plan(service(), piece(leaving, down)).members] == [False, True]
    ready = Endpoint("10.1.0.2", "me")
    made = plan(service(), piece(leaving, ready))
    assert (member(made, "near").ready, member(made, "me").ready) == (False, True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ServiceKind.CLUSTER_IP),
        ({"type": ServiceType.NODE_PORT}, ServiceKind.CLUSTER_IP),
        ({"type": ServiceType.LOAD_BALANCER}, ServiceKind.CLUSTER_IP),
        ({"headless": True}, ServiceKind.HEADLESS),
        ({"type": ServiceType.EXTERNAL_NAME, "external_name": "x.org"}, ServiceKind.EXTERNAL_NAME),
    ],
)
def test_kinds(fields: dict[str, Any], expected: ServiceKind) -> None:
    made = plan(service(**fields), piece(Endpoint("10.1.0.1", "near")))
    assert made.kind is expected
    assert bool(made.members) is (expected is not ServiceKind.EXTERNAL_NAME)


@pytest.mark.parametrize(
    ("fields", "prefer", "local_only"),
    [
        ({}, Distance.ANYWHERE, False),
        ({"traffic_distribution": "PreferClose"}, Distance.SAME_SITE, False),
        ({"traffic_distribution": "PreferSameZone"}, Distance.SAME_SITE, False),
        ({"traffic_distribution": "PreferSameNode"}, Distance.SAME_NODE, False),
        ({"traffic_distribution": "Unknown"}, Distance.ANYWHERE, False),
        ({"internal_traffic_policy": "Local"}, Distance.SAME_NODE, True),
        ({"annotations": {labels.PREFER: "same-site"}}, Distance.SAME_SITE, False),
        ({"annotations": {labels.PREFER: "anywhere"}, "traffic_distribution": "PreferClose"}, Distance.ANYWHERE, False),
        (
            {"annotations": {labels.PREFER: "nonsense"}, "traffic_distribution": "PreferClose"},
            Distance.SAME_SITE,
            False,
        ),
    ],
)
def test_preference(fields: dict[str, Any], prefer: Distance, local_only: bool) -> None:
    made = plan(service(**fields))
    assert (made.prefer, made.local_only) == (prefer, local_only)


def test_annotations_and_affinity_reach_the_plan() -> None:
    asked = {labels.BALANCE: "least-connections", labels.PRESERVE_CLIENT_ADDRESS: "true"}
    made = plan(service(annotations=asked, client_ip_affinity_s=60))
    assert (made.balance, made.preserve_client_address, made.affinity_s) == (Balance.LEAST_CONNECTIONS, True, 60)
    wrong = plan(service(annotations={labels.BALANCE: "fastest", labels.PRESERVE_CLIENT_ADDRESS: "yes"}))
    assert (wrong.balance, wrong.preserve_client_address) == (Balance.ROUND_ROBIN, False)


def test_every_value_that_parsing_allows_means_something_here() -> None:
    assert {value.value for value in Balance} == set(labels.SERVICE_ANNOTATIONS[labels.BALANCE])
    assert PREFER.keys() == set(labels.SERVICE_ANNOTATIONS[labels.PREFER])


@pytest.mark.parametrize(
    ("namespace", "name", "given", "rule", "ignored"),
    [
        ("shop", "web", {}, "default", ""),
        ("shop", "web", {"noproxy": "edgemesh"}, "noproxy-edgemesh", "noproxy=edgemesh"),
        ("shop", "web", {"noproxy": "other"}, "default", ""),
        ("shop", "web", {labels.PROXY_NAME: "cilium"}, "service-proxy-name", f"{labels.PROXY_NAME}=cilium"),
        ("shop", "web", {labels.PROXY_NAME: ""}, "service-proxy-name", f"{labels.PROXY_NAME}="),
        ("shop", "web", {labels.PROXY: "false"}, "proxy-false", "isthmus.dev/proxy=false"),
        ("shop", "web", {labels.PROXY: "true", "noproxy": "edgemesh"}, "proxy-true", ""),
        ("shop", "web", {labels.PROXY: "wrong"}, "default", ""),
        ("default", "kubernetes", {}, "left-to-the-cluster", "default/kubernetes is left to the cluster"),
        ("kube-system", "kube-dns", {}, "left-to-the-cluster", "kube-system/kube-dns is left to the cluster"),
        ("kube-system", "kube-dns", {labels.PROXY: "true"}, "proxy-true", ""),
        ("shop", "kubernetes", {}, "default", ""),
    ],
)
def test_the_rule_that_opts_out_is_named(
    namespace: str, name: str, given: dict[str, str], rule: str, ignored: str
) -> None:
    of = Service(namespace, name, labels=given)
    verdict = opt_out(of)
    assert verdict.rule == rule
    assert (verdict.action is OptOut.IGNORE) is bool(ignored)
    assert plan(of).ignored.startswith(ignored)


def headless() -> Service:
    return service(headless=True, cluster_ips=())


def test_headless_members_are_seen_at_their_own_address_where_it_can_be_routed_to() -> None:
    ends = (Endpoint("172.17.0.2", "me"), Endpoint("10.1.0.5", "near"), Endpoint("172.17.0.2", "far"))
    assert wanted_virtual(headless(), [piece(*ends)], NODES, ME) == (("far", "172.17.0.2"),)
    made = plan(headless(), piece(*ends), virtual={("far", "172.17.0.2"): "240.96.0.7"})
    assert (member(made, "me").visible_address, member(made, "me").virtual) == ("172.17.0.2", False)
    assert (member(made, "near").visible_address, member(made, "near").virtual) == ("10.1.0.5", False)
    assert (member(made, "far").visible_address, member(made, "far").virtual) == ("240.96.0.7", True)


def test_a_member_that_got_no_virtual_address_is_not_visible() -> None:
    assert member(plan(headless(), piece(Endpoint("172.17.0.2", "far"))), "far").visible_address == ""


def test_an_opted_out_headless_service_has_no_virtual_addresses() -> None:
    of = service(headless=True, cluster_ips=(), labels={"noproxy": "edgemesh"})
    assert wanted_virtual(of, [piece(Endpoint("172.17.0.2", "far"))], NODES, ME) == ()
    assert member(plan(of, piece(Endpoint("172.17.0.2", "far"))), "far").visible_address == "172.17.0.2"


STORED = Node("near", ("192.168.1.4",), (), ("10.1.0.0/24",), "north")


@pytest.mark.parametrize(
    ("name", "stored", "announced", "action", "rule"),
    [
        ("near", STORED, None, Adoption.STORED, "stored-only"),
        ("near", None, None, Adoption.STORED, "unknown"),
        ("near", None, NodeFacts("south"), Adoption.ANNOUNCED, "announced-only"),
        ("near", STORED, NodeFacts("", (), ("1.2.3.4",)), Adoption.MERGED, "no-conflict"),
        ("near", STORED, NodeFacts("south", ("10.9.0.0/24",)), Adoption.MERGED, "store-wins"),
        ("me", STORED, NodeFacts("south"), Adoption.REFUSED, "own-name"),
        ("near", STORED, NodeFacts("", ("0.0.0.0/0",)), Adoption.REFUSED, "range-too-wide"),
        ("near", STORED, NodeFacts("", ("10.96.4.0/24",)), Adoption.REFUSED, "reserved-range"),
        ("near", STORED, NodeFacts("", ("10.0.0.1/8",)), Adoption.REFUSED, "bad-range"),
        ("near", STORED, NodeFacts("", (), ("here",)), Adoption.REFUSED, "bad-address"),
        ("near", STORED, NodeFacts("", (), ("1.2.3.4",) * 65), Adoption.REFUSED, "too-many"),
    ],
)
def test_what_becomes_of_an_announcement(
    name: str, stored: Node | None, announced: NodeFacts | None, action: Adoption, rule: str
) -> None:
    known = merge_node(name, stored, announced, ME, reserved=("10.96.0.0/12", "fd00::/8"))
    assert (known.verdict.action, known.verdict.rule) == (action, rule)
    if stored:
        assert known.facts
        assert (known.facts.site, known.facts.pod_cidrs) == ("north", ("10.1.0.0/24",))


def test_what_the_store_leaves_open_is_taken_from_the_announcement() -> None:
    known = merge_node("x", Node("x", ("192.168.1.4",)), NodeFacts("west", ("10.5.0.0/24",), ("1.2.3.4",)), ME)
    assert known.facts == NodeFacts("west", ("10.5.0.0/24",), ("192.168.1.4", "1.2.3.4"))


def test_settings_win_over_the_store_for_this_node() -> None:
    assert describe_me("near", "", (), STORED) == Me("near", "north", ("10.1.0.0/24",))
    assert describe_me("near", "west", ("10.7.0.0/16",), STORED) == Me("near", "west", ("10.7.0.0/16",))
    assert describe_me("near", "", (), None) == Me("near")
