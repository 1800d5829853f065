"""Sockets of a namespace in this very process: a thread enters the namespace, opens the socket, and leaves again.

A socket belongs for ever to the namespace it was made in, so a test can hold both ends of a path across several NATs.
"""

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from isthmus.lab.processes import NETNS_DIRECTORY

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

Result = TypeVar("Result")


def inside(namespace: str, call: Callable[[], Result]) -> Result:
    """Return ``call()``, made by a thread that is in ``namespace``; the caller's own thread never leaves its place.

    Raises what ``call`` raises, and OSError where the namespace cannot be entered.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _enter(namespace)
            outcome.append(call())
        except BaseException as error:  # carried over to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, name=f"inside {namespace}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def open_socket(namespace: str, kind: socket.SocketKind, family: int = socket.AF_INET) -> socket.socket:
    """Return an unbound socket of ``namespace``."""
    return inside(namespace, lambda: socket.socket(family, kind))


def _enter(namespace: str) -> None:
    descriptor = os.open(NETNS_DIRECTORY / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter network namespace {namespace}: {os.strerror(code)}")
    finally:
        os.close(descriptor)
