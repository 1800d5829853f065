"""The readiness loop: one bad handler stops nobody, discarded descriptors are closed late, timers keep their order."""

import os
import socket
import threading
import time

from isthmus.loop.loop import READ, Loop


def run(loop: Loop, until_s: float = 6.0) -> None:
    loop.call_later(until_s, loop.stop)
    loop.run()


def test_timers_fire_in_order_and_a_cancelled_one_does_not() -> None:
    loop, seen = Loop(), []
    loop.call_later(0.02, lambda: (seen.append("b"), loop.stop()))
    loop.call_later(0.01, lambda: seen.append("a"))
    loop.call_later(0.005, lambda: seen.append("never")).cancel()
    run(loop)
    assert seen == ["a", "b"]
    loop.close()


def test_a_call_from_another_thread_wakes_the_loop() -> None:
    loop = Loop()
    threading.Timer(0.02, lambda: loop.call_threadsafe(loop.stop)).start()
    start = time.monotonic()
    run(loop)
    assert time.monotonic() - start < 2
    loop.close()


def test_a_handler_that_raises_is_removed_and_the_others_go_on() -> None:
    loop, seen = Loop(), []
    (bad, bad_far), (good, good_far) = socket.socketpair(), socket.socketpair()

    def fail(_events: int) -> None:
        seen.append("bad")
        raise RuntimeError("as a bug would")

    def read(_events: int) -> None:
        seen.append("good")
        good.recv(10)
        loop.call_later(0.02, loop.stop)

    loop.add(bad.fileno(), READ, fail)
    loop.add(good.fileno(), READ, read)
    bad_far.send(b"x")
    good_far.send(b"x")
    run(loop)
    assert sorted(seen) == ["bad", "good"]
    loop.close()
    for sock in (bad, bad_far, good, good_far):
        sock.close()


def test_a_discarded_descriptor_is_not_reused_within_the_round() -> None:
    """Else events of the old connection, still waiting in this round, would reach a new one with the same number."""
    loop, fresh = Loop(), []
    near, far = socket.socketpair()
    number = near.fileno()

    def drop(_events: int) -> None:
        loop.discard(near)
        other = os.open(os.devnull, os.O_RDONLY)
        fresh.append(other)
        assert near.fileno() == number
        loop.call_soon(loop.stop)

    loop.add(number, READ, drop)
    far.send(b"x")
    run(loop)
    assert near.fileno() == -1
    assert fresh[0] != number
    os.close(fresh[0])
    far.close()
    loop.close()


def test_discarding_outside_of_a_round_closes_at_its_end() -> None:
    loop = Loop()
    near, far = socket.socketpair()
    loop.add(near.fileno(), READ, lambda _events: None)
    loop.discard(near)
    loop.close()
    assert near.fileno() == -1
    far.close()


def test_a_turn_that_moves_much_comes_behind_everything_that_is_ready() -> None:
    loop = Loop()
    order: list[str] = []
    ends = [socket.socketpair() for _ in range(3)]

    def bulk() -> None:
        order.append("bulk")
        if order.count("bulk") < 4:
            loop.call_behind(bulk)
            ends[order.count("bulk") - 1][1].send(b"x")
        else:
            loop.stop()

    for number, (mine, _) in enumerate(ends):
        loop.add(mine.fileno(), READ, lambda _events, n=number: (ends[n][0].recv(1), order.append(f"light {n}")))  # type: ignore[misc]
    loop.call_behind(bulk)
    loop.call_behind(lambda: order.append("other bulk"))
    loop.run()
    assert order == ["bulk", "light 0", "other bulk", "bulk", "light 1", "bulk", "light 2", "bulk"]
    for pair in ends:
        for end in pair:
            end.close()
    loop.close()
