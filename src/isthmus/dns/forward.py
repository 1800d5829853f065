"""Names that are not ours: asked of the upstreams, each question once however many clients wait for it.

A question has ``timeout_s`` in all. Its attempts start at equal distances within that time, over the upstreams in turn,
and earlier ones stay open: the first good reply wins. So one dead upstream costs a part of the limit, and a slow one is
not cut off. Everything here is on the readiness loop; answers from the plan never wait for it.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from isthmus.dns import message
from isthmus.dns.answers import Answers, Forward
from isthmus.dns.attempt import Attempt
from isthmus.dns.cache import Cache, Key
from isthmus.dns.message import Malformed, Query, Rcode
from isthmus.dns.upstream_reply import AgingReply, UpstreamReply, render, render_behind
from isthmus.dns.upstreams import Upstream, Upstreams
from isthmus.loop.loop import Loop
from isthmus.model.settings import DnsSettings

MAX_QUESTIONS = 512  # asked at the same time
MAX_WAITERS = 4_096  # clients that wait for them
TICK_S = 0.025

Reply = Callable[[bytes], None]


@dataclass(slots=True)
class _Waiter:
    forward: Forward
    udp: bool
    reply: Reply


@dataclass(slots=True)
class _Question:
    """One question on its way. ``refusal`` is the best of the bad replies, given if no good one comes."""

    key: Key
    wire: bytes
    flags: int
    started_s: float
    plan: list[Upstream]
    step_s: float
    waiters: list[_Waiter] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    next_at_s: float = 0.0
    refusal: UpstreamReply | None = None


class Forwarder:
    """Asks the upstreams. ``is_probe`` says whether a name is a probe of ours that came back (dns/probe.py)."""

    def __init__(
        self,
        loop: Loop,
        answers: Answers,
        upstreams: Upstreams,
        settings: DnsSettings,
        is_probe: Callable[[Query], bool],
    ) -> None:
        self._loop, self._answers, self._upstreams, self._settings = loop, answers, upstreams, settings
        self._is_probe = is_probe
        self.cache = Cache(settings.cache_entries)
        self._counters: Counter[str] = answers.counters
        self._questions: dict[Key, _Question] = {}
        self._waiting = 0
        self._ticking = False

    def ask(self, forward: Forward, udp: bool, reply: Reply) -> None:
        """Answer from the cache, or ask; ``reply`` is called once, now or within the time limit."""
        query = forward.query
        if self._is_probe(query):
            reply(message.reply(query, Rcode.REFUSED, flags=0))
            return
        self._counters["forwarded"] += 1
        waiter = _Waiter(forward, udp, reply)
        labels = tuple(forward.follow.split(".")) if forward.follow else query.labels
        key = (labels, query.rtype, query.do, bool(query.flags & message.CD))
        kept = self.cache.get(key, time.monotonic())
        if kept is not None and kept.fresh:
            self._counters["cache_hits"] += 1
            self._give(waiter, kept.reply, kept.age_s)
            return
        servers = self._upstreams.in_order()
        if kept is not None and servers and all(one.resting for one in servers):
            self._counters["stale"] += 1  # they are probed: once one answers, this name is asked anew
            self._give(waiter, kept.reply, 0, stale=True)
            return
        self._join(key, waiter, servers)

    def close(self) -> None:
        """Give up every question; the clients retry elsewhere."""
        for question in self._questions.values():
            for attempt in question.attempts:
                attempt.close()
        self._questions.clear()

    def _join(self, key: Key, waiter: _Waiter, servers: list[Upstream]) -> None:
        question = self._questions.get(key)
        full = self._waiting >= MAX_WAITERS or (question is None and len(self._questions) >= MAX_QUESTIONS)
        if full or not servers:
            self._counters["overload" if full else "no_upstreams"] += 1
            self._give_last_resort(key, [waiter], None)
            return
        self._waiting += 1
        if question is not None:
            self._counters["coalesced"] += 1
            question.waiters.append(waiter)
            return
        self._start(key, waiter, servers)

    def _start(self, key: Key, waiter: _Waiter, servers: list[Upstream]) -> None:
        query = waiter.forward.query
        try:
            name = message.encode_name(waiter.forward.follow) if waiter.forward.follow else query.question[:-4]
        except Malformed:
            self._waiting -= 1
            self._give_last_resort(key, [waiter], None)
            return
        plan = servers * max(1, self._settings.attempts)
        question = _Question(
            key,
            name + query.question[-4:],
            message.RD | (query.flags & (message.CD | message.AD)),
            time.monotonic(),
            plan,
            self._settings.timeout_s / len(plan),
            [waiter],
        )
        self._questions[key] = question
        self._next_attempt(question)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK_S, self._tick)

    def _next_attempt(self, question: _Question) -> None:
        upstream = question.plan.pop(0)
        now_s = time.monotonic()
        question.next_at_s = now_s + question.step_s
        do = question.key[2]
        attempt = Attempt(
            self._loop, upstream, question.wire, question.flags, do, now_s, lambda *end: self._ended(question, *end)
        )
        question.attempts.append(attempt)
        attempt.start()

    def _ended(self, question: _Question, attempt: Attempt, reply: UpstreamReply | None, error: str) -> None:
        question.attempts.remove(attempt)
        upstream = attempt.upstream
        if reply is None:
            upstream.failures += not attempt.our_fault
            self._counters["exhausted" if attempt.our_fault else "upstream_errors"] += 1
        else:
            upstream.answered += 1
            upstream.failures = 0
            if reply.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
                self._finish(question, reply)
                return
            if reply.rcode in (Rcode.FORMERR, Rcode.NOTIMP, Rcode.BADVERS) and not upstream.plain:
                upstream.plain = True  # a server older than EDNS
                question.plan.insert(0, upstream)
            question.refusal = reply
        if question.plan:
            self._next_attempt(question)
        elif not question.attempts:
            self._finish(question, None)

    def _tick(self) -> None:
        now_s = time.monotonic()
        try:
            for question in list(self._questions.values()):
                if now_s - question.started_s >= self._settings.timeout_s:
                    self._finish(question, None)
                elif question.plan and now_s >= question.next_at_s:
                    self._next_attempt(question)
        finally:  # whatever happens to one question, the others must end in time
            self._ticking = bool(self._questions)
            if self._ticking:
                self._loop.call_later(TICK_S, self._tick)

    def _finish(self, question: _Question, reply: UpstreamReply | None) -> None:
        if self._questions.pop(question.key, None) is None:
            return
        now_s = time.monotonic()
        for attempt in question.attempts:
            if now_s - attempt.started_s >= question.step_s:
                attempt.upstream.failures += 1
            attempt.close()
        question.attempts.clear()
        self._waiting -= len(question.waiters)
        if reply is None:
            self._counters["upstreams_failed"] += 1
            self._give_last_resort(question.key, question.waiters, question.refusal)
            return
        self.cache.put(question.key, reply, now_s)
        for waiter in question.waiters:
            self._give(waiter, reply, 0)

    def _give_last_resort(self, key: Key, waiters: list[_Waiter], refusal: UpstreamReply | None) -> None:
        """No upstream helped: an expired entry is better than none (RFC 8767), else say so at once."""
        kept = self.cache.get(key, time.monotonic())
        for waiter in waiters:
            if kept is not None:
                self._counters["stale"] += 1
                self._give(waiter, kept.reply, 0, stale=True)
            elif refusal is not None:
                self._give(waiter, refusal, 0)
            else:
                waiter.reply(self._answers.fail(waiter.forward.query, udp=waiter.udp))

    def _give(self, waiter: _Waiter, upstream: UpstreamReply, age_s: int, *, stale: bool = False) -> None:
        query, alias = waiter.forward.query, waiter.forward.alias
        limit = query.limit if waiter.udp else None
        try:
            if alias:
                target = message.encode_name(waiter.forward.follow) + query.question[-4:]
                end = render(upstream, query._replace(question=target), age_s=age_s, stale=stale, limit=None)
                waiter.reply(render_behind(alias, end, query, limit=limit))
            else:
                reply = render(upstream, query, age_s=age_s, stale=stale, limit=limit)
                if age_s < upstream.lifetime_s and not stale and len(reply) <= query.limit and not reply[2] & 0x02:
                    aging = AgingReply(upstream, query, age_s, time.monotonic)
                    self._answers.remember(query, aging, waiter.forward.scopes)
                waiter.reply(reply)
        except Malformed:
            self._counters["upstream_malformed"] += 1
            waiter.reply(self._answers.fail(query, udp=waiter.udp))
