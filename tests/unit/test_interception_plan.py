"""The decision for one packet, and the plan that carries it."""

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.model.cluster import Protocol
from isthmus.model.errors import NotSupported
from isthmus.model.marks import ENCRYPTION_MASK, FROM_CLIENT, INTERCEPTION_MASK, OWN, TO_SOCKET
from isthmus.model.settings import Backend, InterceptSettings, OriginalDestination
from isthmus.plan.interception import (
    MAX_COMMENT_BYTES,
    RULES,
    TCP,
    UDP,
    Action,
    Capabilities,
    Handover,
    Ignored,
    InterceptionPlan,
    Packet,
    Preserved,
    decide,
    fit_comment,
    ignored_addresses,
    plan_interception,
    preserved_endpoints,
)
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

SETTINGS = InterceptSettings(service_cidrs=("10.96.0.0/12", "fd00:10:96::/112"))
VIRTUAL = ("240.96.0.0/16", "fd00:a9fe:6011::/112")
ABLE = Capabilities()
IGNORED = {"10.96.0.1": Ignored("default", "kubernetes", "metadata.labels[noproxy]")}


def plan(
    settings: InterceptSettings = SETTINGS,
    capabilities: Capabilities = ABLE,
    own: tuple[str, ...] = ("192.0.2.1", "10.97.0.1"),
) -> InterceptionPlan:
    return plan_interception(settings, VIRTUAL, IGNORED, (), own, capabilities)


@pytest.mark.parametrize(
    ("destination", "protocol", "mark", "action", "rule"),
    [
        ("10.96.0.80", TCP, 0, Action.INTERCEPT, "service-range"),
        ("10.96.0.80", UDP, 0, Action.INTERCEPT, "service-range"),
        ("fd00:10:96::80", TCP, 0, Action.INTERCEPT, "service-range"),
        ("240.96.1.1", UDP, 0, Action.INTERCEPT, "virtual-range"),
        ("fd00:a9fe:6011::7", TCP, 0, Action.INTERCEPT, "virtual-range"),
        ("10.96.0.80", 1, 0, Action.LEAVE, "other-protocol"),  # a ping of a service address
        ("10.96.0.80", 132, 0, Action.LEAVE, "other-protocol"),  # SCTP is not served
        ("10.96.0.1", TCP, 0, Action.RETURN, "ignored-service"),  # opted out: kube-proxy's rules decide
        ("10.96.0.1", 1, 0, Action.RETURN, "ignored-service"),  # the opt-out is by address alone
        ("10.97.0.1", TCP, 0, Action.RETURN, "own-address"),  # a node's address within the range
        ("192.0.2.1", TCP, 0, Action.LEAVE, "not-in-range"),
        ("8.8.8.8", UDP, 0, Action.LEAVE, "not-in-range"),
        ("10.96.0.80", TCP, OWN, Action.RETURN, "own-traffic"),  # the proxy's own connection to an endpoint
        ("10.96.0.80", TCP, FROM_CLIENT, Action.RETURN, "own-traffic"),
        ("10.96.0.80", TCP, 0x4000, Action.INTERCEPT, "service-range"),  # kube-proxy's mark is not ours
        ("10.96.0.80", TCP, 0xE0, Action.INTERCEPT, "service-range"),  # nor is encryption's
    ],
)
def test_the_rule_that_decides_is_named(destination: str, protocol: int, mark: int, action: Action, rule: str) -> None:
    verdict = decide(Packet(destination, protocol, mark), plan())
    assert (verdict.action, verdict.rule) == (action, rule)
    assert verdict.because.text


def test_an_opted_out_service_is_named_with_its_label() -> None:
    verdict = decide(Packet("10.96.0.1", TCP), plan())
    assert verdict.because.text == "ignore default/kubernetes service"
    assert verdict.because.object == "Service default/kubernetes"
    assert verdict.because.setting == "metadata.labels[noproxy]"


