"""Finds loops, and upstreams that came back: asks each one for a random name that nobody else asks for.

If the question arrives at this server, that upstream sends our own questions back to us, be it ourselves or another
resolver that forwards here. If anything is answered, the upstream lives.
"""

import secrets
import time
from collections.abc import Callable

from isthmus.dns import message
from isthmus.dns.attempt import Attempt
from isthmus.dns.message import Query
from isthmus.dns.upstream_reply import UpstreamReply
from isthmus.dns.upstreams import Upstream, Upstreams
from isthmus.loop.loop import Loop
from isthmus.plan.names import RecordType

PERIOD_S = 30.0  # healthy upstreams: a loop may be configured later
RETRY_S = 2.0  # resting and looping ones
LIMIT_S = 1.5

Report = Callable[[str, str], None]


class Prober:
    """Probes every upstream; ``report(code, text)`` takes what a person should see, '' clears it; repeats are free."""

    def __init__(self, loop: Loop, upstreams: Upstreams, report: Report) -> None:
        self._loop, self._upstreams, self._report = loop, upstreams, report
        self._names: dict[tuple[str, ...], Upstream] = {}
        self._seen: set[Upstream] = set()  # whose probe came back in this round
        self._attempts: list[Attempt] = []
        self._next_full_s = 0.0

    def start(self) -> None:
        """Probe now and from now on."""
        self._round()

    def again(self) -> None:
        """The list of upstreams changed: probe all of them in the next round."""
        self._next_full_s = 0.0

    def is_probe(self, query: Query) -> bool:
        """Whether the question is our own probe; its upstream is then disabled."""
        upstream = self._names.get(query.labels)
        if upstream is None:
            return False
        upstream.looping = True
        self._seen.add(upstream)
        self.review()
        return True

    def review(self) -> None:
        """Report what the upstreams' states amount to."""
        every = self._upstreams.all
        looping = [str(one) for one in every if one.looping]
        resting = [str(one) for one in every if one.resting and not one.looping]
        self._report("dns.no-upstreams", "" if every else "no upstreams: other names are answered with SERVFAIL")
        text = f"{', '.join(looping)} sent our own question back: a forwarding loop; not asked" if looping else ""
        self._report("dns.upstream-loop", text)
        dead = every and len(looping) + len(resting) == len(every) and resting
        self._report("dns.upstreams-dead", f"no upstream answers: {', '.join(resting)}" if dead else "")

    def _round(self) -> None:
        for attempt in self._attempts:  # unanswered for a whole round
            attempt.upstream.failures += 1
            attempt.close()
        self._attempts.clear()
        self._names.clear()
        self._seen.clear()
        now_s = time.monotonic()
        full = now_s >= self._next_full_s
        if full:
            self._next_full_s = now_s + PERIOD_S
        for upstream in self._upstreams.all:
            if full or upstream.resting or upstream.looping:
                self._probe(upstream, now_s)
        self.review()
        self._loop.call_later(LIMIT_S if self._attempts else RETRY_S, self._round)

    def _probe(self, upstream: Upstream, now_s: float) -> None:
        name = f"{secrets.token_hex(8)}.{secrets.token_hex(8)}"
        self._names[tuple(name.split("."))] = upstream
        question = message.encode_name(name) + RecordType.TXT.to_bytes(2, "big") + b"\0\1"
        attempt = Attempt(self._loop, upstream, question, message.RD, False, now_s, self._ended)
        self._attempts.append(attempt)
        attempt.start()

    def _ended(self, attempt: Attempt, reply: UpstreamReply | None, _error: str) -> None:
        self._attempts.remove(attempt)
        if reply is None:
            attempt.upstream.failures += not attempt.our_fault
        else:
            attempt.upstream.failures = 0
            attempt.upstream.looping = attempt.upstream in self._seen
        self.review()
