"""Length-prefixed frames: a 4-byte big-endian length, then that many bytes. Pure: bytes in, frames out."""

import struct

from isthmus.model.errors import IsthmusError

HEADER = struct.Struct("!I")
MAX_FRAME_BYTES = 16 * 1024 * 1024


class FrameError(IsthmusError):
    """The other side sent a frame that is too large; the connection cannot be read further."""

    code = "wire.frame"


def encode(body: bytes) -> bytes:
    """One frame."""
    return HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frames. ``max_bytes`` bounds a single frame, and so the memory a peer can claim."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that ``data`` completes, in order. Raises FrameError for one that is too large."""
        self._buffer += data
        frames: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            if length > self._max_bytes:
                raise FrameError(f"a frame of {length} bytes was announced; the limit is {self._max_bytes}")
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[start + HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return frames
