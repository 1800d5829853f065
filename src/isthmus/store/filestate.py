"""One file of the store: its documents, what they gave, and what stays of its last good state. Pure.

A document that is the same as before is not read again, wherever in the file it stands now. Where a document is broken,
the last good state of the objects it held stays: those it names, or, if it cannot be read at all, every object of the
file that is not defined elsewhere in it.
"""

from collections.abc import Iterator

import msgspec

from isthmus.model.cluster import Key
from isthmus.model.findings import Code, Finding, Severity
from isthmus.model.manifests import Item, Parsed, place_finding, placed
from isthmus.store.cutting import Piece

Digest = bytes


class Document(msgspec.Struct, frozen=True):
    """One document where it stands."""

    digest: Digest
    line: int
    parsed: Parsed  # placed


class FileState(msgspec.Struct, frozen=True):
    """What a file gives. ``good`` is in order of the file; ``retained`` are those of ``good`` kept from before."""

    file: str
    documents: tuple[Document, ...] = ()
    good: dict[Key, Item] = {}
    retained: frozenset[Key] = frozenset()
    findings: tuple[Finding, ...] = ()
    broken_documents: int = 0


class Before:
    """The earlier state of a file, for looking up documents that are still the same."""

    def __init__(self, state: FileState) -> None:
        self.state = state
        self._by_digest = {document.digest: document for document in state.documents}

    def find(self, piece: Piece) -> Document | None:
        """The document as it is read already, moved to where it stands now."""
        known = self._by_digest.get(piece.digest)
        if known is None or known.line == piece.line:
            return known
        return Document(piece.digest, piece.line, _moved(known, self.state.file, piece.line))


def _moved(document: Document, file: str, line: int) -> Parsed:
    """``placed`` counts from the document's first line, so undo the old place in the same step."""
    return placed(document.parsed, file, line - document.line + 1)


def document_of(piece: Piece, parsed: Parsed, file: str) -> Document:
    """A document that was just read."""
    return Document(piece.digest, piece.line, placed(parsed, file, piece.line))


def evaluate(file: str, documents: tuple[Document, ...], before: FileState | None) -> FileState:
    """The state of a file that could be read."""
    good: dict[Key, Item] = {}
    findings: list[Finding] = []
    broken: set[Key] = set()
    unknown_loss = False
    broken_documents = 0
    for document in documents:
        parsed = document.parsed
        for item in parsed.items:
            if good.setdefault(item.identity, item) is not item:
                findings.append(duplicate(item, file, good[item.identity].line, file))
        findings += parsed.findings
        if parsed.broken or parsed.unknown_loss:
            broken_documents += 1
            broken.update(parsed.broken)
            unknown_loss |= parsed.unknown_loss
    retained = dict(_retained(before, good, broken, unknown_loss)) if broken_documents and before else {}
    good.update(retained)
    return FileState(file, documents, good, frozenset(retained), tuple(findings), broken_documents)


def _retained(
    before: FileState, good: dict[Key, Item], broken: set[Key], unknown_loss: bool
) -> Iterator[tuple[Key, Item]]:
    for identity, item in before.good.items():
        if identity not in good and (unknown_loss or identity in broken):
            yield identity, item


def unreadable(file: str, finding: Finding, before: FileState | None) -> FileState:
    """The state of a file that could not be read: everything it gave stays."""
    good = before.good if before else {}
    documents = before.documents if before else ()
    return FileState(file, documents, good, frozenset(good), (finding,), 1)


def duplicate(item: Item, file: str, line: int, first_file: str) -> Finding:
    """The second of two objects with one name; the first one is used."""
    text = f"it is not used: {first_file}:{line} defines the same object"
    finding = Finding(
        Severity.ERROR,
        Code.DUPLICATE_OBJECT,
        text,
        line=item.line,
        object=str(item.identity),
        expected="each object once",
    )
    return place_finding(finding, file, 0)
