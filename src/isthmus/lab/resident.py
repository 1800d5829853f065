"""Threads that live in a network namespace, while the process they belong to stays where it is.

A thread can change its own namespace (setns(2)), and what it opens or writes under /proc/sys/net belongs to the
namespace it is in. So one process builds a dozen of them without starting another, and a test holds both ends of a path
across several NATs: a socket belongs for ever to the namespace it was made in.
"""

import contextlib
import ctypes
import errno
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from isthmus.model.errors import NotPermitted

NETNS_DIRECTORY = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 4096, 16384, 1 << 20
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)

Result = TypeVar("Result")


class Resident:
    """A thread in ``namespace`` that does what it is asked. Raises OSError where the namespace cannot be entered."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"in {namespace}")
        try:
            self.call(lambda: _enter(namespace))
        except BaseException:
            self.close()
            raise

    def call(self, work: Callable[[], Result]) -> Result:
        """Return ``work()``, done by the thread; raises what it raises."""
        return self._thread.submit(work).result()

    def close(self) -> None:
        """End the thread. What it opened stays open, in its namespace."""
        self._thread.shutdown()


def inside(namespace: str, work: Callable[[], Result]) -> Result:
    """Return ``work()``, done in ``namespace`` by a thread of its own."""
    with contextlib.closing(Resident(namespace)) as resident:
        return resident.call(work)


def open_socket(namespace: str, kind: socket.SocketKind, family: int = socket.AF_INET) -> socket.socket:
    """Return an unbound socket of ``namespace``."""
    return inside(namespace, lambda: socket.socket(family, kind))


def create_namespace(name: str) -> None:
    """Create a network namespace as ``ip netns add`` does, without a process for it. Raises OSError, NotPermitted."""
    _share_directory()
    path = NETNS_DIRECTORY / name
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))

    def make() -> None:
        _check(_libc.unshare(_CLONE_NEWNET), f"unshare for {name}")
        _check(_libc.mount(b"/proc/thread-self/ns/net", bytes(path), b"none", _MS_BIND, None), f"mount {path}")

    with ThreadPoolExecutor(1, thread_name_prefix="unshare") as thread:
        thread.submit(make).result()


def remove_namespace(name: str) -> None:
    """Remove ``name``, also when it is half made: a file without a namespace on it. Raises OSError.

    The namespace itself goes with its last process.
    """
    path = NETNS_DIRECTORY / name
    # EINVAL: nothing is mounted there. What matters is that the file goes, and that fails while something is.
    _libc.umount2(bytes(path), _MNT_DETACH)
    path.unlink(missing_ok=True)


def _share_directory() -> None:
    """Make /run/netns a shared mount, as ip-netns(8) does: what is removed here then goes from all mount namespaces."""
    NETNS_DIRECTORY.mkdir(exist_ok=True)
    target = bytes(NETNS_DIRECTORY)
    if _libc.mount(b"", target, b"none", _MS_SHARED | _MS_REC, None):
        _check(_libc.mount(target, target, b"none", _MS_BIND | _MS_REC, None), f"bind {NETNS_DIRECTORY}")
        _check(_libc.mount(b"", target, b"none", _MS_SHARED | _MS_REC, None), f"share {NETNS_DIRECTORY}")


def _enter(namespace: str) -> None:
    descriptor = os.open(NETNS_DIRECTORY / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(descriptor, _CLONE_NEWNET), f"enter network namespace {namespace}")
    finally:
        os.close(descriptor)


def _check(result: int, what: str) -> None:
    if not result:
        return
    code = ctypes.get_errno()
    if code in (errno.EPERM, errno.EACCES):
        raise NotPermitted(
            f"network namespaces are not permitted here: cannot {what}",
            hint="in a container, give it the capabilities SYS_ADMIN and NET_ADMIN (docker run --privileged)",
        )
    raise OSError(code, f"cannot {what}: {os.strerror(code)}")
