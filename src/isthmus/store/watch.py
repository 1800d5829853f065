"""Which files of a directory to look at again, as the kernel reports it; levels are compared too, every few seconds.

Not everything is reported: a link to a file outside of the directory, a directory that was replaced, a watch that
could not be made. So all is looked at when it is replaced, every ``RESCAN_S``, and every ``RETRY_S`` without a watch.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from watchfiles._rust_notify import RustNotify

from isthmus.model.findings import Code, Finding, Severity
from isthmus.store.files import is_manifest

Reported = set[tuple[int, str]]

DEBOUNCE_MS = 20
STEP_MS = 10
TICK_MS = 500
RESCAN_S = 10.0
RETRY_S = 0.25


class Scope(msgspec.Struct, frozen=True):
    """What to look at again: some files by relative path, or everything. Neither: just a tick of the clock."""

    names: frozenset[str] = frozenset()
    all: bool = False
    unwatched: Finding | None = None

    @property
    def tick(self) -> bool:
        return not (self.names or self.all)

    def joined(self, earlier: "Scope | None") -> "Scope":
        """Both, with this one's finding."""
        if earlier is None or earlier.tick:
            return self
        return Scope(self.names | earlier.names, self.all or earlier.all, self.unwatched)

    @staticmethod
    def everything(unwatched: Finding | None = None) -> "Scope":
        return Scope(all=True, unwatched=unwatched)


class Pending:
    """What the watch reported and nobody has looked at yet: kept together, however long reading takes meanwhile."""

    def __init__(self) -> None:
        self._scope: Scope | None = None
        self._came = asyncio.Event()

    async def collect(self, root: Path, stop: asyncio.Event) -> None:
        """Watch until ``stop``."""
        try:
            async for scope in watch(root, stop):
                self._scope = scope.joined(self._scope)
                self._came.set()
        finally:
            self._scope = self._scope or Scope()
            self._came.set()

    async def standing(self) -> None:
        """Return once the watch stands, or cannot stand: what is read from now on is not missed when it changes."""
        await self._came.wait()

    async def take(self) -> Scope:
        """Wait for a scope, and take it."""
        await self._came.wait()
        self._came.clear()
        scope, self._scope = self._scope or Scope(), None
        return scope


async def watch(root: Path, stop: asyncio.Event) -> AsyncIterator[Scope]:
    """Yield scopes until ``stop``, at least one every half second. Never ends because of the directory's state."""
    while not stop.is_set():
        unwatched = None
        try:
            async for scope in _watch_once(root, stop):
                yield scope
        except FileNotFoundError:
            pass
        except (OSError, RuntimeError) as error:
            text = f"changes are not reported by the kernel ({error}), so they are looked for every {RETRY_S} s"
            unwatched = Finding(
                Severity.WARNING, Code.STORE_UNWATCHED, text, str(root), expected="a higher inotify limit"
            )
        if not stop.is_set():
            yield Scope.everything(unwatched)
            await _pause(stop, RETRY_S)


async def _watch_once(root: Path, stop: asyncio.Event) -> AsyncIterator[Scope]:
    """Watch until the directory is another one, or none. The first scope says that the watch stands.

    The directory is held open, for its number would be given to the next one as soon as it is gone.
    """
    held = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        async for scope in _scopes(root, os.fstat(held), stop):
            yield scope
    finally:
        os.close(held)


async def _scopes(root: Path, watched: os.stat_result, stop: asyncio.Event) -> AsyncIterator[Scope]:
    base = root.resolve()
    with RustNotify([str(base)], False, False, 0, True, True) as notify:
        yield Scope.everything()
        seen_all_s = time.monotonic()
        while not stop.is_set():
            batch = await _next_batch(notify, stop)
            if not os.path.samestat(root.stat(), watched):
                return
            scope = scope_of(base, batch)
            if scope.all or time.monotonic() - seen_all_s > RESCAN_S:
                scope = Scope.everything()
                seen_all_s = time.monotonic()
            yield scope


class _Halt:
    """What the waiting thread asks every ``STEP_MS``: whether to come back."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self.halted = False

    def is_set(self) -> bool:
        return self.halted or self._stop.is_set()


async def _next_batch(notify: RustNotify, stop: asyncio.Event) -> Reported:
    """Wait, in a thread, for what changed; empty after ``TICK_MS`` and at ``stop``. The thread ends with this call."""
    halt = _Halt(stop)
    loop = asyncio.get_running_loop()
    waiting = loop.run_in_executor(None, notify.watch, DEBOUNCE_MS, STEP_MS, TICK_MS, halt)
    try:
        batch = await asyncio.shield(waiting)
    except asyncio.CancelledError:
        halt.halted = True
        await asyncio.wait([waiting])
        raise
    return batch if isinstance(batch, set) else set()


def scope_of(base: Path, batch: Reported) -> Scope:
    """What a batch of reported changes makes worth looking at."""
    names = set()
    for _, text in batch:
        path = Path(text)
        try:
            name = path.relative_to(base).as_posix()
        except ValueError:
            return Scope.everything()
        if is_manifest(name) and not path.is_dir():
            names.add(name)
        elif _may_hold_files(path, name):
            return Scope.everything()
    return Scope(frozenset(names))


def _may_hold_files(path: Path, name: str) -> bool:
    """Directories, things that are gone and may have been one, and what a mounted ConfigMap swaps (``..data``)."""
    parts = name.split("/")
    if any(part.startswith("..") for part in parts):
        return True
    if any(part.startswith(".") for part in parts):
        return False
    return path.is_dir() or not (path.exists() or "." in parts[-1] or parts[-1].endswith("~"))


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        pass