def test_a_family_without_a_range_or_address_is_left_alone() -> None:
    off = plan(capabilities=Capabilities(ipv6="the kernel has no IPv6"))
    assert decide(Packet("fd00:10:96::80", TCP), off).rule == "family-off"
    assert off.address_v6 == ""
    assert off.versions() == (4,)


def test_marks_of_ours_lie_within_our_masks_and_collide_with_nobody() -> None:
    others = (0x4000, 0x8000, 0xF00, 0xFFFF0000, 0xFF0000)
    assert ENCRYPTION_MASK & INTERCEPTION_MASK == 0
    assert all((ENCRYPTION_MASK | INTERCEPTION_MASK) & other == 0 for other in others)
    assert all(mark & ~INTERCEPTION_MASK == 0 for mark in (OWN, TO_SOCKET, FROM_CLIENT))
    assert TO_SOCKET & OWN == 0, "a packet on its way to a socket must not count as sent by one"
    assert FROM_CLIENT & OWN


addresses = st.one_of(
    st.ip_addresses(network="10.64.0.0/10").map(str),
    st.ip_addresses(network="240.0.0.0/8").map(str),
    st.ip_addresses(network="fd00:10:96::/108").map(str),
    st.ip_addresses().map(str),
)
networks = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.integers(4, 32)), st.tuples(st.ip_addresses(v=6), st.integers(8, 128))
).map(lambda pair: str(ip_network(pair, strict=False)))


@given(addresses, st.sampled_from([TCP, UDP, 1, 132]), st.integers(0, 0xFFFFFFFF))
def test_what_is_intercepted_is_in_a_range_unmarked_and_not_excepted(address: str, protocol: int, mark: int) -> None:
    made = plan()
    verdict = decide(Packet(address, protocol, mark), made)
    version = ip_address(address).version
    expected = (
        any(ip_address(address) in ip_network(text) for text in made.taken(version))
        and address not in made.exceptions(version)
        and protocol in (TCP, UDP)
        and not mark & OWN
    )
    assert (verdict.action is Action.INTERCEPT) == expected


@given(st.lists(networks, max_size=6), st.lists(networks, max_size=3), addresses)
def test_merged_ranges_hold_what_the_given_ones_hold_and_never_overlap(
    service: list[str], virtual: list[str], address: str
) -> None:
    made = plan_interception(InterceptSettings(service_cidrs=tuple(service)), virtual, {}, (), (), Capabilities())
    version = ip_address(address).version
    taken = [ip_network(text) for text in made.taken(version)]
    same = [network for text in (*service, *virtual) if (network := ip_network(text)).version == version]
    assert any(ip_address(address) in network for network in taken) == any(
        ip_address(address) in network for network in same
    )
    assert not any(one.overlaps(other) for one in taken for other in taken if one is not other)


@given(st.text(max_size=300))
def test_a_comment_fits_every_backend(text: str) -> None:
    comment = fit_comment(text)
    assert len(comment.encode()) <= MAX_COMMENT_BYTES
    assert comment.isprintable()
    assert not set(comment) & set("\"'\\\n")
    assert fit_comment(comment) == comment


def test_the_longest_names_of_kubernetes_are_cut_and_the_others_are_not() -> None:
    assert Ignored("n" * 63, "s" * 63).comment == f"ignore {'n' * 63}/{'s' * 53}..."
    assert Ignored("shop", "cart").comment == "ignore shop/cart service"


@pytest.mark.parametrize(
    ("setting", "capabilities", "backend"),
    [
        (Backend.AUTO, Capabilities(), Backend.NFTABLES),
        (Backend.AUTO, Capabilities(nftables="no nf_tables"), Backend.IPTABLES),
        (Backend.IPTABLES, Capabilities(), Backend.IPTABLES),
    ],
)
def test_the_backend_is_chosen_by_what_works(setting: Backend, capabilities: Capabilities, backend: Backend) -> None:
    assert plan(InterceptSettings(backend=setting), capabilities).backend is backend


