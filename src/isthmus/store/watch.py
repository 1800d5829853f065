"""Which files of a directory to look at again, as the kernel reports it; levels are compared too, every few seconds.

Not everything is reported: a link to a file outside of the directory, a directory that was replaced, a watch that
could not be made. So all is looked at when it is replaced, every ``RESCAN_S``, and every ``RETRY_S`` without a watch.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec
import watchfiles
from watchfiles.main import FileChange

from isthmus.model.findings import Code, Finding, Severity
from isthmus.store.files import is_manifest

DEBOUNCE_MS = 20
STEP_MS = 10
TICK_MS = 500
RESCAN_S = 5.0
RETRY_S = 0.25


class Scope(msgspec.Struct, frozen=True):
    """What to look at again: some files by relative path, or everything. Neither: just a tick of the clock."""

    names: frozenset[str] = frozenset()
    all: bool = False
    unwatched: Finding | None = None

    @property
    def tick(self) -> bool:
        return not (self.names or self.all)

    @staticmethod
    def everything(unwatched: Finding | None = None) -> "Scope":
        return Scope(all=True, unwatched=unwatched)


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
    """Watch until the directory is another one, or none."""
    base = root.resolve()
    identity = _identity(root)
    seen_all_s = 0.0  # once more as soon as the watch stands: something may have changed before
    async for batch in watchfiles.awatch(
        base,
        watch_filter=None,
        debounce=DEBOUNCE_MS,
        step=STEP_MS,
        rust_timeout=TICK_MS,
        yield_on_timeout=True,
        ignore_permission_denied=True,
        stop_event=stop,
    ):
        if _identity(root) != identity:
            return
        scope = scope_of(base, batch)
        if scope.all or time.monotonic() - seen_all_s > RESCAN_S:
            scope = Scope.everything()
            seen_all_s = time.monotonic()
        yield scope


def scope_of(base: Path, batch: Iterable[FileChange]) -> Scope:
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


def _identity(root: Path) -> tuple[int, int]:
    """Raises FileNotFoundError, or another OSError."""
    found = root.stat()
    return found.st_dev, found.st_ino


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        pass
