"""State files: private (0600 in directories of 0700), and replaced in one step or not at all.

A reader sees the old file or the new one, whole, also after a crash or a full disk: the new content is written beside
the old, synced, and renamed over it; then the directory is synced.
"""

import contextlib
import os
import secrets
from pathlib import Path

from isthmus.model.errors import IsthmusError

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700
MAX_FILE_BYTES = 4 * 1024 * 1024


class StateNotWritten(IsthmusError):
    """A state file could not be written (disk full, read-only, not permitted); the old one is as it was."""

    code = "state.not-written"


class StateUnreadable(IsthmusError):
    """A state file is missing, too large or not readable."""

    code = "state.unreadable"


def make_private_directory(path: Path) -> None:
    """Create ``path`` with its parents; an existing directory is closed to others."""
    try:
        path.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        path.chmod(PRIVATE_DIRECTORY)
    except OSError as error:
        raise StateNotWritten(f"could not make the directory {path}: {error.strerror}") from error


def write_private(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, mode 0600; its directory is made. Raises StateNotWritten, the old file stays."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        beside.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise StateNotWritten(
            f"could not write {path}: {error.strerror}", hint="the old file is as it was; free space or fix the mode"
        ) from error


def create_private(path: Path, content: bytes) -> None:
    """Like ``write_private``, but never over an existing file: raises StateNotWritten."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
    except OSError as error:
        raise StateNotWritten(f"could not create {path}: {error.strerror}") from error
    try:
        write_private(path, content)
    except StateNotWritten:
        path.unlink(missing_ok=True)
        raise


def read_private(path: Path) -> bytes:
    """The file's bytes; raises StateUnreadable."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StateUnreadable(f"could not read {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise StateUnreadable(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    return content


def read_if_there(path: Path) -> bytes | None:
    """The file's bytes, or None where there is no such file; raises StateUnreadable otherwise."""
    return read_private(path) if path.exists() else None


def sync_directory(path: Path) -> None:
    """Make renames and removals in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
