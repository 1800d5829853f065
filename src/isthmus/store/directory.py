"""The store as the agent uses it: a watched directory of manifests.

``changes`` yields the state first, then each difference, within tens of milliseconds. While it reads much it gives way
to the event loop every few milliseconds. Nothing that stands in the directory, or that happens to it, ends it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path

from isthmus.model.findings import Code, Finding, Severity, count
from isthmus.model.manifests import Parsed, parse_document
from isthmus.store.catalog import Catalog
from isthmus.store.change import Change, Counters, Origin
from isthmus.store.cutting import Cut, cut
from isthmus.store.files import (
    DirectoryGone,
    Signature,
    Unreadable,
    list_files,
    printable,
    read_text,
    signature,
)
from isthmus.store.filestate import Before, Document, FileState, document_of, evaluate, unreadable
from isthmus.store.saver import Saver
from isthmus.store.watch import Pending, Scope

SLICE_S = 0.005
"""How long reading may hold the event loop at a time."""
SETTLE_S = 0.02
"""A file written less than this ago may still be being written."""
SETTLE_LIMIT_S = 1.0
HOLD_S = 0.03
VANISH_S = 2.0
"""Files that went this shortly before the directory went are taken to have gone with it: they are not dropped."""
LARGE_BYTES = 256 * 1024


class DirectoryStore:
    """A directory of manifests. ``offline`` is the file of the offline copy, None for none."""

    def __init__(self, path: Path | str, offline: Path | None = None) -> None:
        self._root = Path(path)
        self._saver = Saver(offline)
        self._catalog = Catalog()
        self._signatures: dict[str, Signature | None] = {}
        self._large: dict[str, Cut] = {}
        self._recently_removed: dict[str, tuple[float, FileState]] = {}
        self._offline: dict[str, FileState] = {}
        self._own_findings: dict[Code, Finding] = {}
        self._told: tuple[Finding, ...] = ()
        self._origin = Origin.NOTHING
        self._read_total = 0
        self._reused_total = 0
        self._given_way_s = 0.0

    async def changes(self, stop: asyncio.Event) -> AsyncIterator[Change]:
        """Yield the state, then every change until ``stop``; then save what is not saved."""
        self._load_offline()
        pending = Pending()
        watcher = asyncio.create_task(pending.collect(self._root, stop), name="store-watch")
        try:
            await pending.standing()
            await self._refresh(Scope.everything())
            yield self._change()
            while not stop.is_set():
                scope = await pending.take()
                if watcher.done() and not stop.is_set():
                    watcher.result()  # raises what ended it: a store that is not watched must not look like one that is
                if not scope.tick:
                    await self._refresh(scope)
                if not scope.tick or self._saver.finding != self._own_findings.get(Code.OFFLINE_UNSAVED):
                    told = self._told
                    change = self._change()
                    if change.put or change.dropped or change.moved:
                        self._saver.changed(time.monotonic())
                        yield change
                    elif change.findings != told:
                        yield change
                self._saver.tick(self._catalog.files, time.monotonic())
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])
            await self._saver.close(self._catalog.files)

    def _load_offline(self) -> None:
        states, finding = self._saver.load()
        self._offline = {state.file: state for state in states}
        self._say(Code.OFFLINE_UNREADABLE, finding)

    # From a scope to files

    async def _refresh(self, scope: Scope) -> None:
        self._say(Code.STORE_UNWATCHED, scope.unwatched)
        try:
            if scope.all:
                await self._read_all()
            else:
                await self._read_names(scope.names)
        except DirectoryGone as error:
            self._gone(error)

    async def _read_all(self) -> None:
        listing = await asyncio.to_thread(list_files, self._root)
        for code in (Code.STORE_MISSING, Code.STORE_OFFLINE):
            self._say(code, None)
        if self._origin is not Origin.DIRECTORY:
            self._saver.changed(time.monotonic())
        self._origin = Origin.DIRECTORY
        closed = tuple(name for name in listing if name.endswith("/"))
        gone = [name for name in self._catalog.files if name not in listing and not name.startswith(closed)]
        gone = await self._hold(gone)
        for name, found in sorted(listing.items()):
            if found is None or self._signatures.get(name) != found:
                await self._read(name)
        for name in gone:
            self._remove(name)
        self._offline = {}

    async def _hold(self, gone: Sequence[str]) -> list[str]:
        """Those of ``gone`` that are still gone a moment later: editors rename a file away, then write the new one.

        Raises DirectoryGone if the directory itself has gone.
        """
        if not gone:
            return []
        await asyncio.sleep(HOLD_S)
        if not self._root.is_dir():
            raise DirectoryGone(f"the store {self._root} is gone")
        return [name for name in gone if not self._exists(name)]

    async def _read_names(self, names: Collection[str]) -> None:
        await self._hold([name for name in names if name in self._catalog.files and not self._exists(name)])
        for name in sorted(names):
            await self._read(name)
        if not self._root.is_dir():
            raise DirectoryGone(f"the store {self._root} is gone")

    def _exists(self, name: str) -> bool:
        path = self._root / name
        return path.is_symlink() or path.exists()

    def _remove(self, name: str) -> None:
        self._signatures.pop(name, None)
        self._large.pop(name, None)
        state = self._catalog.remove(name)
        now_s = time.monotonic()
        for old in [old for old, (when_s, _) in self._recently_removed.items() if now_s - when_s > VANISH_S]:
            del self._recently_removed[old]
        if state:
            self._recently_removed[name] = (now_s, state)

    def _gone(self, error: DirectoryGone) -> None:
        """Keep everything: what is in force, what went just before, or at the start what the offline copy has."""
        self._signatures.clear()
        for _, state in self._recently_removed.values():
            self._catalog.replace(state)
        self._recently_removed.clear()
        if self._origin is Origin.NOTHING and self._offline:
            self._origin = Origin.OFFLINE_COPY
            for state in self._offline.values():
                self._catalog.replace(state)
            text = "the offline copy is served, as it was saved last"
            self._say(Code.STORE_OFFLINE, Finding(Severity.WARNING, Code.STORE_OFFLINE, text, str(self._root)))
        text = f"{error.message}; the last good state stays"
        expected = "a directory this process may list"
        self._say(
            Code.STORE_MISSING,
            Finding(Severity.ERROR, Code.STORE_MISSING, text, printable(str(self._root)), expected=expected),
        )

    # From a file to its state

    async def _read(self, name: str) -> None:
        if name.endswith("/"):
            self._unreadable(
                name, Code.UNREADABLE, "the directory cannot be listed", "a directory this process may list"
            )
            return
        if printable(name) != name:
            self._unreadable(name, Code.ENCODING, "the file's name is not UTF-8, so it is not read", "a name in UTF-8")
            return
        try:
            found, text = await self._stable_text(name)
        except FileNotFoundError:
            if (self._root / name).is_symlink():
                self._unreadable(name, Code.UNREADABLE, "the link leads nowhere", "a link to a file")
            elif name in self._catalog.files:
                self._remove(name)
            return
        except Unreadable as error:
            self._signatures[name] = None
            self._unreadable(name, error.kind, error.message, error.expected)
            return
        self._catalog.replace(await self._evaluate(name, text))
        self._signatures[name] = found

    async def _stable_text(self, name: str) -> tuple[Signature, str]:
        """The text of a file that nobody has written to for a moment, as far as waiting a second helps."""
        path = self._root / name
        deadline_s = time.monotonic() + SETTLE_LIMIT_S
        while True:
            found = _look(path)
            young_s = SETTLE_S - (time.time_ns() - max(found.modified_ns, found.changed_ns)) / 1e9
            if 0 < young_s <= SETTLE_S and time.monotonic() < deadline_s:
                await asyncio.sleep(young_s)
                continue
            large = found.size > LARGE_BYTES
            text = await asyncio.to_thread(read_text, path) if large else read_text(path)
            if _look(path) == found or time.monotonic() >= deadline_s:
                return found, text

    async def _evaluate(self, name: str, text: str) -> FileState:
        before_state = self._before(name)
        before = Before(before_state) if before_state else None
        documents: list[Document] = []
        made = await self._cut(name, text)
        read_before = self._read_total
        for piece in made.pieces:
            known = before.find(piece) if before else None
            if known is None:
                known = document_of(piece, self._parse(made.document(piece)), name)
                await self._give_way()
            documents.append(known)
        self._reused_total += len(documents) - (self._read_total - read_before)
        return evaluate(name, tuple(documents), before_state)

    async def _cut(self, name: str, text: str) -> Cut:
        """The documents of a text. Of a large file the text is kept, so that the next time costs little."""
        if len(text) <= LARGE_BYTES:
            self._large.pop(name, None)
            return cut(text)
        made = await asyncio.to_thread(cut, text, self._large.get(name))
        self._large[name] = made
        return made

    def _parse(self, text: str) -> Parsed:
        self._read_total += 1
        return parse_document(text)

    def _unreadable(self, name: str, code: Code, text: str, expected: str) -> None:
        finding = Finding(Severity.ERROR, code, text, printable(name), expected=expected)
        self._catalog.replace(unreadable(name, finding, self._before(name)))

    def _before(self, name: str) -> FileState | None:
        return self._catalog.files.get(name) or self._offline.get(name)

    async def _give_way(self) -> None:
        if time.monotonic() - self._given_way_s > SLICE_S:
            await asyncio.sleep(0)
            self._given_way_s = time.monotonic()

    # What is told

    def _say(self, code: Code, finding: Finding | None) -> None:
        if finding:
            self._own_findings[code] = finding
        else:
            self._own_findings.pop(code, None)

    def _change(self) -> Change:
        difference = self._catalog.take()
        self._say(Code.OFFLINE_UNSAVED, self._saver.finding)
        findings = (*self._own_findings.values(), *self._catalog.findings())
        self._told = findings
        return Change(
            difference.put,
            difference.dropped,
            difference.moved,
            findings,
            self._counters(findings),
            self._origin,
        )

    def _counters(self, findings: Sequence[Finding]) -> Counters:
        totals = self._catalog.totals
        severities = count(findings)
        return Counters(
            files=len(self._catalog.files),
            documents=totals.documents,
            objects=self._catalog.objects,
            retained_objects=totals.retained,
            broken_documents=totals.broken_documents,
            errors=severities[Severity.ERROR],
            warnings=severities[Severity.WARNING],
            notes=severities[Severity.NOTE],
            documents_read_total=self._read_total,
            documents_reused_total=self._reused_total,
            saves_total=self._saver.saves,
            save_failures_total=self._saver.failures,
        )


def _look(path: Path) -> Signature:
    """Raises FileNotFoundError or Unreadable."""
    try:
        return signature(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(
            Code.UNREADABLE, f"cannot look at it: {error.strerror}", "a file this process may read"
        ) from error
