"""Service names: every record of the specification, and "no such name" told apart from "no such record"."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.model.cluster import Protocol
from isthmus.plan.names import Names, RecordType, Resolution
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

A, AAAA, SRV, PTR, CNAME, TXT, SOA, NS = (
    RecordType.A,
    RecordType.AAAA,
    RecordType.SRV,
    RecordType.PTR,
    RecordType.CNAME,
    RecordType.TXT,
    RecordType.SOA,
    RecordType.NS,
)


def member(address: str, *, hostname: str = "", ready: bool = True, port: int = 8080, visible: str = "") -> Member:
    return Member("edge1", address, Distance.ANYWHERE, {"http": port}, hostname, "", visible or address, False, ready)


HTTP = PortPlan(80, "http")
WEB = ServicePlan(
    "shop",
    "web",
    ServiceKind.CLUSTER_IP,
    cluster_ips=("10.96.0.7", "fd00:96::7"),
    ports=(HTTP, PortPlan(53, "dns", Protocol.UDP), PortPlan(9000)),
    origin="web.yaml:3",
)
DB = ServicePlan(
    "shop",
    "db",
    ServiceKind.HEADLESS,
    ports=(HTTP,),
    members=(
        member("172.17.0.2", hostname="db-0", visible="240.96.0.1"),
        member("172.17.0.3", hostname="db-1"),
        member("fd01::3", hostname="db-1"),
        member("172.17.0.4"),
        member("172.17.0.5", hostname="db-9", ready=False),
    ),
)
OUTSIDE = ServicePlan("shop", "mail", ServiceKind.EXTERNAL_NAME, external_name="mx.example.com")
INSIDE = ServicePlan("shop", "alias", ServiceKind.EXTERNAL_NAME, external_name="Web.shop.svc.cluster.local.")
SELF = ServicePlan("shop", "loop", ServiceKind.EXTERNAL_NAME, external_name="loop.shop.svc.cluster.local")
IGNORED = ServicePlan(
    "kube-system", "metrics", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.9",), ignored="noproxy=edgemesh"
)
LATE = ServicePlan(
    "shop",
    "late",
    ServiceKind.HEADLESS,
    ports=(HTTP,),
    members=(member("172.17.0.8", ready=False),),
    publish_not_ready=True,
)
ALL = (WEB, DB, OUTSIDE, INSIDE, SELF, IGNORED, LATE)


@pytest.fixture
def names() -> Names:
    built = Names("cluster.local", own_addresses=("169.254.96.16",), local_networks=("10.96.0.0/12", "240.96.0.0/16"))
    for plan in ALL:
        built.put(plan)
    return built


@pytest.mark.parametrize(
    ("name", "rtype", "data"),
    [
        ("web.shop.svc.cluster.local", A, ["10.96.0.7"]),
        ("WEB.Shop.svc.cluster.LOCAL.", A, ["10.96.0.7"]),
        ("web.shop.svc.cluster.local", AAAA, ["fd00:96::7"]),
        ("_http._tcp.web.shop.svc.cluster.local", SRV, ["0 100 80 web.shop.svc.cluster.local."]),
        ("_dns._udp.web.shop.svc.cluster.local", SRV, ["0 100 53 web.shop.svc.cluster.local."]),
        ("metrics.kube-system.svc.cluster.local", A, ["10.96.0.9"]),  # opted out of interception, not of DNS
        ("db.shop.svc.cluster.local", A, ["240.96.0.1", "172.17.0.3", "172.17.0.4"]),  # the fourth is not ready
        ("db-0.db.shop.svc.cluster.local", A, ["240.96.0.1"]),  # not routable from here: the virtual address
        ("db-1.db.shop.svc.cluster.local", AAAA, ["fd01::3"]),
        ("172-17-0-4.db.shop.svc.cluster.local", A, ["172.17.0.4"]),  # no hostname: the address names it
        ("late.shop.svc.cluster.local", A, ["172.17.0.8"]),  # publishNotReadyAddresses
        ("mail.shop.svc.cluster.local", A, []),
        ("dns-version.cluster.local", TXT, ['"1.1.0"']),
        ("7.0.96.10.in-addr.arpa", PTR, ["web.shop.svc.cluster.local."]),
        ("1.0.96.240.in-addr.arpa", PTR, ["db-0.db.shop.svc.cluster.local."]),
        ("4.0.17.172.in-addr.arpa", PTR, ["172-17-0-4.db.shop.svc.cluster.local."]),
        ("10-1-2-3.shop.pod.cluster.local", A, ["10.1.2.3"]),
        ("fd01--3.shop.pod.cluster.local", AAAA, ["fd01::3"]),
        ("cluster.local", NS, ["ns.dns.cluster.local."]),
        ("ns.dns.cluster.local", A, ["169.254.96.16"]),
    ],
)
def test_each_name_has_the_records_of_the_specification(
    names: Names, name: str, rtype: RecordType, data: list[str]
) -> None:
    answer = names.lookup(name, rtype).action
    assert [record.data for record in answer.records if record.type is rtype] == data
    assert answer.resolution is Resolution.ANSWER


def test_srv_of_a_headless_service_lists_each_member_with_its_own_port_and_addresses(names: Names) -> None:
    answer = names.lookup("_http._tcp.db.shop.svc.cluster.local", SRV).action
    assert [record.data for record in answer.records] == [
        "0 33 8080 db-0.db.shop.svc.cluster.local.",
        "0 33 8080 db-1.db.shop.svc.cluster.local.",
        "0 33 8080 172-17-0-4.db.shop.svc.cluster.local.",
    ]
    assert {record.data for record in answer.additional} == {"240.96.0.1", "172.17.0.3", "fd01::3", "172.17.0.4"}


@pytest.mark.parametrize(
    ("name", "rtype", "resolution", "rule"),
    [
        ("svc.cluster.local", A, Resolution.NODATA, "empty-non-terminal"),
        ("shop.svc.cluster.local", A, Resolution.NODATA, "empty-non-terminal"),
        ("pod.cluster.local", A, Resolution.NODATA, "empty-non-terminal"),
        ("dns.cluster.local", A, Resolution.NODATA, "empty-non-terminal"),
        ("_tcp.web.shop.svc.cluster.local", SRV, Resolution.NODATA, "no-such-type"),
        ("web.shop.svc.cluster.local", TXT, Resolution.NODATA, "no-such-type"),
        ("metrics.kube-system.svc.cluster.local", AAAA, Resolution.NODATA, "no-such-type"),
        ("db-0.db.shop.svc.cluster.local", AAAA, Resolution.NODATA, "no-such-type"),
        ("10-1-2-3.shop.pod.cluster.local", AAAA, Resolution.NODATA, "no-such-type"),
        ("7.0.96.10.in-addr.arpa", A, Resolution.NODATA, "no-such-type"),
        ("nope.svc.cluster.local", A, Resolution.NXDOMAIN, "no-such-namespace"),
        ("nope.shop.svc.cluster.local", A, Resolution.NXDOMAIN, "no-such-service"),
        ("web.shop.svc.cluster.local.default.svc.cluster.local", A, Resolution.NXDOMAIN, "no-such-namespace"),
        ("web.shop.svc.cluster.local.svc.cluster.local", A, Resolution.NXDOMAIN, "no-such-namespace"),
        ("web.shop.svc.cluster.local.cluster.local", A, Resolution.NXDOMAIN, "no-such-name"),
        ("example.com.shop.svc.cluster.local", A, Resolution.NXDOMAIN, "no-such-service"),
        ("_smtp._tcp.web.shop.svc.cluster.local", SRV, Resolution.NXDOMAIN, "no-such-port"),
        ("db-9.db.shop.svc.cluster.local", A, Resolution.NXDOMAIN, "no-such-member"),
        ("x.mail.shop.svc.cluster.local", A, Resolution.NXDOMAIN, "no-such-member"),
        ("one-two.shop.pod.cluster.local", A, Resolution.NXDOMAIN, "no-such-pod"),
        ("8.0.96.10.in-addr.arpa", PTR, Resolution.NXDOMAIN, "no-such-address"),
        ("1.2.0.192.in-addr.arpa", PTR, Resolution.FORWARD, "not-ours"),
        ("example.com", A, Resolution.FORWARD, "not-ours"),
        ("notcluster.local", A, Resolution.FORWARD, "not-ours"),
    ],
)
def test_absence_names_its_kind_and_its_rule(
    names: Names, name: str, rtype: RecordType, resolution: Resolution, rule: str
) -> None:
    verdict = names.lookup(name, rtype)
    assert (verdict.action.resolution, verdict.rule) == (resolution, rule)
    assert verdict.because.text
    negative = resolution in (Resolution.NODATA, Resolution.NXDOMAIN)
    assert [record.type for record in verdict.action.authority] == ([SOA] if negative else [])


def test_an_external_name_outside_is_an_alias_to_be_followed(names: Names) -> None:
    answer = names.lookup("mail.shop.svc.cluster.local", A).action
    assert [record.data for record in answer.records] == ["mx.example.com."]
    assert answer.follow == "mx.example.com"


def test_an_external_name_inside_is_followed_here_and_depends_on_both_services(names: Names) -> None:
    answer = names.lookup("alias.shop.svc.cluster.local", A).action
    assert [record.data for record in answer.records] == ["web.shop.svc.cluster.local.", "10.96.0.7"]
    assert set(answer.scopes) == {"shop/alias", "shop/web"}


def test_an_external_name_that_points_at_itself_ends(names: Names) -> None:
    assert len(names.lookup("loop.shop.svc.cluster.local", A).action.records) <= 9


def test_the_verdict_names_the_object_that_decided(names: Names) -> None:
    verdict = names.lookup("web.shop.svc.cluster.local", A)
    assert verdict.rule == "cluster-ip"
    assert verdict.because.object == "Service shop/web"
    assert "web.yaml:3" in verdict.because.text


def test_a_change_returns_the_scopes_of_all_answers_that_it_changes(names: Names) -> None:
    assert names.put(WEB) == set()
    moved = ServicePlan("shop", "web", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.8",))
    assert names.put(moved) == {"shop/web", "ptr/10.96.0.7", "ptr/fd00:96::7", "ptr/10.96.0.8"}
    assert names.put(ServicePlan("new", "x", ServiceKind.HEADLESS)) == {"new/x", "new/"}
    assert names.drop("new", "x") == {"new/x", "new/"}
    assert names.drop("new", "x") == set()


def test_endpoints_of_a_cluster_address_change_no_answer(names: Names) -> None:
    grown = ServicePlan(
        "shop",
        "web",
        WEB.kind,
        cluster_ips=WEB.cluster_ips,
        ports=WEB.ports,
        members=(member("10.0.0.1"),),
        origin=WEB.origin,
    )
    assert names.put(grown) == set()


PLANS = st.lists(st.sampled_from(ALL), max_size=12)
LABEL = st.sampled_from(["web", "db", "db-0", "_http", "_tcp", "shop", "svc", "pod", "nope", "1-2-3-4", "cluster"])


@given(PLANS, PLANS, st.lists(LABEL, max_size=6), st.sampled_from(list(RecordType)))
def test_answers_depend_on_the_state_and_not_on_its_history(
    first: list[ServicePlan], dropped: list[ServicePlan], labels: list[str], rtype: RecordType
) -> None:
    worn, fresh = Names("cluster.local"), Names("cluster.local")
    for plan in first:
        worn.put(plan)
    for plan in dropped:
        worn.drop(plan.namespace, plan.name)
    for plan in first:
        if plan not in dropped:
            fresh.put(plan)
    for name in (".".join((*labels, "cluster.local")), "7.0.96.10.in-addr.arpa"):
        assert worn.lookup(name, rtype) == fresh.lookup(name, rtype)


@given(PLANS, st.lists(LABEL, min_size=1, max_size=6), st.sampled_from(list(RecordType)))
def test_a_name_above_an_existing_name_exists_too(
    plans: list[ServicePlan], labels: list[str], rtype: RecordType
) -> None:
    names = Names("cluster.local")
    for plan in plans:
        names.put(plan)
    found = names.lookup(".".join((*labels, "cluster.local")), rtype).action
    above = names.lookup(".".join((*labels[1:], "cluster.local")), rtype).action
    if found.resolution is Resolution.ANSWER:
        assert above.resolution is not Resolution.NXDOMAIN
