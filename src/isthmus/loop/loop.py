"""One readiness loop: epoll, timers, and a way in for other threads.

Callbacks run on the loop's thread and must not block. A callback that raises is logged with its name and its descriptor
is removed and left to the callback's owner; the loop goes on, so that one bad connection never stops the others.
"""

import heapq
import os
import select
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Protocol

import structlog

from isthmus.loop.conduit import Conduit

log = structlog.get_logger(__name__)

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
BOTH = READ | WRITE
ERROR = select.EPOLLERR
GONE = select.EPOLLERR | select.EPOLLHUP
PEER_ENDED = select.EPOLLRDHUP

MAX_EVENTS = 256

Handler = Callable[[int], None]


class Closable(Protocol):
    """A socket, as far as ``Loop.discard`` is concerned."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Timer:
    """A pending call; ``cancel`` is cheap and may be repeated."""

    __slots__ = ("_call", "when_s")

    def __init__(self, when_s: float, call: Callable[[], None]) -> None:
        self.when_s = when_s
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class Loop:
    """A readiness loop. Only ``call_threadsafe`` and ``stop`` may be used from other threads."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._calls: deque[Callable[[], None]] = deque()
        self._bulk: deque[Callable[[], None]] = deque()
        self._closing: list[Closable] = []
        self._conduit: Conduit | None = None
        self._no_conduit = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = False
        self.now_s = time.monotonic()
        self.add(self._wake, READ, self._drain_wake)

    def add(self, fd: int, events: int, handler: Handler) -> None:
        """Watch ``fd``; ``handler(events)`` is called for readiness, error and hang-up."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Change what is watched; 0 leaves only error and hang-up."""
        self._epoll.modify(fd, events)

    def set_handler(self, fd: int, handler: Handler) -> None:
        """Hand a watched descriptor to another handler."""
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Stop watching; must come before the descriptor is closed. Unknown descriptors are ignored."""
        if self._handlers.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass

    def discard(self, sock: Closable) -> None:
        """Stop watching ``sock`` and close it after the events at hand; from the loop's thread only.

        Closing takes a descriptor out of epoll by itself, so this saves a call. Closing it later keeps its number from
        being given to a new connection while events of the old one still wait in this round.
        """
        self._handlers.pop(sock.fileno(), None)
        self._closing.append(sock)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Call once after ``delay_s``."""
        timer = Timer(time.monotonic() + delay_s, call)
        heapq.heappush(self._timers, (timer.when_s, next(self._order), timer))
        return timer

    def call_threadsafe(self, call: Callable[[], None]) -> None:
        """Call on the loop's thread, soon. From any thread."""
        self._calls.append(call)
        os.eventfd_write(self._wake, 1)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call after the events at hand. From the loop's thread only."""
        self._calls.append(call)

    @property
    def conduit(self) -> Conduit | None:
        """The loop's pipe for bulk, made at first use; None where the kernel gives none."""
        if self._conduit is None and not self._no_conduit:
            try:
                self._conduit = Conduit()
            except OSError as error:
                self._no_conduit = True
                log.info("no pipe for bulk, bytes are copied", reason=error.strerror)
        return self._conduit

    def call_behind(self, call: Callable[[], None]) -> None:
        """Call when nothing else is ready: one such call a round, so what is ready meanwhile waits for one at most.

        For turns that move much. From the loop's thread only.
        """
        self._bulk.append(call)

    def stop(self) -> None:
        """End ``run`` after the events at hand. From any thread, and from signal handlers."""
        self._running = False
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve until ``stop``."""
        self._running = True
        poll = self._epoll.poll
        handlers = self._handlers
        while self._running:
            for fd, events in poll(self._timeout_s(), MAX_EVENTS):
                handler = handlers.get(fd)
                if handler is None:  # removed by an earlier handler of this round
                    continue
                try:
                    handler(events)
                except Exception:
                    log.exception("handler failed", descriptor=fd, handler=getattr(handler, "__qualname__", "?"))
                    self.remove(fd)
            self.now_s = time.monotonic()
            if self._timers:
                self._fire_timers()
            if self._calls:
                self._run_calls()
            if self._bulk:
                self._guarded(self._bulk.popleft())
            if self._closing:
                self._close_discarded()
        self._close_discarded()

    def close(self) -> None:
        """Release the loop's own descriptors; watched ones belong to their owners."""
        self._close_discarded()
        if self._conduit is not None:
            self._conduit.close()
        self.remove(self._wake)
        os.close(self._wake)
        self._epoll.close()

    def _timeout_s(self) -> float:
        if self._calls or self._bulk:
            return 0.0
        if not self._timers:
            return 60.0
        return max(0.0, min(60.0, self._timers[0][0] - time.monotonic()))

    def _fire_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now_s:
            timer = heapq.heappop(self._timers)[2]
            self._guarded(timer.fire)

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            self._guarded(self._calls.popleft())

    def _close_discarded(self) -> None:
        closing, self._closing = self._closing, []
        for sock in closing:
            sock.close()

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("call failed", call=getattr(call, "__qualname__", "?"))

    def _drain_wake(self, _events: int) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass
