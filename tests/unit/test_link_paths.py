"""Which paths are tried and when: rank, head start, rest after failure, return to a better path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.link.limits import LinkLimits
from isthmus.link.paths import PathBook
from isthmus.wire.worker import PathSpec

LIMITS = LinkLimits(head_start_s=0.15, stagger_s=0.25, retry_first_s=1.0, retry_most_s=60.0)
D1 = PathSpec("direct", "192.0.2.1:20006")
D2 = PathSpec("direct", "192.0.2.2:20006")
REVERSE = PathSpec("reverse", "", "r")
RELAYED = PathSpec("relayed", "198.51.100.1:20004", "r")


def book(*paths: PathSpec) -> PathBook:
    made = PathBook(LIMITS)
    made.put(paths)
    return made


def tries(made: PathBook, now_s: float = 0.0) -> list[tuple[float, PathSpec]]:
    return [(item.delay_s, item.spec) for item in made.tries(now_s)]


def test_without_experience_all_are_tried_and_direct_ones_have_a_head_start() -> None:
    assert tries(book(D1, D2, RELAYED)) == [(0.0, D1), (0.15, RELAYED), (0.25, D2)]


def test_without_direct_paths_nothing_is_waited_for() -> None:
    assert tries(book(RELAYED)) == [(0.0, RELAYED)]


def test_a_path_that_worked_is_used_alone() -> None:
    made = book(D1, RELAYED)
    made.succeeded(RELAYED, 3.0)
    assert tries(made) == [(0.0, RELAYED)]


def test_the_better_path_takes_over_as_soon_as_it_works() -> None:
    made = book(D1, RELAYED)
    made.succeeded(RELAYED, 3.0)
    assert not made.outranked("relayed")
    assert made.succeeded(D1, 1.0)
    assert made.working() == D1
    assert made.outranked("relayed") and not made.outranked("direct")


def test_a_path_that_failed_a_moment_ago_is_passed_over_while_others_rest_not() -> None:
    made = book(D1, RELAYED)
    made.failed(D1, "refused", 0.0)
    assert tries(made, 0.5) == [(0.0, RELAYED)]
    assert tries(made, 1.5) == [(0.0, D1), (0.15, RELAYED)]


def test_when_all_rest_all_are_tried_all_the_same() -> None:
    made = book(D1)
    made.failed(D1, "refused", 0.0)
    assert tries(made, 0.1) == [(0.0, D1)]


def test_better_paths_are_retried_with_growing_rests() -> None:
    made = book(D1, RELAYED)
    made.succeeded(RELAYED, 3.0)
    made.failed(D1, "no answer", 0.0)
    assert made.better_to_retry(0.9) == []
    assert made.better_to_retry(1.0) == [D1]
    made.failed(D1, "no answer", 1.0)
    assert made.better_to_retry(2.9) == []
    assert made.better_to_retry(3.0) == [D1]


def test_nothing_is_retried_for_a_peer_that_nobody_reaches() -> None:
    made = book(D1, RELAYED)
    made.failed(D1, "no answer", 0.0)
    assert made.better_to_retry(100.0) == []


def test_a_new_ranking_keeps_what_is_known_of_paths_that_stay() -> None:
    made = book(D1, RELAYED)
    made.succeeded(RELAYED, 3.0)
    made.put((RELAYED, D2))
    assert made.working() == RELAYED
    made.put((D2,))
    assert made.working() is None


def test_a_connection_of_a_kind_that_is_not_ranked_any_more_gives_way() -> None:
    made = book(D1)
    assert not made.outranked("relayed")
    made.succeeded(D1, 1.0)
    assert made.outranked("relayed")


@given(
    st.lists(st.tuples(st.sampled_from([D1, D2, REVERSE, RELAYED]), st.booleans(), st.floats(0, 100)), max_size=30),
    st.floats(0, 200),
)
def test_there_is_always_something_to_try_and_rests_are_bounded(
    outcomes: list[tuple[PathSpec, bool, float]], now_s: float
) -> None:
    made = book(D1, D2, REVERSE, RELAYED)
    for spec, worked, when_s in outcomes:
        if worked:
            made.succeeded(spec, 1.0)
        else:
            made.failed(spec, "x", when_s)
            record = made.record(spec)
            assert record is not None and record.rest_until_s - when_s <= 60.0 + 1e-6
    found = made.tries(now_s)
    assert found and found[0].delay_s == pytest.approx(0.0, abs=LIMITS.head_start_s)
    delays = [item.delay_s for item in found]
    assert delays == sorted(delays)
