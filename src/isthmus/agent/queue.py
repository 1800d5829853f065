"""The work queue: keys that are dirty, each worked on by one worker at a time.

Semantics of Kubernetes' rate-limited queue (client-go util/workqueue): a key that is added while it waits is there
once; one that is added while it is worked on is worked on again afterwards; failures of a key delay it exponentially,
and only success or giving up forgets them.
"""

import asyncio
import heapq
from collections.abc import Callable, Hashable
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

BASE_DELAY_S = 0.05
MAX_DELAY_S = 30.0


class WorkQueue(Generic[Item]):
    """Dirty keys with per-key back-off. One event loop; ``now_s`` is the loop's clock, injected for tests."""

    def __init__(
        self, now_s: Callable[[], float], base_delay_s: float = BASE_DELAY_S, max_delay_s: float = MAX_DELAY_S
    ) -> None:
        self._now_s = now_s
        self._base_delay_s = base_delay_s
        self._max_delay_s = max_delay_s
        self._ready: dict[Item, None] = {}  # ordered, without duplicates
        self._working: set[Item] = set()
        self._again: set[Item] = set()
        self._failures: dict[Item, int] = {}
        self._delayed: list[tuple[float, int, Item]] = []
        self._due: dict[Item, float] = {}
        self._order = count()
        self._wake = asyncio.Event()
        self._closed = False

    def add(self, item: Item) -> None:
        """Mark ``item`` as dirty."""
        if self._closed:
            return
        if item in self._working:
            self._again.add(item)
        else:
            self._ready.setdefault(item)
            self._wake.set()

    def add_after(self, item: Item, delay_s: float) -> None:
        """Mark ``item`` as dirty after ``delay_s``; an earlier wish of the same key stands."""
        when_s = self._now_s() + delay_s
        if self._closed or self._due.get(item, when_s + 1) <= when_s:
            return
        self._due[item] = when_s
        heapq.heappush(self._delayed, (when_s, next(self._order), item))
        self._wake.set()

    def retry(self, item: Item) -> float:
        """Count a failure of ``item`` and add it again after its back-off; return the delay in seconds."""
        failures = self._failures.get(item, 0)
        self._failures[item] = failures + 1
        delay_s = min(self._base_delay_s * 2.0 ** min(failures, 40), self._max_delay_s)
        self.add_after(item, delay_s)
        return delay_s

    def forget(self, item: Item) -> None:
        """Clear the failures of ``item``: after success, or on giving up."""
        self._failures.pop(item, None)

    def failures(self, item: Item) -> int:
        """How often ``item`` failed since it was last forgotten."""
        return self._failures.get(item, 0)

    def __len__(self) -> int:
        return len(self._ready)

    async def get(self) -> Item | None:
        """Return the next dirty key, to be handed back with ``done``; None after ``close``."""
        while True:
            self._promote()
            if self._closed:
                return None
            if self._ready:
                item = next(iter(self._ready))
                del self._ready[item]
                self._working.add(item)
                return item
            self._wake.clear()
            timeout_s = max(0.0, self._delayed[0][0] - self._now_s()) if self._delayed else None
            try:
                await asyncio.wait_for(self._wake.wait(), timeout_s)
            except TimeoutError:
                pass

    def done(self, item: Item) -> None:
        """Hand a key back; if it became dirty meanwhile it is ready again."""
        self._working.discard(item)
        if item in self._again:
            self._again.discard(item)
            self.add(item)

    def close(self) -> None:
        """End every ``get``; later additions are ignored."""
        self._closed = True
        self._wake.set()

    def _promote(self) -> None:
        now_s = self._now_s()
        while self._delayed and self._delayed[0][0] <= now_s:
            when_s, _, item = heapq.heappop(self._delayed)
            if self._due.get(item) == when_s:
                del self._due[item]
                self.add(item)
