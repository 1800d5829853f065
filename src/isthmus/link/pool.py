"""The connections to one peer: idle ones kept ready, streams that wait, and how many more are made.

A stream takes the idle connection used last. Without one it waits, and connections are made, a bounded number at a
time. A connection found dead at OPEN, before anything can have reached the endpoint, is replaced once, silently.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import socket

from isthmus.link.connection import Connection, Opening, Owner
from isthmus.link.limits import LinkLimits
from isthmus.loop.loop import Loop
from isthmus.model.ports import Outcome, StreamRequest

Opened = Callable[[Outcome, str], None]
Ended = Callable[[int, int], None]


@dataclass(slots=True, eq=False)
class Wish:
    """A stream on its way to being opened."""

    request: StreamRequest
    client: socket | None
    opened: Opened
    ended: Ended
    until_s: float
    taker: Callable[[Connection], None] | None = None  # takes the connection itself, instead of a stream on it
    retries: int = 1
    connection: Connection | None = field(default=None)
    cancelled: bool = False


class Pool(Owner):
    """The opener's connections to ``node``. ``grow(n)`` asks the holder for ``n`` more connections."""

    def __init__(
        self,
        node: str,
        loop: Loop,
        limits: LinkLimits,
        dialling: Callable[[], int],
        grow: Callable[[int], None],
        outranked: Callable[[str], bool],
    ) -> None:
        self.node = node
        self._loop = loop
        self._limits = limits
        self._dialling = dialling
        self._grow = grow
        self._outranked = outranked
        self._idle: list[Connection] = []
        self._all: dict[Connection, None] = {}
        self._opening: dict[Connection, Wish] = {}
        self._waiting: deque[Wish] = deque()
        self.used_s = float("-inf")
        self.counters: dict[str, int] = dict.fromkeys(
            ("streams", "stale-replaced", "wait-timeouts", "wait-overflows", "connections", "lost"), 0
        )

    # Streams.

    def want(self, wish: Wish) -> None:
        """Open the stream now or when a connection is there."""
        self.used_s = self._loop.now_s
        connection = self._take_idle()
        if connection is not None:
            self._give(connection, wish)
            return
        if len(self._waiting) >= self._limits.waiting_most:
            self.counters["wait-overflows"] += 1
            wish.opened(Outcome.EXHAUSTED, f"{len(self._waiting)} streams wait for a connection to {self.node}")
            return
        self._waiting.append(wish)
        self.grow_if_needed()

    def cancel(self, wish: Wish) -> None:
        """The caller gave up; its client socket is not touched."""
        wish.cancelled = True
        if wish.connection is not None:
            wish.connection.abandon()
        else:
            try:
                self._waiting.remove(wish)
            except ValueError:
                pass

    def fail_waiting(self, outcome: Outcome, detail: str) -> None:
        """No path: tell all that wait."""
        waiting, self._waiting = self._waiting, deque()
        for wish in waiting:
            wish.opened(outcome, detail)

    # Connections.

    def add(self, connection: Connection) -> None:
        """A new connection, ready to carry."""
        self.counters["connections"] += 1
        self._all[connection] = None
        connection.owner = self
        self._now_idle(connection)

    def grow_if_needed(self) -> None:
        """Ask for as many connections as streams wait for, and for a few ready ones while the peer is in use."""
        in_use = self._loop.now_s - self.used_s < self._limits.idle_s
        dialling = self._dialling()
        lacking = len(self._waiting) + (self._limits.warm if in_use else 0) - len(self._idle) - dialling
        room = min(self._limits.per_peer - len(self._all), self._limits.dialling_most) - dialling
        if min(lacking, room) > 0:
            self._grow(min(lacking, room))

    def sweep(self, now_s: float) -> None:
        """Every quarter of a second: time limits of streams and of idle connections."""
        limits = self._limits
        while self._waiting and self._waiting[0].until_s <= now_s:
            self.counters["wait-timeouts"] += 1
            self._waiting.popleft().opened(Outcome.NO_PATH, f"no connection to {self.node} within {limits.wait_s:g} s")
        for connection, wish in list(self._opening.items()):
            self._check_opening(connection, wish, now_s)
        kept = self._limits.warm if now_s - self.used_s < limits.idle_s else 0
        for connection in self._idle[: max(0, len(self._idle) - kept)]:
            if now_s - connection.idle_since_s > limits.idle_s:
                connection.close("idle")

    def close(self, reason: str) -> None:
        """The peer is gone."""
        self.fail_waiting(Outcome.NO_PATH, reason)
        for connection in list(self._all):
            connection.close(reason)

    def close_outranked(self) -> None:
        """A better path works: idle connections over worse ones are closed; busy ones when their stream is over."""
        for connection in list(self._idle):
            if self._outranked(connection.path.kind):
                connection.close("a better path works")

    def close_where(self, condition: Callable[[Connection], bool], reason: str) -> None:
        for connection in list(self._all):
            if condition(connection):
                connection.close(reason)

    @property
    def connections(self) -> list[Connection]:
        return list(self._all)

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    # As the owner of connections.

    def idle(self, connection: Connection) -> None:
        self._opening.pop(connection, None)
        self._now_idle(connection)

    def lost(self, connection: Connection, reason: str) -> None:
        self.counters["lost"] += 1
        self._all.pop(connection, None)
        self._opening.pop(connection, None)
        if connection in self._idle:
            self._idle.remove(connection)

    def stale(self, connection: Connection, opening: Opening) -> None:
        wish = self._opening.pop(connection, None)
        if wish is None or wish.cancelled:
            return
        wish.connection = None
        if wish.retries <= 0:
            wish.opened(Outcome.NO_PATH, f"connections to {self.node} end while a stream is opened")
            return
        wish.retries -= 1
        self.counters["stale-replaced"] += 1
        self._loop.call_soon(lambda: None if wish.cancelled else self._again(wish))

    # Inside.

    def _again(self, wish: Wish) -> None:
        """After a dead connection the others are doubted too: only one that answered a moment ago, or a new one."""
        for connection in list(self._idle):
            if connection.idle_since_s < self._loop.now_s - 1.0:
                connection.close("another connection to the same peer was dead")
        self.want(wish)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.gone:
                return connection
        return None

    def _give(self, connection: Connection, wish: Wish) -> None:
        if wish.taker is not None:
            del self._all[connection]
            wish.taker(connection)
            return
        assert wish.client is not None
        self.counters["streams"] += 1
        wish.connection = connection
        self._opening[connection] = wish

        def opened(outcome: Outcome, detail: str) -> None:
            if self._opening.get(connection) is wish:
                del self._opening[connection]
            wish.connection = None
            wish.opened(outcome, detail)

        connection.open(wish.request, wish.client, opened, wish.ended)

    def _now_idle(self, connection: Connection) -> None:
        if connection.gone:
            return
        if self._waiting:
            self._give(connection, self._waiting.popleft())
        elif self._spent(connection):
            connection.close("not to be used again")
        else:
            self._idle.append(connection)

    def _spent(self, connection: Connection) -> bool:
        limits = self._limits
        return (
            len(self._idle) >= limits.idle_most
            or self._loop.now_s - connection.created_s > limits.age_s
            or connection.sent_bytes + connection.received_bytes > limits.reuse_bytes
            or self._outranked(connection.path.kind)
        )

    def _check_opening(self, connection: Connection, wish: Wish, now_s: float) -> None:
        since_s = connection.opening_since_s
        if since_s is None:
            return
        if now_s - since_s > self._limits.unanswered_s and connection.unacknowledged:
            connection.close("what we send is not acknowledged")  # comes back as stale()
        elif now_s - since_s > self._limits.open_s:
            wish.connection = None
            connection.abandon()
            wish.opened(Outcome.TIMED_OUT, f"{self.node} did not answer within {self._limits.open_s:g} s")
