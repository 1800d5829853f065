"""What a lab has made, written down before it is made, so that a crash at any moment can be cleaned up after.

One line of JSON a thing, appended and flushed to the kernel; a torn last line (the crash itself) is left out.
"""

import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec


class Kind(StrEnum):
    """Kinds of things that outlive a process."""

    NAMESPACE = "namespace"  # a name in /run/netns
    ETC = "etc"  # a directory in /etc/netns
    UP = "up"  # not a thing: the lab was complete


class Entry(msgspec.Struct, frozen=True):
    """One thing."""

    kind: Kind
    name: str


class Registry:
    """The registry file of one lab."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, kind: Kind, name: str) -> None:
        """Append before the thing is made. Raises OSError: then it must not be made."""
        line = msgspec.json.encode(Entry(kind, name)) + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def entries(self) -> Iterator[Entry]:
        """Yield what was noted; nothing where there is no registry."""
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield msgspec.json.decode(line, type=Entry)
            except msgspec.DecodeError:
                continue

    @property
    def complete(self) -> bool:
        """Whether ``lab up`` reached its end."""
        return any(entry.kind is Kind.UP for entry in self.entries())
