"""The files of a store directory: which they are, and their text.

Read are ``*.yaml``, ``*.yml`` and ``*.json`` in any letter case, in subdirectories too. Hidden names are not read (a
leading dot: editors' and mounts' own files), but the visible links that a mounted ConfigMap has into ``..data`` are.
"""

import os
import stat
from pathlib import Path

import msgspec

from isthmus.model.errors import IsthmusError
from isthmus.model.findings import Code
from isthmus.model.manifests import MAX_TEXT_BYTES

SUFFIXES = (".yaml", ".yml", ".json")


class Signature(msgspec.Struct, frozen=True):
    """What differs when a file was written again or replaced."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


class Unreadable(IsthmusError):
    """A file cannot be read now; ``kind`` is the finding's code, ``expected`` what would mend it."""

    code = "store.unreadable"

    def __init__(self, kind: Code, message: str, expected: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.expected = expected


class DirectoryGone(IsthmusError):
    """The store's directory is missing or cannot be listed."""

    code = "store.missing"


def is_manifest(name: str) -> bool:
    """Whether a relative path is one that the store reads."""
    parts = name.split("/")
    return not any(part.startswith(".") for part in parts) and parts[-1].lower().endswith(SUFFIXES)


def list_files(root: Path) -> dict[str, Signature | None]:
    """All manifests below ``root`` by relative path; None for one that cannot be looked at. Raises DirectoryGone."""
    found: dict[str, Signature | None] = {}
    seen: set[tuple[int, int]] = set()
    try:
        _list(str(root), "", found, seen)
    except OSError as error:
        raise DirectoryGone(f"cannot list the store {root}: {error.strerror}") from error
    return found


def _list(directory: str, prefix: str, found: dict[str, Signature | None], seen: set[tuple[int, int]]) -> None:
    """Each directory once, for links may lead in circles. A subdirectory that vanishes meanwhile is passed over."""
    here = Path(directory).stat()
    if (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            if entry.is_dir():
                try:
                    _list(entry.path, name + "/", found, seen)
                except FileNotFoundError:
                    continue
                except OSError:
                    found[name + "/"] = None
            elif is_manifest(name):
                _add(entry.path, name, found)


def _add(path: str, name: str, found: dict[str, Signature | None]) -> None:
    try:
        found[name] = signature(path)
    except FileNotFoundError:
        if Path(path).is_symlink():
            found[name] = None
    except OSError:
        found[name] = None


def signature(path: str | Path) -> Signature:
    """Raises OSError."""
    found = os.stat(path)  # noqa: PTH116 (called for each of thousands of files)
    return Signature(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_text(path: Path) -> str:
    """The text of a file. Raises FileNotFoundError if there is none, Unreadable with the reason otherwise."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = _read(file.fileno())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(
            Code.UNREADABLE, f"cannot read it: {error.strerror}", "a file this process may read"
        ) from error
    return _decode(data)


def _read(descriptor: int) -> bytes:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(Code.UNREADABLE, "it is not a file", "a regular file")
    if found.st_size > MAX_TEXT_BYTES:
        raise Unreadable(
            Code.TOO_LARGE,
            f"it has {found.st_size} bytes",
            f"at most {MAX_TEXT_BYTES} bytes; split it in several files",
        )
    parts = []
    left = MAX_TEXT_BYTES
    while left > 0 and (part := os.read(descriptor, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = "it is UTF-16" if utf16 else f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})"
        raise Unreadable(Code.ENCODING, text, "a file saved as UTF-8") from error


def printable(name: str) -> str:
    """A file name as text that can be encoded: bytes that are no UTF-8 are shown as ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
