"""Endpoint choice: each rule does what its name says, and 1,000 members cost no more than three."""

import time
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from isthmus.plan.balance import Candidate, Load, Pool, Ring, explain, of_family, passed_over
from isthmus.plan.serving import Balance, Distance, Member, PortPlan, ServiceKind, ServicePlan

HTTP = PortPlan(80, "http")
NEAR, SITE, FAR = Distance.SAME_NODE, Distance.SAME_SITE, Distance.ANYWHERE


def member(number: int, distance: Distance = FAR, *, ready: bool = True, node: str = "") -> Member:
    return Member(
        node or f"n{number}", f"10.0.{number // 250}.{number % 250 + 1}", distance, {"http": 8080}, ready=ready
    )


def plan_of(*members: Member, **fields: object) -> ServicePlan:
    return ServicePlan("shop", "web", ServiceKind.CLUSTER_IP, ("10.96.0.1",), ports=(HTTP,), members=members, **fields)


def pool_of(count: int, **fields: object) -> Pool:
    return Pool(plan_of(*map(member, range(count)), **fields), HTTP)


def first(pool: Pool, client: str = "10.9.0.1", now_s: float = 0.0, rng: Random | None = None) -> Candidate:
    return next(pool.choose(client, now_s, rng or Random(1)).candidates)


def test_round_robin_gives_everyone_the_same() -> None:
    pool = pool_of(5)
    assert set(Counter(first(pool) for _ in range(50)).values()) == {10}


def test_random_reaches_everyone() -> None:
    pool, rng = pool_of(5, balance=Balance.RANDOM), Random(7)
    counts = Counter(first(pool, rng=rng) for _ in range(5_000))
    assert len(counts) == 5 and min(counts.values()) > 850


def test_least_connections_takes_the_idlest() -> None:
    pool = pool_of(3, balance=Balance.LEAST_CONNECTIONS)
    for _ in range(6):
        pool.connected(first(pool), "c", 0.0)
    a = first(pool)
    pool.ended(a)
    assert first(pool) == a
    pool.connected(a, "c", 0.0)
    assert Counter(pool._active.values()) == {2: 3}


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=200))
def test_the_bucketed_load_agrees_with_a_plain_minimum(moves: list[tuple[int, bool]]) -> None:
    everyone = [Candidate(f"n{at}", "10.0.0.1", 80, FAR) for at in range(7)]
    load, counts = Load(everyone, {}), dict.fromkeys(everyone, 0)
    for at, up in moves:
        counts[everyone[at]] = max(0, counts[everyone[at]] + (1 if up else -1))
        load.move(everyone[at], counts[everyone[at]])
        least = load.least()
        assert least is not None and counts[least] == min(counts.values())
        assert [counts[each] for each in load.in_order()] == sorted(counts.values())


def test_hash_goes_by_the_address_alone_and_stays() -> None:
    pool = pool_of(10, balance=Balance.CLIENT_HASH)
    assert len({first(pool, "10.9.0.1", rng=Random(at)) for at in range(20)}) == 1
    assert first(pool, "10.9.0.1") == first(pool, "::ffff:10.9.0.1")
    assert len({first(pool, f"10.9.0.{at}") for at in range(200)}) == 10


def test_hash_moves_only_the_clients_of_a_member_that_leaves_or_comes() -> None:
    clients = [f"10.9.{at // 250}.{at % 250}" for at in range(1_000)]
    members = [member(at) for at in range(10)]
    pool = Pool(plan_of(*members, balance=Balance.CLIENT_HASH), HTTP)
    before = {client: first(pool, client) for client in clients}
    pool.update(plan_of(*members[:9], balance=Balance.CLIENT_HASH), HTTP)
    without = {client: first(pool, client) for client in clients}
    assert all(before[c] == without[c] for c in clients if before[c].address != members[9].address)
    pool.update(plan_of(*members, balance=Balance.CLIENT_HASH), HTTP)
    assert {client: first(pool, client) for client in clients} == before


@given(st.lists(st.sets(st.integers(0, 30)), min_size=1, max_size=6), st.binary(min_size=4, max_size=4))
def test_a_ring_changed_step_by_step_is_the_ring_made_at_once(steps: list[set[int]], key: bytes) -> None:
    grown = Ring()
    for step in steps:
        grown.update(Candidate(f"n{at}", "10.0.0.1", 80, FAR) for at in step)
    fresh = Ring()
    fresh.update(Candidate(f"n{at}", "10.0.0.1", 80, FAR) for at in steps[-1])
    assert list(grown.walk(key)) == list(fresh.walk(key))
    assert len(list(fresh.walk(key))) == len(steps[-1])


