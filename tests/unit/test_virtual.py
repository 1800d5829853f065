"""Virtual addresses: who gets one, and that allocations are stable, unique and bounded."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from isthmus.model.cluster import Key
from isthmus.model.findings import Code
from isthmus.plan.nodes import Me, NodeFacts
from isthmus.plan.virtual import VirtualPool, VirtualRecord, Visibility, visibility

RANGES = ("240.96.0.0/16", "fd00:a9fe:6011::/112")
WEB, API = Key("Service", "shop", "web"), Key("Service", "shop", "api")
ME = Me("me", "north", ("172.17.0.0/16",))


@pytest.mark.parametrize(
    ("node", "address", "me", "action", "rule"),
    [
        ("me", "172.17.0.2", ME, Visibility.REAL, "same-node"),
        ("unheard-of", "10.1.0.2", ME, Visibility.VIRTUAL, "unknown-node"),
        ("near", "10.1.0.2", ME, Visibility.REAL, "same-site"),
        ("near", "10.2.0.2", ME, Visibility.VIRTUAL, "unknown-range"),
        ("twin", "172.17.0.2", ME, Visibility.VIRTUAL, "overlapping-ranges"),
        ("twin", "192.168.1.9", ME, Visibility.REAL, "node-address"),
        ("far", "10.9.0.2", ME, Visibility.VIRTUAL, "other-site"),
        ("siteless", "10.1.0.2", ME, Visibility.VIRTUAL, "unknown-site"),
        ("near", "10.1.0.2", Me("me"), Visibility.VIRTUAL, "unknown-site"),
        ("near", "fd00:1::5", ME, Visibility.REAL, "same-site"),
    ],
)
def test_who_needs_a_virtual_address(node: str, address: str, me: Me, action: Visibility, rule: str) -> None:
    nodes = {
        "near": NodeFacts("north", ("10.1.0.0/24", "fd00:1::/64")),
        "twin": NodeFacts("north", ("172.17.0.0/16",), ("192.168.1.9",)),
        "far": NodeFacts("south", ("10.9.0.0/24",)),
        "siteless": NodeFacts("", ("10.1.0.0/24",)),
    }
    verdict = visibility(node, address, nodes, me)
    assert (verdict.action, verdict.rule) == (action, rule)
    assert verdict.because.text


def members(*numbers: int) -> list[tuple[str, str]]:
    return [(f"node-{number % 7}", f"172.17.{number // 250}.{number % 250 + 2}") for number in numbers]


def test_an_address_is_the_same_on_every_start_and_whoever_else_is_there() -> None:
    (key,) = members(5)
    alone, crowded = VirtualPool(RANGES), VirtualPool(RANGES)
    alone.want(WEB, [key], 0)
    crowded.want(API, members(*range(6, 40)), 0)
    crowded.want(WEB, [key], 0)
    assert alone.addresses[key] == crowded.addresses[key]


def test_families_get_addresses_of_their_own_range() -> None:
    pool = VirtualPool(RANGES)
    pool.want(WEB, [("a", "172.17.0.2"), ("a", "fd00::2")], 0)
    assert ip_address(pool.addresses["a", "172.17.0.2"]) in ip_network(RANGES[0])
    assert ip_address(pool.addresses["a", "fd00::2"]) in ip_network(RANGES[1])


def test_the_way_back_names_member_and_services() -> None:
    pool = VirtualPool(RANGES)
    (key,) = members(1)
    pool.want(WEB, [key], 0)
    pool.want(API, [key], 0)
    owner = pool.owner(pool.addresses[key])
    assert owner
    assert ((owner.node, owner.address), owner.services) == (key, (API, WEB))
    assert pool.owner("240.96.0.1" if pool.addresses[key] != "240.96.0.1" else "240.96.0.2") is None


def test_an_address_is_kept_for_its_member_through_the_grace_and_then_reclaimed() -> None:
    pool = VirtualPool(RANGES, grace_s=600)
    (key,) = members(1)
    pool.want(WEB, [key], 0)
    address = pool.addresses[key]
    pool.want(WEB, [], 10)
    assert pool.expire(609) == ()
    assert pool.owner(address)
    assert pool.expire(610) == (address,)
    assert pool.owner(address) is None
    assert not pool.addresses


def test_a_member_that_comes_back_within_the_grace_keeps_its_address() -> None:
    pool = VirtualPool(("240.0.0.0/29",), grace_s=600)
    pool.want(WEB, members(*range(6)), 0)
    given = dict(pool.addresses)
    pool.want(WEB, [], 10)
    pool.want(WEB, members(3), 300)
    pool.expire(5000)
    assert pool.addresses == {key: given[key] for key in members(3)}


def test_exhaustion_is_reported_and_heals_when_addresses_are_free_again() -> None:
    pool = VirtualPool(("240.0.0.0/29",), grace_s=600)
    findings = pool.want(WEB, members(*range(8)), 0)
    assert [finding.code for finding in findings] == [Code.VIRTUAL_EXHAUSTED] * 2
    assert pool.short == {WEB}
    assert {int(ip_address(address)) & 7 for address in pool.addresses.values()} == {1, 2, 3, 4, 5, 6}
    pool.want(WEB, members(6, 7), 10)
    assert pool.short == {WEB}
    assert pool.want(WEB, members(6, 7), 700) == ()
    assert pool.short == frozenset()


def test_a_family_without_a_range_is_exhausted() -> None:
    assert VirtualPool(RANGES[:1]).want(WEB, [("a", "fd00::1")], 0)[0].expected.startswith("a larger IPv6 range")


def test_allocations_outlive_a_restart() -> None:
    first = VirtualPool(("240.0.0.0/28",))
    first.want(WEB, members(*range(10)), 0)
    second = VirtualPool(("240.0.0.0/28",), first.records(), now_s=50)
    assert second.addresses == first.addresses
    second.want(WEB, members(*range(9)), 60)
    assert second.expire(60 + 600) == (first.addresses[members(9)[0]],)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (VirtualRecord("a", "172.17.0.2", "10.0.0.1"), "outside the ranges"),
        (VirtualRecord("a", "172.17.0.2", "240.96.0.0"), "the network's own address"),
        (VirtualRecord("a", "172.17.0.2", "240.96.255.255"), "broadcast"),
        (VirtualRecord("a", "172.17.0.2", "fd00:a9fe:6011::5"), "the other family"),
    ],
)
def test_records_that_do_not_fit_any_more_are_forgotten(record: VirtualRecord, why: str) -> None:
    assert not VirtualPool(RANGES, [record]).addresses, why


class Allocation(RuleBasedStateMachine):
    """Invariants of the pool under any history, restarts among it."""

    ranges = ("240.0.0.0/29", "240.1.0.0/30", "fd00::/125")

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.pool = VirtualPool(self.ranges, grace_s=100)
        self.wanted: dict[Key, set[tuple[str, str]]] = {}
        self.before: dict[tuple[str, str], str] = {}

    @rule(service=st.sampled_from([WEB, API]), numbers=st.sets(st.integers(0, 12)), v6=st.booleans())
    def want(self, service: Key, numbers: set[int], v6: bool) -> None:
        wanted = {(node, f"fd01::{i}" if v6 else address) for i, (node, address) in enumerate(members(*numbers))}
        self.wanted[service] = wanted
        short = self.pool.want(service, wanted, self.now_s)
        assert len(short) == len([key for key in wanted if key not in self.pool.addresses])

    @rule(seconds=st.integers(0, 150))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds
        self.pool.expire(self.now_s)

    @rule()
    def restart(self) -> None:
        self.pool = VirtualPool(self.ranges, self.pool.records(), now_s=self.now_s, grace_s=100)
        for service, wanted in self.wanted.items():
            self.pool.want(service, wanted, self.now_s)

    @invariant()
    def addresses_are_unique_usable_and_lead_back(self) -> None:
        given = self.pool.addresses
        assert len(set(given.values())) == len(given)
        edges = {str(end) for text in self.ranges for end in (ip_network(text)[0], ip_network(text)[-1])}
        assert not edges & set(given.values())
        for key, address in given.items():
            owner = self.pool.owner(address)
            assert owner
            assert (owner.node, owner.address) == key

    @invariant()
    def a_wanted_address_never_moves(self) -> None:
        wanted = set().union(*self.wanted.values()) if self.wanted else set()
        for key in wanted & self.before.keys():
            assert self.pool.addresses[key] == self.before[key]
        self.before = {key: self.pool.addresses[key] for key in wanted if key in self.pool.addresses}


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
