"""A descriptor kept in hand, so that a connection can be refused cleanly when none is left to accept it with."""

import errno
import os
import socket

from isthmus.loop.splice import LINGER_ZERO

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Reserve:
    """Holds one descriptor. Gives it up for the moment that accepting and resetting one connection takes."""

    def __init__(self) -> None:
        self._fd = self._open()

    def reset_one(self, listener: socket.socket) -> bool:
        """Accept one waiting connection and reset it. False where even this cannot be done now, or none waits."""
        if self._fd is not None:
            os.close(self._fd)
        try:
            sock, _ = listener.accept()
        except OSError:
            return False
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
            sock.close()
            return True
        finally:
            self._fd = self._open()

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @staticmethod
    def _open() -> int | None:
        try:
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