@pytest.mark.parametrize("balance", list(Balance))
def test_every_endpoint_is_offered_exactly_once(balance: Balance) -> None:
    pool = pool_of(20, balance=balance)
    pool.rest(first(pool), 10.0)
    order = list(pool.choose("10.9.0.1", 1.0, Random(1)).candidates)
    assert len(order) == len(set(order)) == 20


@pytest.mark.parametrize("balance", list(Balance))
def test_what_rests_comes_last_and_comes_back(balance: Balance) -> None:
    pool = pool_of(3, balance=balance)
    tired = first(pool, "10.9.0.1")
    pool.rest(tired, 10.0)
    for now_s in (1.0, 2.0, 3.0):
        assert list(pool.choose("10.9.0.1", now_s, Random(1)).candidates)[-1] == tired
    assert tired in {first(pool, f"10.9.0.{at}", 10.0, Random(at)) for at in range(60)}


def test_if_all_rest_they_are_tried_anyhow_the_soonest_awake_first() -> None:
    pool = pool_of(3)
    everyone = list(pool.choose("c", 0.0, Random(1)).candidates)
    for at, candidate in enumerate(everyone):
        pool.rest(candidate, 10.0 - at)
    choice = pool.choose("c", 1.0, Random(1))
    assert choice.rule == "all-resting"
    assert list(choice.candidates) == everyone[::-1]


def test_an_endpoint_put_to_rest_by_this_connection_does_not_come_again() -> None:
    pool = pool_of(3)
    tried = []
    for candidate in pool.choose("c", 0.0, Random(1)).candidates:
        tried.append(candidate)
        pool.rest(candidate, 10.0)
    assert len(tried) == len(set(tried)) == 3


def test_an_answer_ends_the_rest() -> None:
    pool = pool_of(1)
    only = first(pool)
    pool.rest(only, 10.0)
    pool.connected(only, "c", 1.0)
    assert pool.choose("c", 1.0, Random(1)).rule == "round-robin"


@pytest.mark.parametrize(
    ("prefer", "tiers"),
    [
        (NEAR, [[0], [1], [2]]),  # own node, then the site, then the rest
        (SITE, [[0, 1], [2]]),  # node and site are equal, then the rest
        (FAR, [[0, 1, 2]]),  # all equal
    ],
)
def test_tiers_follow_the_preference(prefer: Distance, tiers: list[list[int]]) -> None:
    members = (member(0, NEAR), member(1, SITE), member(2, FAR))
    pool = Pool(plan_of(*members, prefer=prefer), HTTP)
    for _ in range(6):
        order = [candidate.address for candidate in pool.choose("c", 0.0, Random(1)).candidates]
        for tier in tiers:
            assert {members[at].address for at in tier} == set(order[: len(tier)])
            del order[: len(tier)]


@pytest.mark.parametrize(
    ("each", "fields", "reason"),
    [
        (member(0, ready=False), {}, "not ready"),
        (member(0, FAR), {"local_only": True}, "on another node, and internalTrafficPolicy is Local"),
        (Member("n", "10.0.0.9", NEAR, {"other": 1}), {}, "has no port http"),
        (member(0, ready=False), {"publish_not_ready": True}, ""),
    ],
)
def test_who_is_passed_over_and_why(each: Member, fields: dict[str, object], reason: str) -> None:
    plan = plan_of(each, **fields)
    assert passed_over(plan, HTTP, each) == reason
    choice = Pool(plan, HTTP).choose("c", 0.0, Random(1))
    assert (choice.rule == "no-endpoint") is bool(reason)
    assert len(list(choice.candidates)) == (0 if reason else 1)


def test_affinity_holds_for_its_time_after_the_last_connection() -> None:
    pool = pool_of(4, affinity_s=100)
    mine = first(pool, "10.9.0.1", 0.0)
    pool.connected(mine, "10.9.0.1", 0.0)
    for now_s in (1.0, 99.0, 150.0, 249.0):
        choice = pool.choose("10.9.0.1", now_s, Random(1))
        assert (choice.rule, next(choice.candidates)) == ("affinity", mine)
    assert pool.choose("10.9.0.1", 350.0, Random(1)).rule == "round-robin"
    assert pool.choose("10.9.0.2", 1.0, Random(1)).rule == "round-robin"


