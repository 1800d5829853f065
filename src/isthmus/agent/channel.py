"""The worker's end of the channel to the control process: frames of wire/worker.py on the readiness loop."""

from collections.abc import Callable
from socket import socket

from isthmus.loop.loop import BOTH, READ, Loop
from isthmus.wire.frames import FrameReader, encode
from isthmus.wire.worker import FromWorker, ToWorker, encoder, to_worker_decoder

RECEIVE_BYTES = 256 * 1024


class Channel:
    """Receives ToWorker messages and sends FromWorker ones. ``closed`` is called once when control has gone."""

    def __init__(
        self, loop: Loop, sock: socket, received: Callable[[ToWorker], None], closed: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._received = received
        self._closed = closed
        self._reader = FrameReader()
        self._out = bytearray()
        sock.setblocking(False)
        loop.add(sock.fileno(), READ, self._ready)

    def send(self, message: FromWorker) -> None:
        """Queue ``message``; it leaves at once where the socket takes it."""
        idle = not self._out
        self._out += encode(encoder.encode(message))
        if idle:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()
            return
        self._loop.modify(self._sock.fileno(), BOTH if self._out else READ)

    def _ready(self, _events: int) -> None:
        if self._out:
            self._flush()
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove(self._sock.fileno())
            self._closed()
            return
        for frame in self._reader.feed(data):
            self._received(to_worker_decoder.decode(frame))
