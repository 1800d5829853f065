"""Joins the two connections of a pair, in a thread with a readiness loop of its own.

The bytes are those of a TLS session between the two agents; nothing here could read them. Methods are called on the
relay's thread; ``ended`` is called there too, through ``post``.
"""

import socket
import threading
from collections.abc import Callable

from isthmus.loop.loop import Loop
from isthmus.loop.splice import End, Splice

Post = Callable[[Callable[[], None]], object]
Ended = Callable[[int, int, int, str], None]


class Joiner:
    """The joined pairs, by number."""

    def __init__(self, post: Post, ended: Ended) -> None:
        self._post = post
        self._ended = ended
        self._loop = Loop()
        self._splices: dict[int, Splice] = {}
        self._thread = threading.Thread(target=self._loop.run, name="joiner", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, number: int, a: socket.socket, b: socket.socket) -> None:
        """Take over both sockets. ``ended(number, bytes_a_to_b, bytes_b_to_a, why)`` follows once."""
        self._loop.call_threadsafe(lambda: self._join(number, a, b))

    def abort(self, number: int) -> None:
        """End a pair with an RST on both sides; unknown numbers are ignored."""
        self._loop.call_threadsafe(lambda: self._abort(number))

    def stop(self) -> None:
        """End every pair and the thread."""
        self._loop.call_threadsafe(self._abort_all)
        self._loop.call_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        self._loop.close()

    def _join(self, number: int, a: socket.socket, b: socket.socket) -> None:
        def ended(a_to_b: int, b_to_a: int, why: End) -> None:
            self._splices.pop(number, None)
            self._post(lambda: self._ended(number, a_to_b, b_to_a, why.value))

        splice = Splice(self._loop, a, b, ended)
        if splice.open:
            self._splices[number] = splice

    def _abort(self, number: int) -> None:
        splice = self._splices.get(number)
        if splice is not None:
            splice.abort()

    def _abort_all(self) -> None:
        for splice in list(self._splices.values()):
            splice.abort()
