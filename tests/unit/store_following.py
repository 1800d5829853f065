"""Following a store in tests, as the agent does."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from isthmus.model.cluster import Key, Object, Service
from isthmus.model.findings import Code, Finding
from isthmus.store.change import Change
from isthmus.store.directory import DirectoryStore

DEADLINE_S = 20.0


def service(name: str, address: str = "10.96.0.1", extra: str = "") -> str:
    return f"""apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: shop
spec:
  clusterIP: {address}
  ports:
  - port: 80
{extra}"""


def key(name: str) -> Key:
    return Key("Service", "shop", name)


class Follower:
    """What the agent would know, kept from changes alone."""

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {}
        self.changes: list[Change] = []
        self.seen = asyncio.Event()

    def take(self, change: Change) -> None:
        for obj in (*change.put, *change.moved):
            self.objects[obj.key] = obj
        for dropped in change.dropped:
            del self.objects[dropped]
        self.changes.append(change)
        self.seen.set()

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.changes[-1].findings

    @property
    def codes(self) -> set[Code]:
        return {finding.code for finding in self.findings}

    def address(self, name: str) -> str:
        found = self.objects[key(name)]
        assert isinstance(found, Service)
        return found.cluster_ips[0]

    async def until(self, holds: Callable[[], bool]) -> float:
        """Wait for a change after which ``holds``; how long it took."""
        start_s = time.monotonic()
        async with asyncio.timeout(DEADLINE_S):
            while not (self.changes and holds()):
                self.seen.clear()
                await self.seen.wait()
        return time.monotonic() - start_s


@asynccontextmanager
async def following(store: DirectoryStore) -> AsyncIterator[Follower]:
    follower, stop = Follower(), asyncio.Event()

    async def follow() -> None:
        async for change in store.changes(stop):
            follower.take(change)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(follow(), name="follow")
        await follower.until(lambda: True)
        yield follower
        stop.set()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]
