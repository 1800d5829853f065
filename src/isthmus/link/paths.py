"""Which paths to a peer are tried, and when. Pure: time comes in.

plan/paths.py ranks the paths; this book remembers how each one fared at first hand. The best path whose last try
succeeded is used alone. Without one, all are tried, staggered in rank order, with a head start for direct ones; the
first to come up serves, and a better one that comes up later takes over.
"""

from collections.abc import Sequence

import msgspec

from isthmus.link.limits import LinkLimits
from isthmus.wire.worker import PathSpec

DIRECT, REVERSE, RELAYED = "direct", "reverse", "relayed"


class PathRecord:
    """How one path fared."""

    __slots__ = ("error", "failures", "reported_s", "rest_until_s", "rtt_ms", "spec", "trying", "works")

    def __init__(self, spec: PathSpec) -> None:
        self.spec = spec
        self.works = False
        self.failures = 0
        self.rest_until_s = 0.0
        self.rtt_ms = 0.0
        self.error = ""
        self.trying = 0
        self.reported_s = float("-inf")


class Try(msgspec.Struct, frozen=True):
    """Dial ``spec`` after ``delay_s``."""

    delay_s: float
    spec: PathSpec


class PathBook:
    """The paths of one peer."""

    def __init__(self, limits: LinkLimits) -> None:
        self._limits = limits
        self._records: dict[PathSpec, PathRecord] = {}

    def put(self, paths: Sequence[PathSpec]) -> None:
        """Replace the ranked list; what is known of paths that stay is kept."""
        old = self._records
        self._records = {spec: old.get(spec) or PathRecord(spec) for spec in paths}

    def records(self) -> list[PathRecord]:
        """In rank order."""
        return list(self._records.values())

    def working(self) -> PathSpec | None:
        """The best path whose last try succeeded."""
        return next((record.spec for record in self._records.values() if record.works), None)

    def tries(self, now_s: float) -> list[Try]:
        """What to dial for a stream that waits now. Paths that failed a moment ago come last, but they do come."""
        working = self.working()
        if working is not None:
            return [Try(0.0, working)]
        rested = [record for record in self._records.values() if record.rest_until_s <= now_s]
        resting = [record for record in self._records.values() if record.rest_until_s > now_s]
        tries: list[Try] = []
        direct_s, other_s = 0.0, 0.0
        if any(record.spec.kind == DIRECT for record in rested):
            other_s = self._limits.head_start_s
        for record in rested or resting:
            if record.spec.kind == DIRECT:
                tries.append(Try(direct_s, record.spec))
                direct_s += self._limits.stagger_s
            else:
                tries.append(Try(other_s, record.spec))
                other_s += self._limits.stagger_s
        return sorted(tries, key=lambda item: item.delay_s)

    def better_to_retry(self, now_s: float) -> list[PathSpec]:
        """Paths better than the working one, not being tried, whose rest is over."""
        found: list[PathSpec] = []
        for record in self._records.values():
            if record.works:
                return found
            if record.rest_until_s <= now_s and not record.trying:
                found.append(record.spec)
        return []  # nothing works: a stream that waits tries everything, nothing is tried without one

    def succeeded(self, spec: PathSpec, rtt_ms: float) -> bool:
        """Note it; True where that is news."""
        record = self._records.get(spec)
        if record is None:
            return False
        news = not record.works
        record.works, record.failures, record.rest_until_s = True, 0, 0.0
        record.rtt_ms, record.error = rtt_ms, ""
        return news

    def failed(self, spec: PathSpec, error: str, now_s: float) -> None:
        """Note it, and let the path rest, twice as long each time."""
        record = self._records.get(spec)
        if record is None:
            return
        record.works, record.error = False, error
        rest_s = min(self._limits.retry_most_s, self._limits.retry_first_s * 2.0 ** min(record.failures, 16))
        record.failures += 1
        record.rest_until_s = now_s + rest_s

    def record(self, spec: PathSpec) -> PathRecord | None:
        return self._records.get(spec)

    def first_of(self, kind: str) -> PathSpec | None:
        """The best path of a kind."""
        return next((spec for spec in self._records if spec.kind == kind), None)

    def outranked(self, kind: str) -> bool:
        """Whether a connection over ``kind`` should not be used again: a path of a better kind works."""
        for spec, record in self._records.items():
            if spec.kind == kind:
                return False
            if record.works:
                return True
        return False
