"""The worker's end of the Unix stream socket to the control process: wire/worker.py in frames, on the loop."""

import socket
from collections.abc import Callable

from isthmus.loop.loop import READ, WRITE, Loop
from isthmus.wire import frames, worker

READ_BYTES = 256 * 1024
MAX_UNSENT_BYTES = 16 * 1024 * 1024


class Channel:
    """``handle`` gets each message; ``ended`` is called once, when the control process is gone or unreadable."""

    def __init__(
        self, loop: Loop, end: socket.socket, handle: Callable[[worker.ToWorker], None], ended: Callable[[], None]
    ) -> None:
        end.setblocking(False)
        self._loop, self._socket, self._handle, self._ended = loop, end, handle, ended
        self._reader = frames.FrameReader()
        self._outbox = bytearray()
        loop.add(end.fileno(), READ, self._ready)

    def send(self, message: worker.FromWorker) -> None:
        """Queue a message; never blocks. A control process that reads nothing for long is given up."""
        self._outbox += frames.encode(worker.encoder.encode(message))
        self._flush()

    def close(self) -> None:
        self._loop.remove(self._socket.fileno())
        self._socket.close()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & ~WRITE:
            self._read()

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended()
            return
        for frame in self._reader.feed(data):
            self._handle(worker.to_worker_decoder.decode(frame))

    def _flush(self) -> None:
        try:
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()
            self._ended()
            return
        if len(self._outbox) > MAX_UNSENT_BYTES:
            self._ended()
            return
        self._loop.modify(self._socket.fileno(), READ | (WRITE if self._outbox else 0))
