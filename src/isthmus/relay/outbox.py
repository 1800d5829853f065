"""What has still to be sent to one node. Pure.

State (announcements, presence, revocations) is kept as "what changed", not as messages: a node that reads slowly gets
the newest state later, and its outbox stays small. Only answers are queued, and those are bounded in bytes.
"""

from collections import deque

from isthmus.wire import announcement, control
from isthmus.wire.registry import Registry


class Outbox:
    """The queue of one control channel."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._answers: deque[bytes] = deque()
        self._answers_bytes = 0
        self._changed: dict[str, None] = {}
        self._present: dict[str, bool] = {}
        self._complete: tuple[str, ...] | None = None
        self._revocations = False

    def put(self, message: control.FromRelay) -> bool:
        """Queue an answer; False when more waits than the limit allows: the node does not read."""
        data = control.pack(message)
        self._answers.append(data)
        self._answers_bytes += len(data)
        return self._answers_bytes <= self._limit_bytes

    def mark(self, node: str) -> None:
        """A node's announcement changed."""
        self._changed[node] = None

    def mark_presence(self, node: str, here: bool) -> None:
        """A node came or went."""
        self._present[node] = here

    def mark_everything(self, registry: Registry, present: tuple[str, ...], own: str) -> None:
        """A new channel: it gets all announcements and who is here."""
        self._complete = present
        self._changed.update((node, None) for node in registry.nodes if node != own)

    def mark_revocations(self) -> None:
        """The revocation list changed."""
        self._revocations = True

    def take(self, registry: Registry) -> bytes:
        """The next bytes to send, b"" when nothing waits; at most one batch of announcements at a time."""
        if self._answers:
            return self.take_answers()
        if self._revocations:
            self._revocations = False
            return control.pack(control.Revocations(registry.signed_revocations))
        if self._complete is not None:
            present, self._complete = self._complete, None
            return control.pack(control.Presence(present=present, complete=True))
        if self._changed:
            return self._take_announcements(registry)
        if self._present:
            here = tuple(node for node, is_here in self._present.items() if is_here)
            gone = tuple(node for node, is_here in self._present.items() if not is_here)
            self._present.clear()
            return control.pack(control.Presence(present=here, absent=gone))
        return b""

    def take_answers(self) -> bytes:
        """All answers that wait."""
        data = b"".join(self._answers)
        self._answers.clear()
        self._answers_bytes = 0
        return data

    def _take_announcements(self, registry: Registry) -> bytes:
        signed: list[bytes] = []
        while self._changed and len(signed) < control.MAX_BATCH:
            node = next(iter(self._changed))
            del self._changed[node]
            known = registry.nodes.get(node)
            if known is not None:
                signed.append(known.signed)
        assert all(len(one) <= announcement.MAX_BYTES for one in signed)
        return control.pack(control.Announcements(tuple(signed))) if signed else self.take(registry)
