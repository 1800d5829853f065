"""A lab's name and what belongs to it: claimed by one directory at a time, worked on by one command at a time, removed.

Every name stands in ``BASE_DIRECTORY``, as the lab's directory or as a link to it elsewhere: so no two labs on a
machine share a name, and with it a prefix, and a lab is found by its name alone. Removal needs no lab file and no
memory of ``up``: the registry says what was made, the prefix finds what a damaged registry does not say.
"""

import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from isthmus.lab.network import etc_directory
from isthmus.lab.processes import kill_all
from isthmus.lab.registry import Kind, Registry
from isthmus.lab.resident import NETNS_DIRECTORY, remove_namespace
from isthmus.lab.topology import prefix
from isthmus.model.errors import IsthmusError

BASE_DIRECTORY = Path("/run/isthmus-lab")
REGISTRY = "registry.jsonl"
LOCK = "lock"
KILL_DEADLINE_S = 10.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LabExists(IsthmusError):
    """A lab of that name is up already."""

    code = "lab.exists"


class LabBusy(IsthmusError):
    """Another command is bringing the lab up or down right now."""

    code = "lab.busy"


def find_directory(name: str) -> Path:
    """Return the directory of lab ``name``, wherever it is; where there is no such lab, the one it would have."""
    claim = BASE_DIRECTORY / name
    return claim.readlink() if claim.is_symlink() else claim


def lab_names() -> list[str]:
    """Return the names of labs that are up, or that a crash left."""
    return sorted(path.name for path in BASE_DIRECTORY.iterdir()) if BASE_DIRECTORY.is_dir() else []


def claim(directory: Path) -> None:
    """Take the lab's name for ``directory``. Raises LabExists where it belongs to a lab elsewhere."""
    link = BASE_DIRECTORY / directory.name
    if link == directory:
        return
    for _ in range(3):  # the last lab of another command may take BASE_DIRECTORY away in between
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            BASE_DIRECTORY.mkdir(exist_ok=True)
            link.symlink_to(directory)
        if find_directory(directory.name) == directory:
            return
    raise LabExists(
        f"there is a lab '{directory.name}' in {find_directory(directory.name)}", hint="choose another --name"
    )


def take_down(name: str) -> bool:
    """Remove lab ``name``; return whether there was anything. Safe to repeat. Raises LabBusy, ProcessesRemain."""
    directory = find_directory(name)
    existed = os.path.lexists(BASE_DIRECTORY / name) or bool(_namespaces(name, directory))
    with locked(directory), undisturbed():
        remove(directory)
        forget(directory)
    return existed


def remove(directory: Path) -> None:
    """Remove what belongs to the lab in ``directory``: processes, namespaces, files. Raises ProcessesRemain."""
    namespaces = _namespaces(directory.name, directory)
    kill_all(namespaces, KILL_DEADLINE_S)
    for namespace in namespaces:
        remove_namespace(namespace)
        shutil.rmtree(etc_directory(namespace), ignore_errors=True)
    with contextlib.suppress(OSError):
        etc_directory("").rmdir()
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def forget(directory: Path) -> None:
    """Give the lab's directory and name back; the last lab takes the directory of labs with it."""
    (directory / LOCK).unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError:  # another command has come in already: it is that command's now
        return
    link = BASE_DIRECTORY / directory.name
    if link.is_symlink() and link.readlink() == directory:
        link.unlink()
    for parent in {directory.parent, BASE_DIRECTORY}:
        with contextlib.suppress(OSError):
            parent.rmdir()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lab's directory, which is made for it. Raises LabBusy."""
    descriptor = _lock(directory)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and its like while cleaning up: half a removal is what it is there to prevent."""
    try:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in _INTERRUPTS}
    except ValueError:  # not the main thread: signals do not come here
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _namespaces(name: str, directory: Path) -> list[str]:
    entries = Registry(directory / REGISTRY).entries()
    found = {entry.name for entry in entries if entry.kind in (Kind.NAMESPACE, Kind.ETC)}
    for place in (NETNS_DIRECTORY, etc_directory("")):
        if place.is_dir():
            found |= {path.name for path in place.iterdir()}
    return sorted(each for each in found if each.startswith(prefix(name)))


def _lock(directory: Path) -> int:
    """Return the descriptor that holds the lock: a record lock, which a child between fork and exec does not inherit.

    With flock(2) such a child would hold it on for a moment after kill -9 of its parent.
    """
    path = directory / LOCK
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another command has just removed the directory
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            problem = f"another command is working on lab '{directory.name}'"
            raise LabBusy(problem, hint="wait for it, or end it") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)
