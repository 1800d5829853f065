"""What reading and planning found: problems that a person must mend, and notes that a person may want to know.

Plain data; the codes are stable and listed in docs/manifests.md, held to it by a test.
"""

from collections.abc import Iterable
from enum import StrEnum

import msgspec


class Severity(StrEnum):
    """How much a finding matters. Errors and warnings are problems; a note is not."""

    ERROR = "error"  # the object is not used; its last good state stays
    WARNING = "warning"  # the object is used without the part that is named
    NOTE = "note"  # nothing is wrong; something is not served


class Code(StrEnum):
    """The kind of finding."""

    UNREADABLE = "manifest.unreadable"
    ENCODING = "manifest.encoding"
    TOO_LARGE = "manifest.too-large"
    SYNTAX = "manifest.syntax"
    FIELD = "manifest.field"
    DUPLICATE_KEY = "manifest.duplicate-key"
    DUPLICATE_OBJECT = "manifest.duplicate-object"
    ENDPOINT_WITHOUT_NODE = "manifest.endpoint-without-node"
    SLICE_WITHOUT_SERVICE = "manifest.slice-without-service"
    BAD_VALUE = "manifest.bad-value"
    UNKNOWN_KIND = "manifest.unknown-kind"
    NOT_SERVED = "manifest.not-served"
    STORE_MISSING = "store.missing"
    STORE_OFFLINE = "store.offline-copy"
    STORE_UNWATCHED = "store.unwatched"
    OFFLINE_UNSAVED = "store.offline-unsaved"
    OFFLINE_UNREADABLE = "store.offline-unreadable"
    VIRTUAL_EXHAUSTED = "virtual.exhausted"
    NOT_IN_RANGE = "service.not-in-range"


class Finding(msgspec.Struct, frozen=True):
    """One finding. ``line`` counts from 1 (0: the file as a whole); ``field`` is a path like ``spec.ports[0].port``."""

    severity: Severity
    code: Code
    text: str
    file: str = ""
    line: int = 0
    field: str = ""
    expected: str = ""
    object: str = ""

    @property
    def is_problem(self) -> bool:
        return self.severity is not Severity.NOTE

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        parts = [part for part in (place, self.object, self.field) if part]
        expected = f"; expected {self.expected}" if self.expected else ""
        return ": ".join([*parts, self.text + expected])


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings of each severity there are; every severity is present."""
    counts = {severity.value: 0 for severity in Severity}
    for finding in findings:
        counts[finding.severity.value] += 1
    return counts
