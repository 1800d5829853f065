"""The work queue keeps the promises of Kubernetes' rate-limited queue."""

import asyncio
from collections.abc import Awaitable, Callable

from isthmus.agent.queue import WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def run(test: Callable[[WorkQueue[str], Clock], Awaitable[None]]) -> None:
    async def main() -> None:
        clock = Clock()
        await asyncio.wait_for(test(WorkQueue(clock, base_delay_s=1.0, max_delay_s=8.0), clock), 5)

    asyncio.run(main())


def test_a_key_that_waits_is_there_once() -> None:
    async def case(queue: WorkQueue[str], _: Clock) -> None:
        for key in ("a", "b", "a"):
            queue.add(key)
        assert [await queue.get(), await queue.get()] == ["a", "b"]
        assert len(queue) == 0

    run(case)


def test_a_key_that_becomes_dirty_while_it_is_worked_on_comes_again_afterwards() -> None:
    async def case(queue: WorkQueue[str], _: Clock) -> None:
        queue.add("a")
        await queue.get()
        queue.add("a")
        queue.add("a")
        assert len(queue) == 0, "two workers would hold one key"
        queue.done("a")
        assert await queue.get() == "a"
        queue.done("a")
        assert len(queue) == 0

    run(case)


def test_failures_double_the_delay_up_to_the_limit_and_success_forgets_them() -> None:
    async def case(queue: WorkQueue[str], clock: Clock) -> None:
        delays = []
        for _ in range(6):
            delays.append(queue.retry("a"))
            clock.now_s += delays[-1]
            assert await queue.get() == "a"
            queue.done("a")
        assert delays == [1, 2, 4, 8, 8, 8]
        assert queue.failures("a") == 6
        queue.forget("a")
        assert queue.retry("a") == 1

    run(case)


def test_a_retry_counts_although_done_is_called_each_time() -> None:
    """The document's bug: forgetting on every pass made the retry limit unreachable."""

    async def case(queue: WorkQueue[str], clock: Clock) -> None:
        queue.add("a")
        for expected in range(1, 4):
            await queue.get()
            queue.retry("a")
            queue.done("a")
            assert queue.failures("a") == expected
            clock.now_s += 100

    run(case)


def test_one_key_failing_does_not_delay_another() -> None:
    async def case(queue: WorkQueue[str], _: Clock) -> None:
        queue.retry("bad")
        queue.add("good")
        assert await queue.get() == "good"

    run(case)


def test_closing_ends_a_waiting_worker() -> None:
    async def case(queue: WorkQueue[str], _: Clock) -> None:
        waiting = asyncio.ensure_future(queue.get())
        await asyncio.sleep(0)
        queue.close()
        assert await waiting is None

    run(case)
