"""The offline copy: the store as it was read last, for a start without it, and so that a start need not read it again.

One file, MessagePack, mode 0600, replaced atomically. It belongs to one release: another one reads the manifests anew.
"""

from pathlib import Path

import msgspec

from isthmus import __version__
from isthmus.files import StateNotWritten, write_private
from isthmus.model.cluster import EndpointSlice, Key, Namespace, Node, Object, Pod, Service
from isthmus.model.errors import IsthmusError
from isthmus.model.findings import Finding
from isthmus.model.manifests import Item, Parsed
from isthmus.store.filestate import Document, FileState

FORMAT = f"isthmus-store 1 {__version__}"


class OfflineError(IsthmusError):
    """The offline copy cannot be saved or read."""

    code = "store.offline"


class SavedItem(msgspec.Struct, frozen=True, array_like=True):
    """An item with its objects apart by kind, since MessagePack does not tell them from each other."""

    identity: Key
    line: int
    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    nodes: tuple[Node, ...] = ()
    pods: tuple[Pod, ...] = ()
    namespaces: tuple[Namespace, ...] = ()


class SavedDocument(msgspec.Struct, frozen=True, array_like=True):
    digest: bytes
    line: int
    items: tuple[SavedItem, ...]
    findings: tuple[Finding, ...]
    broken: tuple[Key, ...]
    unknown_loss: bool


class SavedFile(msgspec.Struct, frozen=True, array_like=True):
    """``retained`` are items kept from before; all other good ones follow from the documents."""

    file: str
    documents: tuple[SavedDocument, ...]
    retained: tuple[SavedItem, ...]
    findings: tuple[Finding, ...]
    broken_documents: int


class Saved(msgspec.Struct, frozen=True, array_like=True):
    format: str
    files: tuple[SavedFile, ...]


def save(path: Path, files: list[FileState]) -> None:
    """Replace the copy. Raises OfflineError, leaving the earlier copy as it was."""
    saved = Saved(FORMAT, tuple(_save_file(state) for state in files if state.good or state.documents))
    try:
        write_private(path, msgspec.msgpack.encode(saved))
    except StateNotWritten as error:
        raise OfflineError(f"cannot save the offline copy: {error.message}") from error


def load(path: Path) -> list[FileState] | None:
    """The copy; None if there is none, or it is another release's. Raises OfflineError if it cannot be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OfflineError(f"cannot read the offline copy {path}: {error.strerror}") from error
    try:
        if msgspec.msgpack.decode(data, type=tuple[str, msgspec.Raw])[0] != FORMAT:
            return None
        return [_load_file(saved) for saved in msgspec.msgpack.decode(data, type=Saved).files]
    except (msgspec.DecodeError, ValueError) as error:
        raise OfflineError(f"the offline copy {path} is damaged: {error}") from error


def _save_file(state: FileState) -> SavedFile:
    return SavedFile(
        state.file,
        tuple(
            SavedDocument(
                one.digest,
                one.line,
                tuple(map(_save_item, one.parsed.items)),
                one.parsed.findings,
                one.parsed.broken,
                one.parsed.unknown_loss,
            )
            for one in state.documents
        ),
        tuple(_save_item(state.good[identity]) for identity in state.good if identity in state.retained),
        state.findings,
        state.broken_documents,
    )


def _save_item(item: Item) -> SavedItem:
    objects = item.objects
    return SavedItem(
        item.identity,
        item.line,
        tuple(one for one in objects if isinstance(one, Service)),
        tuple(one for one in objects if isinstance(one, EndpointSlice)),
        tuple(one for one in objects if isinstance(one, Node)),
        tuple(one for one in objects if isinstance(one, Pod)),
        tuple(one for one in objects if isinstance(one, Namespace)),
    )


def _load_file(saved: SavedFile) -> FileState:
    documents = tuple(_load_document(one) for one in saved.documents)
    retained = {one.identity: _load_item(one) for one in saved.retained}
    good: dict[Key, Item] = {}
    for document in documents:
        for item in document.parsed.items:
            good.setdefault(item.identity, item)
    good.update(retained)
    return FileState(saved.file, documents, good, frozenset(retained), saved.findings, saved.broken_documents)


def _load_document(saved: SavedDocument) -> Document:
    items = tuple(map(_load_item, saved.items))
    return Document(saved.digest, saved.line, Parsed(items, saved.findings, saved.broken, saved.unknown_loss))


def _load_item(saved: SavedItem) -> Item:
    objects: tuple[Object, ...] = saved.services + saved.slices + saved.nodes + saved.pods + saved.namespaces
    return Item(saved.identity, saved.line, objects)