def test_affinity_leaves_an_endpoint_that_rests_or_is_gone() -> None:
    pool = pool_of(2, affinity_s=100)
    mine = first(pool)
    pool.connected(mine, "10.9.0.1", 0.0)
    pool.rest(mine, 10.0)
    assert first(pool, "10.9.0.1", 1.0) != mine
    assert first(pool, "10.9.0.1", 11.0) == mine
    others = [each for each in map(member, range(2)) if each.address != mine.address]
    pool.update(plan_of(*others, affinity_s=100), HTTP)
    assert first(pool, "10.9.0.1", 12.0) != mine


def test_the_affinity_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.plan.balance.AFFINITY_ENTRIES", 10)
    pool = pool_of(3, affinity_s=100)
    for at in range(50):
        pool.connected(first(pool), f"10.9.0.{at}", 0.0)
    assert len(pool._affinity) == 10
    assert pool.choose("10.9.0.49", 1.0, Random(1)).rule == "affinity"


def test_a_change_of_members_keeps_load_and_rests_of_those_that_stay() -> None:
    pool = pool_of(3, balance=Balance.LEAST_CONNECTIONS)
    busy = first(pool)
    pool.connected(busy, "c", 0.0)
    tired = next(each for each in pool.choose("c", 0.0, Random(1)).candidates if each != busy)
    pool.rest(tired, 10.0)
    pool.update(plan_of(*map(member, range(4)), balance=Balance.LEAST_CONNECTIONS), HTTP)
    order = list(pool.choose("c", 1.0, Random(1)).candidates)
    assert order[2:] == [busy, tired] or order[-1] == tired
    assert order.index(busy) == 2


def test_a_dual_stack_pod_counts_once() -> None:
    four, six = Member("n", "10.0.0.1", NEAR, {"http": 1}), Member("n", "fd00::1", NEAR, {"http": 1})
    plan = plan_of(four, six)
    assert of_family(plan, "10.96.0.1").members == (four,)
    assert of_family(plan, "fd00:96::1").members == (six,)
    assert of_family(plan_of(four), "fd00:96::1").members == (four,)


@pytest.mark.parametrize("balance", list(Balance))
def test_a_choice_among_a_thousand_costs_microseconds(balance: Balance) -> None:
    pool, rng = pool_of(1_000, balance=balance), Random(1)
    first(pool)

    def once() -> float:
        start = time.perf_counter()
        for _ in range(1_000):
            chosen = first(pool, "10.9.0.1", rng=rng)
            pool.connected(chosen, "10.9.0.1", 0.0)
            pool.ended(chosen)
        return (time.perf_counter() - start) / 1_000

    assert min(once() for _ in range(3)) < 60e-6


def test_explain_names_rule_tiers_and_those_passed_over() -> None:
    plan = plan_of(member(0, NEAR), member(1, FAR), member(2, NEAR, ready=False), prefer=NEAR)
    verdict = explain(plan, HTTP, "10.9.0.1", {Candidate("n1", "10.0.0.2", 8080, FAR): 4.0})
    assert verdict.rule == "round-robin"
    assert [(each.node, each.tier, each.passed_over) for each in verdict.action] == [
        ("n0", 1, ""),
        ("n1", 2, "rests for 4.0 s after it refused or did not answer"),
        ("n2", 0, "not ready"),
    ]


def test_explain_puts_the_hashed_endpoint_first() -> None:
    plan = plan_of(*map(member, range(8)), balance=Balance.CLIENT_HASH)
    pool = Pool(plan, HTTP)
    for at in range(20):
        client = f"10.9.0.{at}"
        assert explain(plan, HTTP, client).action[0].address == first(pool, client).address


@pytest.mark.parametrize(
    ("plan", "resting", "rule"),
    [
        (plan_of(), {}, "no-endpoint"),
        (plan_of(member(0)), {Candidate("n0", "10.0.0.1", 8080, FAR): 1.0}, "all-resting"),
        (plan_of(member(0), affinity_s=9), {}, "affinity"),
    ],
)
def test_explain_names_the_special_cases(plan: ServicePlan, resting: dict[Candidate, float], rule: str) -> None:
    assert explain(plan, HTTP, "c", resting).rule == rule
    assert structs.asdict(explain(plan, HTTP, "c", resting))["because"].object == "shop/web"
