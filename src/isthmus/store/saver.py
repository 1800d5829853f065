"""Saving the offline copy beside everything else: in a thread, a while after a change, failures counted."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import structlog

from isthmus.model.findings import Code, Finding, Severity
from isthmus.store.filestate import FileState
from isthmus.store.offline import OfflineError, load, save

log = structlog.get_logger(__name__)

QUIET_S = 1.0
"""Save once nothing has changed for this long ..."""
PATIENCE_S = 10.0
"""... or once something has been unsaved for this long. A failure is tried again after the same time."""


class Saver:
    """Keeps the offline copy at ``path``; with None it does nothing. Never raises for a disk that is full or gone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._since_s: float | None = None
        self._due_s = 0.0
        self._running: asyncio.Future[None] | None = None
        self.finding: Finding | None = None
        self.saves = 0
        self.failures = 0

    def load(self) -> tuple[list[FileState], Finding | None]:
        """The copy, empty if there is none; a finding if it is there but of no use."""
        if self._path is None:
            return [], None
        try:
            return load(self._path) or [], None
        except OfflineError as error:
            text = f"{error.message}; it is not used"
            return [], Finding(Severity.WARNING, Code.OFFLINE_UNREADABLE, text, str(self._path))

    def changed(self, now_s: float) -> None:
        """Something differs from the copy now."""
        if self._since_s is None:
            self._since_s = now_s
        self._due_s = min(now_s + QUIET_S, self._since_s + PATIENCE_S)

    def tick(self, files: Mapping[str, FileState], now_s: float) -> None:
        """Start saving if it is time, and take note of a save that has ended."""
        if self._running and self._running.done():
            self._ended(self._running, now_s)
            self._running = None
        if self._path and self._since_s is not None and not self._running and now_s >= self._due_s:
            self._since_s = None
            loop = asyncio.get_running_loop()
            self._running = loop.run_in_executor(None, save, self._path, list(files.values()))

    async def close(self, files: Mapping[str, FileState]) -> None:
        """Finish the running save, and save what is not saved."""
        if self._running:
            await asyncio.wait([self._running])
        self._due_s = 0.0
        self.tick(files, 0.0)
        if self._running:
            await asyncio.wait([self._running])
            self._ended(self._running, 0.0)
            self._running = None

    def _ended(self, save_: "asyncio.Future[None]", now_s: float) -> None:
        error = save_.exception()
        if error is None:
            self.saves += 1
            self.finding = None
            return
        if not isinstance(error, OfflineError):
            raise error
        self.failures += 1
        log.warning("offline copy not saved", error=error.message)
        text = f"{error.message}; a start without the store would not know the latest state"
        self.finding = Finding(Severity.WARNING, Code.OFFLINE_UNSAVED, text, str(self._path))
        self._since_s = now_s
        self._due_s = now_s + PATIENCE_S
