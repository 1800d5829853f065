"""All files of the store together: which object is in force, and exactly what changed. Pure and incremental.

Where several files define one object, the first by file name is used; one that is only kept from a broken file yields
to any other.
"""

from typing import NamedTuple

import msgspec

from isthmus.model.cluster import Key, Object
from isthmus.model.findings import Finding
from isthmus.model.index import same_content
from isthmus.model.manifests import Item
from isthmus.store.filestate import FileState, duplicate


class Difference(msgspec.Struct, frozen=True):
    """What changed since the last time. ``moved`` are objects that only stand on another line, or in another file."""

    put: tuple[Object, ...] = ()
    dropped: tuple[Key, ...] = ()
    moved: tuple[Object, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.put or self.dropped or self.moved)


class Owned(NamedTuple):
    """What a file gives for an identity, and whether that is only kept from before."""

    retained: bool
    item: Item


class Totals(msgspec.Struct):
    """Sums over all files, kept up to date with each."""

    documents: int = 0
    retained: int = 0
    broken_documents: int = 0

    def add(self, state: FileState | None, sign: int) -> None:
        if state:
            self.documents += sign * len(state.documents)
            self.retained += sign * len(state.retained)
            self.broken_documents += sign * state.broken_documents


class Catalog:
    """The files, and for every identity the files that define it."""

    def __init__(self) -> None:
        self._files: dict[str, FileState] = {}
        self._owners: dict[Key, dict[str, Owned]] = {}
        self._contested: set[Key] = set()
        self._before: dict[Key, tuple[Object, ...]] = {}
        self._with_findings: dict[str, tuple[Finding, ...]] = {}
        self.totals = Totals()

    @property
    def files(self) -> dict[str, FileState]:
        """States by file name; not to be changed."""
        return self._files

    @property
    def objects(self) -> int:
        """How many identities are in force."""
        return len(self._owners)

    def replace(self, state: FileState) -> None:
        """Take the new state of a file."""
        old = self._files.get(state.file)
        self._files[state.file] = state
        self.totals.add(old, -1)
        self.totals.add(state, 1)
        self._set_findings(state.file, state.findings)
        before: dict[Key, Item] = old.good if old else {}
        was_retained: frozenset[Key] = old.retained if old else frozenset()
        for identity, item in state.good.items():
            retained = identity in state.retained
            if before.get(identity) is not item or (identity in was_retained) != retained:
                self._touch(identity)
                self._owners.setdefault(identity, {})[state.file] = Owned(retained, item)
                self._contest(identity)
        for identity in before.keys() - state.good.keys():
            self._disown(identity, state.file)

    def remove(self, file: str) -> FileState | None:
        """Forget a file that is gone; its state, if there was one."""
        old = self._files.pop(file, None)
        self.totals.add(old, -1)
        self._set_findings(file, ())
        for identity in old.good if old else ():
            self._disown(identity, file)
        return old

    def take(self) -> Difference:
        """What changed since the last call, in a stable order."""
        put: list[Object] = []
        dropped: list[Key] = []
        moved: list[Object] = []
        for identity, before in self._before.items():
            old = {one.key: one for one in before}
            for one in self._in_force(identity):
                known = old.pop(one.key, None)
                if known is None or not same_content(known, one):
                    put.append(one)
                elif known != one:
                    moved.append(one)
            dropped += old
        self._before.clear()
        return Difference(tuple(put), tuple(dropped), tuple(moved))

    def findings(self) -> tuple[Finding, ...]:
        """All findings, by file and line."""
        found = [finding for file in sorted(self._with_findings) for finding in self._with_findings[file]]
        for identity in self._contested:
            found += self._duplicates(identity)
        return tuple(sorted(found, key=lambda finding: (finding.file, finding.line)))

    def _set_findings(self, file: str, findings: tuple[Finding, ...]) -> None:
        if findings:
            self._with_findings[file] = findings
        else:
            self._with_findings.pop(file, None)

    def _disown(self, identity: Key, file: str) -> None:
        self._touch(identity)
        owners = self._owners[identity]
        del owners[file]
        if not owners:
            del self._owners[identity]
        self._contest(identity)

    def _contest(self, identity: Key) -> None:
        if len(self._owners.get(identity, ())) > 1:
            self._contested.add(identity)
        else:
            self._contested.discard(identity)

    def _touch(self, identity: Key) -> None:
        """Remember what was in force before the first change since ``take``."""
        if identity not in self._before:
            self._before[identity] = self._in_force(identity)

    def _in_force(self, identity: Key) -> tuple[Object, ...]:
        owners = self._owners.get(identity)
        if not owners:
            return ()
        if len(owners) == 1:
            return next(iter(owners.values())).item.objects
        return owners[self._first(identity)].item.objects

    def _first(self, identity: Key) -> str:
        owners = self._owners[identity]
        return min(owners, key=lambda file: (owners[file].retained, file))

    def _duplicates(self, identity: Key) -> list[Finding]:
        first = self._first(identity)
        line = self._owners[identity][first].item.line
        return [
            duplicate(owned.item, file, line, first)
            for file, owned in self._owners[identity].items()
            if file != first and not owned.retained
        ]
