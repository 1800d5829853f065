"""What the store tells the agent."""

from enum import StrEnum

import msgspec

from isthmus.model.cluster import Key, Object
from isthmus.model.findings import Finding


class Origin(StrEnum):
    """Where the objects in force come from."""

    DIRECTORY = "directory"
    OFFLINE_COPY = "offline-copy"
    NOTHING = "nothing"  # no directory and no offline copy yet


class Counters(msgspec.Struct, frozen=True):
    """Sizes of what is in force, and totals since the start (``*_total``)."""

    files: int = 0
    documents: int = 0
    objects: int = 0
    retained_objects: int = 0
    broken_documents: int = 0
    errors: int = 0
    warnings: int = 0
    notes: int = 0
    documents_read_total: int = 0
    documents_reused_total: int = 0
    saves_total: int = 0
    save_failures_total: int = 0


class Change(msgspec.Struct, frozen=True):
    """A step from one state of the store to the next; the first one leads from nothing to all there is.

    ``moved`` are objects that only stand on another line or in another file: nothing is planned again for them.
    ``findings`` are all that hold now. A change may be empty but for its findings.
    """

    put: tuple[Object, ...] = ()
    dropped: tuple[Key, ...] = ()
    moved: tuple[Object, ...] = ()
    findings: tuple[Finding, ...] = ()
    counters: Counters = Counters()
    origin: Origin = Origin.DIRECTORY
