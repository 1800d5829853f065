"""Messages with another process of ours over a stream socket, on the readiness loop. What they are is injected."""

import socket
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from isthmus.loop.loop import READ, WRITE, Loop

READ_BYTES = 256 * 1024
MAX_UNSENT_BYTES = 16 * 1024 * 1024

In = TypeVar("In")
Out = TypeVar("Out")


class Channel(Generic[In, Out]):
    """``handle`` gets each message; ``ended`` is called once, when the other process is gone or unreadable.

    ``decode`` turns received bytes into the messages that they complete, ``encode`` one message into bytes.
    """

    def __init__(
        self,
        loop: Loop,
        end: socket.socket,
        decode: Callable[[bytes], Iterable[In]],
        encode: Callable[[Out], bytes],
        handle: Callable[[In], None],
        ended: Callable[[], None],
    ) -> None:
        end.setblocking(False)
        self._loop, self._socket, self._decode, self._encode = loop, end, decode, encode
        self._handle, self._ended = handle, ended
        self._outbox = bytearray()
        self._open = True
        loop.add(end.fileno(), READ, self._ready)

    def send(self, message: Out) -> None:
        """Queue a message; never blocks. A process that reads nothing for long is given up."""
        if self._open:
            self._outbox += self._encode(message)
            self._flush()

    def close(self) -> None:
        """Close our end."""
        self._open = False
        self._loop.remove(self._socket.fileno())
        self._socket.close()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & ~WRITE and self._open:
            self._read()

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._give_up()
            return
        for message in self._decode(data):
            self._handle(message)

    def _flush(self) -> None:
        try:
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self._give_up()
            return
        if len(self._outbox) > MAX_UNSENT_BYTES:
            self._give_up()
            return
        self._loop.modify(self._socket.fileno(), READ | (WRITE if self._outbox else 0))

    def _give_up(self) -> None:
        self._outbox.clear()
        self.close()
        self._ended()
