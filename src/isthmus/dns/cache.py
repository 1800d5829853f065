"""What the upstreams answered, kept for as long as they allowed, and longer for when none of them answers. Pure.

Least recently used entries go first. An expired entry stays as a stale one (RFC 8767) for a day at most.
"""

from collections import OrderedDict
from dataclasses import dataclass

from isthmus.dns.upstream_reply import UpstreamReply
from isthmus.plan.names import Labels

STALE_S = 86_400

Key = tuple[Labels, int, bool, bool]
"""Name, type, DO and CD: what changes an upstream's answer."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A cached reply as of now."""

    reply: UpstreamReply
    age_s: int
    fresh: bool


class Cache:
    """A bounded cache of replies; ``now_s`` is monotonic and comes from the caller."""

    def __init__(self, entries: int) -> None:
        self._limit = entries
        self._entries: OrderedDict[Key, tuple[float, UpstreamReply]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Key, reply: UpstreamReply, now_s: float) -> None:
        """Keep a reply if it may be kept."""
        if not reply.lifetime_s or not self._limit:
            return
        self._entries[key] = (now_s, reply)
        self._entries.move_to_end(key)
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def get(self, key: Key, now_s: float) -> Kept | None:
        """The entry, fresh or stale; None where there is none."""
        found = self._entries.get(key)
        if found is None:
            return None
        stored_s, reply = found
        age_s = int(now_s - stored_s)
        if age_s > reply.lifetime_s + STALE_S:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return Kept(reply, age_s, age_s < reply.lifetime_s)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
