"""The ranking of paths: the table says what comes first and why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.plan.paths import PathId, PathKind, Peer, Rank, Relay, Seen, Self, is_private, rank

NOW_S = 10_000.0
PUBLIC, PRIVATE, V6 = "198.51.100.7:20006", "10.0.0.7:20006", "[2001:db8::7]:20006"
HERE = Self("a", "home", ("192.168.1.2:20006",))
OPEN = Self("a", "cloud", ("203.0.113.9:20006",))
R1 = Relay("r1", "203.0.113.1:20004", "cloud", connected=True, holds_peer=True, rtt_ms=20.0)
R2 = Relay("r2", "203.0.113.2:20004", "home", connected=True, holds_peer=True, rtt_ms=5.0)


def direct(address: str) -> PathId:
    return PathId(PathKind.DIRECT, address)


WORKED = Seen(worked_s=NOW_S - 5, rtt_ms=3.0)
FAILED = Seen(failed_s=NOW_S - 5, error="timed out")


@pytest.mark.parametrize(
    ("own", "peer", "relays", "seen", "order"),
    [
        # nothing was tried: a public address before a private one of another site, relays last
        (HERE, Peer("b", "x", (PRIVATE, PUBLIC)), (R1,), {}, ["direct-public", "direct-private", "relayed"]),
        # in the same site a private address is as good as any
        (HERE, Peer("b", "home", (PRIVATE,)), (), {}, ["direct-same-site"]),
        # two nodes without a site are not in the same one
        (Self("a"), Peer("b", "", (PRIVATE,)), (), {}, ["direct-private"]),
        # what answered comes before what might
        (HERE, Peer("b", "x", (PUBLIC, PRIVATE)), (), {direct(PRIVATE): WORKED}, ["direct-works", "direct-public"]),
        # what failed is still tried, after everything else of its kind
        (
            HERE,
            Peer("b", "x", (PUBLIC, PRIVATE)),
            (R1,),
            {direct(PUBLIC): FAILED},
            ["direct-private", "direct-failed", "relayed"],
        ),
        # a failure is forgotten after an hour
        (HERE, Peer("b", "x", (PUBLIC,)), (), {direct(PUBLIC): Seen(failed_s=NOW_S - 4_000)}, ["direct-public"]),
        # a success is forgotten as well
        (HERE, Peer("b", "x", (PUBLIC,)), (), {direct(PUBLIC): Seen(worked_s=NOW_S - 4_000)}, ["direct-public"]),
        # a public node asks the peer behind a NAT to dial, rather than use the relay
        (OPEN, Peer("b", "x", ()), (R1,), {}, ["reverse", "relayed"]),
        # a node that was dialled lately can be dialled, whatever its address looks like
        (Self("a", "home", HERE.addresses, reached=True), Peer("b", "x", ()), (R1,), {}, ["reverse", "relayed"]),
        # behind a NAT nobody can dial us
        (HERE, Peer("b", "x", ()), (R1,), {}, ["relayed"]),
        # a relay that the peer is not connected to is no way
        (HERE, Peer("b", "x", ()), (Relay("r", "h:1", connected=True),), {}, []),
        # our own address announced by somebody else (overlapping private ranges) leads to ourselves
        (HERE, Peer("b", "x", HERE.addresses), (R1,), {}, ["relayed"]),
    ],
)
def test_the_order_and_its_reasons(
    own: Self, peer: Peer, relays: tuple[Relay, ...], seen: dict[PathId, Seen], order: list[str]
) -> None:
    ranking = rank(own, peer, relays, seen, now_s=NOW_S)
    assert [way.verdict.rule for way in ranking.ways] == order
    assert all(way.verdict.because.text for way in ranking.ways)


def test_the_nearest_relay_comes_first_and_an_unmeasured_one_last() -> None:
    fresh = Relay("r3", "203.0.113.3:20004", "home", connected=True, holds_peer=True)
    ways = rank(HERE, Peer("b"), (fresh, R1, R2), {}, now_s=NOW_S).ways
    assert [way.path.relay for way in ways] == ["r2", "r1", "r3"]


def test_a_way_in_use_keeps_its_place_until_another_is_clearly_better() -> None:
    def order(r1_ms: float, previous: tuple[PathId, ...]) -> list[str]:
        relays = (Relay("r1", "h:1", "", True, True, r1_ms), Relay("r2", "h:2", "", True, True, 10.0))
        return [way.path.relay for way in rank(HERE, Peer("b"), relays, {}, previous=previous, now_s=NOW_S).ways]

    in_use = (PathId(PathKind.RELAYED, "h:2", "r2"), PathId(PathKind.RELAYED, "h:1", "r1"))
    assert order(9.0, ()) == ["r1", "r2"]
    assert order(9.0, in_use) == ["r2", "r1"]  # a tenth better
    assert order(7.9, in_use) == ["r1", "r2"]  # a fifth better, and two milliseconds
    assert order(0.0, in_use) == ["r2", "r1"]  # not measured


def test_what_is_out_of_the_question_says_why() -> None:
    ranking = rank(HERE, Peer("b", "x", HERE.addresses), (Relay("r1", "h:1"),), {}, now_s=NOW_S)
    assert [verdict.rule for verdict in ranking.excluded] == [
        "direct-own-address",
        "reverse-no-relay",
        "relayed-relay-away",
    ]


@pytest.mark.parametrize(
    ("address", "private"),
    [(PUBLIC, False), (V6, False), (PRIVATE, True), ("[fd00::1]:1", True), ("100.64.0.1:1", True), ("name:1", True)],
)
def test_private_means_that_every_site_may_use_it(address: str, private: bool) -> None:
    assert is_private(address) is private


addresses = st.sampled_from([PUBLIC, PRIVATE, V6, "192.168.1.2:20006", "172.17.0.1:1", "nonsense"])
times = st.floats(0, NOW_S)
seens = st.builds(Seen, worked_s=times, failed_s=times, rtt_ms=st.floats(0, 500))
relay_lists = st.lists(
    st.builds(
        Relay,
        name=st.sampled_from(["r1", "r2", "r3"]),
        address=st.just("h:1"),
        connected=st.booleans(),
        holds_peer=st.booleans(),
        rtt_ms=st.floats(0, 500),
    ),
    max_size=3,
    unique_by=lambda relay: relay.name,
)


@given(
    st.lists(addresses, max_size=12, unique=True),
    relay_lists,
    st.dictionaries(addresses.map(direct), seens),
)
def test_the_order_is_by_rank_and_asking_again_changes_nothing(
    peer_addresses: list[str], relays: list[Relay], seen: dict[PathId, Seen]
) -> None:
    peer = Peer("b", "x", tuple(peer_addresses))
    first = rank(HERE, peer, relays, seen, now_s=NOW_S)
    ranks = [way.rank for way in first.ways]
    assert ranks == sorted(ranks)
    assert len({way.path for way in first.ways}) == len(first.ways)
    previous = [way.path for way in first.ways]
    again = rank(HERE, peer, relays, seen, previous=previous, now_s=NOW_S)
    assert [way.path for way in again.ways] == previous
    assert all(way.rank is not Rank.RELAYED or way.path.relay for way in first.ways)
