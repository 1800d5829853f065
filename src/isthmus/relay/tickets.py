"""Which two connections belong together: tickets, pairs, and the bounds on both. Pure: time and randomness come in.

A pair is issued (two tickets, one for each node), then half (one has come), then joined, then forgotten. A ticket is
used once; a pair that is not joined by its deadline is forgotten. A node takes part in at most ``pairs_per_node``.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

import msgspec

from isthmus.model.errors import IsthmusError
from isthmus.wire.ticket import TICKET_BYTES


class PairRefused(IsthmusError):
    """No ticket is issued, or a ticket is not good. ``reason_code`` is the counter it goes under."""

    code = "relay.refused"

    def __init__(self, reason_code: str, message: str) -> None:
        super().__init__(message)
        self.reason_code = reason_code


class Stage(StrEnum):
    """How far a pair has come."""

    ISSUED = "issued"
    HALF = "half"
    JOINED = "joined"


class Pair(msgspec.Struct):
    """One pair; ``asker`` is the TLS client. ``tickets`` are those not used yet, by node side ("asker", "peer")."""

    number: int
    asker: str
    peer: str
    deadline_s: float
    tickets: dict[str, bytes]
    stage: Stage = Stage.ISSUED

    def node(self, side: str) -> str:
        """The node on a side."""
        return self.asker if side == "asker" else self.peer


class Redeemed(msgspec.Struct, frozen=True):
    """A good ticket: half of ``pair`` has come."""

    pair: Pair
    side: str


class TicketBook:
    """All pairs that are not over."""

    def __init__(
        self, *, pairs_per_node: int, pairs: int, pairing_s: float, random_bytes: Callable[[int], bytes]
    ) -> None:
        self._pairs_per_node = pairs_per_node
        self._most_pairs = pairs
        self._pairing_s = pairing_s
        self._random_bytes = random_bytes
        self._pairs: dict[int, Pair] = {}
        self._tickets: dict[bytes, tuple[int, str]] = {}
        self._of_node: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int]] = []
        self._last = 0
        self.joined = 0  # how many pairs are joined

    @property
    def pending(self) -> int:
        """How many pairs wait for a half or both."""
        return len(self._pairs) - self.joined

    def streams_of(self, node: str) -> int:
        """In how many pairs a node takes part."""
        return self._of_node[node]

    def issue(self, asker: str, peer: str, now_s: float) -> Pair:
        """Two tickets for a new pair; raises PairRefused ("self", "streams", "full")."""
        if asker == peer:
            raise PairRefused("self", f"node {asker} asked for a connection to itself")
        for node in (asker, peer):
            if self._of_node[node] >= self._pairs_per_node:
                raise PairRefused("streams", f"node {node} has {self._pairs_per_node} connections here, the limit")
        if len(self._pairs) >= self._most_pairs:
            raise PairRefused("full", f"the relay joins {self._most_pairs} connections, its limit")
        self._last += 1
        tickets = {side: self._random_bytes(TICKET_BYTES) for side in ("asker", "peer")}
        pair = Pair(self._last, asker, peer, now_s + self._pairing_s, tickets)
        self._pairs[pair.number] = pair
        for side, ticket in tickets.items():
            self._tickets[ticket] = (pair.number, side)
        self._of_node.update((asker, peer))
        heapq.heappush(self._deadlines, (pair.deadline_s, pair.number))
        return pair

    def redeem(self, ticket: bytes, now_s: float) -> Redeemed:
        """Use a ticket; the pair becomes half or joined. Raises PairRefused ("unknown-ticket", "late-ticket")."""
        number, side = self._tickets.pop(ticket, (0, ""))
        pair = self._pairs.get(number)
        if pair is None:
            raise PairRefused("unknown-ticket", "the ticket is not known here: used, too late, or of another relay")
        if now_s > pair.deadline_s:
            self.forget(number)
            raise PairRefused("late-ticket", "the ticket came too late")
        del pair.tickets[side]
        pair.stage = Stage.HALF if pair.tickets else Stage.JOINED
        self.joined += not pair.tickets
        return Redeemed(pair, side)

    def forget(self, number: int) -> Pair | None:
        """A pair is over, for whatever reason; may be repeated."""
        pair = self._pairs.pop(number, None)
        if pair is None:
            return None
        self.joined -= pair.stage is Stage.JOINED
        for ticket in pair.tickets.values():
            self._tickets.pop(ticket, None)
        for node in (pair.asker, pair.peer):
            self._of_node[node] -= 1
            if not self._of_node[node]:
                del self._of_node[node]
        return pair

    def forget_node(self, node: str) -> list[Pair]:
        """All pairs of a node are over; returns them."""
        numbers = [pair.number for pair in self._pairs.values() if node in (pair.asker, pair.peer)]
        return [pair for number in numbers if (pair := self.forget(number)) is not None]

    def expire(self, now_s: float) -> list[Pair]:
        """Forget the pairs that were not joined in time; returns them."""
        late: list[Pair] = []
        while self._deadlines and self._deadlines[0][0] < now_s:
            _, number = heapq.heappop(self._deadlines)
            pair = self._pairs.get(number)
            if pair is not None and pair.stage is not Stage.JOINED:
                self.forget(number)
                late.append(pair)
        return late
