"""One non-blocking connection attempt to an endpoint of this node."""

import errno
import socket
from collections.abc import Callable

from isthmus.kernel.sockets import defer_port, family_of, mark_own, set_transparent
from isthmus.loop.loop import WRITE, Loop, Timer
from isthmus.model.marks import FROM_CLIENT, OWN
from isthmus.model.ports import Outcome

# How long to wait for a local port before asking again: TIME_WAIT ports come back after a second (tcp_tw_reuse).
PORT_RETRY_S = 0.05

_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ANSWERED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET})

Done = Callable[["Dial", Outcome, str], None]


class Dial:
    """Connects to ``address``:``port``, as the node or, with ``client``, from that address (IP_TRANSPARENT).

    ``start`` tells the outcome at once where the kernel does: an endpoint on the same machine has usually answered
    before connect() returns. Else ``done(dial, outcome, detail)`` is called once, later. After OPENED, ``take`` gives
    the connected socket, out of the loop.
    """

    __slots__ = ("_address", "_client", "_done", "_loop", "_mark", "_port", "_timer", "sock")

    def __init__(self, loop: Loop, address: str, port: int, done: Done, *, client: str = "", mark: bool = True) -> None:
        self._loop = loop
        self._address = address
        self._port = port
        self._done = done
        self._client = client
        self._mark = mark
        self._timer: Timer | None = None
        self.sock: socket.socket | None = None

    def start(self) -> tuple[Outcome, str] | None:
        """Begin. Returns the outcome if it is known at once (``done`` is not called then), else None."""
        try:
            sock = self._socket()
        except OSError as error:
            return _outcome(error)
        self.sock = sock
        code = sock.connect_ex((self._address, self._port))
        if code == errno.EINPROGRESS:
            code = sock.connect_ex((self._address, self._port))
            if code == errno.EALREADY:
                self._loop.add(sock.fileno(), WRITE, self._answered)
                return None
        if code in (0, errno.EISCONN):
            return Outcome.OPENED, ""
        self._close()
        if code == errno.EADDRNOTAVAIL:
            self._timer = self._loop.call_later(PORT_RETRY_S, self._again)
            return None
        return _outcome(OSError(code, ""))

    def cancel(self) -> None:
        """Give up; ``done`` is not called."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._close()

    def take(self) -> socket.socket:
        """The connected socket; the caller owns it now."""
        sock, self.sock = self.sock, None
        assert sock is not None
        return sock

    def is_silent(self) -> bool:
        """Whether the endpoint has been asked and has not answered."""
        if self.sock is None:
            return False
        return self.sock.connect_ex((self._address, self._port)) in (errno.EALREADY, errno.EINPROGRESS)

    @property
    def waits_for_a_port(self) -> bool:
        """Whether the attempt has not left this node yet, because no local port was free."""
        return self._timer is not None

    def _socket(self) -> socket.socket:
        sock = socket.socket(family_of(self._address), _STREAM)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._mark:
                mark_own(sock, FROM_CLIENT if self._client else OWN)
            if self._client:
                set_transparent(sock)
                defer_port(sock)
                sock.bind((self._client, 0))
        except OSError:
            sock.close()
            raise
        return sock

    def _again(self) -> None:
        self._timer = None
        known = self.start()
        if known is not None:
            self._done(self, *known)

    def _answered(self, _events: int) -> None:
        sock = self.sock
        assert sock is not None
        code = sock.connect_ex((self._address, self._port))
        if code in (errno.EALREADY, errno.EINPROGRESS):
            return
        if code in (0, errno.EISCONN):
            self._loop.remove(sock.fileno())
            self._done(self, Outcome.OPENED, "")
        else:
            self._close()
            self._done(self, *_outcome(OSError(code, "")))

    def _close(self) -> None:
        sock, self.sock = self.sock, None
        if sock is not None:
            self._loop.discard(sock)


def _outcome(error: OSError) -> tuple[Outcome, str]:
    code = error.errno or 0
    detail = errno.errorcode.get(code, str(code))
    if code in _EXHAUSTED:
        return Outcome.EXHAUSTED, detail
    if code in _ANSWERED:
        return Outcome.REFUSED, detail
    if code == errno.ETIMEDOUT:
        return Outcome.TIMED_OUT, detail
    return Outcome.NO_PATH, detail