@pytest.mark.parametrize(
    ("setting", "capabilities"),
    [
        (Backend.AUTO, Capabilities(nftables="x", iptables="y")),
        (Backend.NFTABLES, Capabilities(nftables="x")),
        (Backend.IPTABLES, Capabilities(iptables="y")),
    ],
)
def test_a_backend_that_is_missing_is_an_error_with_advice(setting: Backend, capabilities: Capabilities) -> None:
    with pytest.raises(NotSupported) as caught:
        plan(InterceptSettings(backend=setting), capabilities)
    assert caught.value.hint


HANGS = "SO_ORIGINAL_DST did not return"


@pytest.mark.parametrize(
    ("setting", "capabilities", "handover", "note"),
    [
        (OriginalDestination.AUTO, Capabilities(), Handover.DNAT, "SO_ORIGINAL_DST"),
        (OriginalDestination.TPROXY, Capabilities(), Handover.TPROXY, "asked for"),
        (OriginalDestination.AUTO, Capabilities(original_destination=HANGS), Handover.TPROXY, HANGS),
        # Asking for the call does not make it safe: it would hang the proxy for ever.
        (OriginalDestination.GETSOCKOPT, Capabilities(original_destination=HANGS), Handover.TPROXY, HANGS),
        (
            OriginalDestination.AUTO,
            Capabilities(original_destination=HANGS, tproxy="no TPROXY"),
            Handover.DNAT,
            "conntrack's record",
        ),
    ],
)
def test_the_handover_is_chosen_by_the_trial_and_says_why(
    setting: OriginalDestination, capabilities: Capabilities, handover: Handover, note: str
) -> None:
    made = plan(InterceptSettings(original_destination=setting), capabilities)
    assert made.handover is handover
    assert any(note in text.text for text in made.notes)


def test_tproxy_that_was_asked_for_and_is_missing_is_an_error() -> None:
    with pytest.raises(NotSupported):
        plan(InterceptSettings(original_destination=OriginalDestination.TPROXY), Capabilities(tproxy="x"))


def _service(name: str, **fields: object) -> ServicePlan:
    return ServicePlan("shop", name, ServiceKind.CLUSTER_IP, **fields)  # type: ignore[arg-type]


def test_ignored_addresses_come_from_services_that_opted_out() -> None:
    services = (
        _service("b", cluster_ips=("10.96.0.2", "fd00:10:96:0:0::2"), ignored="noproxy=edgemesh"),
        _service("a", cluster_ips=("10.96.0.2",), ignored="isthmus.dev/proxy=false"),
        _service("c", cluster_ips=("10.96.0.3",)),
    )
    found = ignored_addresses(services)
    assert found == {
        "10.96.0.2": Ignored("shop", "a", "isthmus.dev/proxy=false"),
        "fd00:10:96::2": Ignored("shop", "b", "noproxy=edgemesh"),
    }


def test_preserved_endpoints_are_tcp_ports_of_members_on_this_node() -> None:
    members = (
        Member("me", "172.17.0.3", Distance.SAME_NODE, {"http": 8080, "log": 514}),
        Member("other", "172.17.0.4", Distance.ANYWHERE, {"http": 8080}),
    )
    ports = (PortPlan(80, "http"), PortPlan(514, "log", Protocol.UDP), PortPlan(81, "absent"))
    wanted = _service("web", ports=ports, members=members, preserve_client_address=True)
    others = (_service("plain", ports=ports, members=members), _service("out", ports=ports, ignored="x"))
    assert preserved_endpoints((wanted, *others), "me") == {Preserved("172.17.0.3", 8080)}


def test_the_rule_table_of_the_documentation_is_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs/interception.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    documented = [cells[1].strip(" `") for cells in rows if cells[1].strip(" `") in _NAMES]
    assert documented == _NAMES
    assert len(RULES) + 2 == len(_NAMES), "one rule has two outcomes, and one name is for no rule"


_NAMES = [
    "family-off",
    "own-traffic",
    "own-address",
    "ignored-service",
    "other-protocol",
    "service-range",
    "virtual-range",
    "not-in-range",
]
