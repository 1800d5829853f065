"""Keeps one identity valid: enrols with a token, renews at two thirds of its life, says what is wrong meanwhile.

Used by agents and by relays without an authority of their own. A renewal changes files and calls ``changed``; no
connection depends on it, because a certificate counts at the handshake. While the issuer is down the present
certificate goes on to be used; after its end, renewal is still tried, since the issuer forgives an expiry for days.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec
import structlog

from isthmus.model.errors import IsthmusError
from isthmus.relay import enrol
from isthmus.relay.keystore import KeyStore, Stored
from isthmus.wire import enrolment, identity, revocation
from isthmus.wire import token as tokens
from isthmus.wire.enrolment import RefusalCode
from isthmus.wire.identity import Holder

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.2
LAST_RETRY_S = 5.0
REFUSED_RETRY_S = 5.0
POLL_REVOCATIONS_S = 20.0
JITTER = 0.05  # of the life, so that nodes that enrolled together do not renew together

FINAL = frozenset({RefusalCode.REVOKED, RefusalCode.TOO_LATE})
TOKEN_IS_NO_GOOD = frozenset(
    {RefusalCode.UNKNOWN_TOKEN, RefusalCode.USED_TOKEN, RefusalCode.EXPIRED_TOKEN, RefusalCode.WRONG_NODE}
)


class State(StrEnum):
    """What ``status`` says of an identity."""

    NONE = "none"
    ENROLLING = "enrolling"
    VALID = "valid"
    EXPIRED = "expired"
    REVOKED = "revoked"


class Snapshot(msgspec.Struct, frozen=True):
    """An identity's state for a reader; ``error`` is the last failure, '' when all is well."""

    state: State
    serial: str = ""
    expires_s: float = 0.0
    renews_s: float = 0.0
    issuer: str = ""
    error: str = ""
    clock_offset_s: float = 0.0


class Credentials:
    """An identity that is kept. ``stored`` is usable at any time once it is set; ``changed`` tells of a new one."""

    def __init__(
        self,
        store: KeyStore,
        holder: Holder,
        *,
        issuers: Sequence[str],
        token: Callable[[], str],
        changed: Callable[[Stored], None],
        revoked: Callable[[bytes], None] = lambda _signed: None,
        poll_revocations: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        """``token`` is asked whenever one is needed ('' for none). ``issuers`` are HOST:PORT, tried in turn.

        ``revoked`` gets each newer signed revocation list that came from the issuer.
        """
        self._store = store
        self._holder = holder
        self._issuers = list(issuers)
        self._token = token
        self._changed = changed
        self._revoked_list = revoked
        self._poll = poll_revocations
        self._clock = clock
        self._rng = rng or random.Random()
        self._wake = asyncio.Event()
        self._failures = 0
        self._error = ""
        self._issuer = ""
        self._clock_offset_s = 0.0
        self._refused = False
        self._refused_token = ""
        self._list_number = 0
        self._polled_s = 0.0
        self._jitter = self._rng.uniform(0, JITTER)
        self.stored: Stored | None = None

    def load(self) -> Stored | None:
        """Read what is on disk; before ``run``, so that a restart serves at once."""
        self._store.prepare()
        self.stored = self._store.current()
        if self.stored is not None and (signed := self._store.revocations()):
            self.adopt_revocations(signed)
        return self.stored

    def snapshot(self) -> Snapshot:
        """The state now."""
        stored = self.stored
        if stored is None:
            state = State.ENROLLING if self._current_token() else State.NONE
            return Snapshot(state, issuer=self._issuer, error=self._error, clock_offset_s=self._clock_offset_s)
        expires_s = identity.expiry_s(stored.certificate)
        if self._refused:
            state = State.REVOKED
        else:
            state = State.EXPIRED if self._clock() > expires_s else State.VALID
        return Snapshot(
            state,
            stored.serial,
            expires_s,
            self._renewal_s(stored),
            self._issuer,
            self._error,
            self._clock_offset_s,
        )

    def adopt_revocations(self, signed: bytes) -> bool:
        """Take a signed list from anywhere; returns whether it is newer. Notices our own revocation."""
        if self.stored is None:
            return False
        opened = revocation.open_list(signed, self.stored.authority)
        if opened.number <= self._list_number and self._list_number:
            return False
        self._list_number = opened.number
        self._keep(signed)
        if self.stored.serial in opened.serials and not self._refused:
            self._refused = True
            self._error = f"{self._holder} is revoked; enrol it again with a new token"
            log.warning("identity revoked", holder=str(self._holder))
            self._wake.set()
        return True

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the identity until ``stop``. Never raises for a fault of network, issuer or disk: it tries again."""
        stopping = asyncio.create_task(stop.wait(), name="identity-stop")
        stopping.add_done_callback(lambda _task: self._wake.set())
        try:
            while not stop.is_set():
                self._wake.clear()
                if self._due() and not stop.is_set():
                    await self._attempt()
                elif self._poll_due():
                    await self._fetch_revocations()
                await self._sleep(self._pause_s())
        finally:
            stopping.cancel()

    def _due(self) -> bool:
        if self.stored is None or self._refused:
            return bool(self._current_token())
        return self._clock() >= self._renewal_s(self.stored)

    def _renewal_s(self, stored: Stored) -> float:
        _, life_s = identity.life_of(stored.certificate)
        return identity.renewal_time_s(stored.certificate) + life_s * self._jitter

    def _poll_due(self) -> bool:
        waited = time.monotonic() - self._polled_s >= POLL_REVOCATIONS_S
        return self.stored is not None and waited and bool(self._issuers) and self._poll()

    def _pause_s(self) -> float:
        if self.stored is None or self._refused:
            usable = bool(self._current_token())
            return self._backoff_s() if usable else min(REFUSED_RETRY_S, 1.0)
        until_s = self._renewal_s(self.stored) - self._clock()
        if until_s <= 0:
            return self._backoff_s()
        return max(0.05, min(until_s, POLL_REVOCATIONS_S / 4))

    def _backoff_s(self) -> float:
        if not self._failures:
            return 0.05
        base_s = min(LAST_RETRY_S, FIRST_RETRY_S * 1.6 ** (self._failures - 1))
        return base_s * self._rng.uniform(0.7, 1.3)

    async def _sleep(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _attempt(self) -> None:
        try:
            if self.stored is None or self._refused:
                await self._enrol()
            else:
                await self._renew(self.stored)
        except enrol.RefusedByIssuer as error:
            self._note_refusal(error)
        except IsthmusError as error:
            self._note_failure(str(error))

    async def _enrol(self) -> None:
        text = self._current_token()
        token = tokens.decode(text)
        if token.holder != self._holder:
            raise tokens.TokenError(
                f"the token is for {token.holder}, this is {self._holder}", hint="make another token"
            )
        key = self._store.pending_key()
        question = enrolment.Enrol(token.role, token.name, token.secret, identity.new_request(key))
        addresses = [token.address] if token.address else self._issuers
        try:
            answer = await self._ask_any(addresses, token.authority, question)
        except enrol.RefusedByIssuer as error:
            if error.reason_code in TOKEN_IS_NO_GOOD:
                self._refused_token = _digest(text)
            raise
        self._install(answer)
        log.info("identity enrolled", holder=str(self._holder), issuer=self._issuer)

    async def _renew(self, stored: Stored) -> None:
        key = self._store.pending_key()
        question = enrolment.renewal(
            self._holder.role, self._holder.name, stored.certificate, stored.key, identity.new_request(key)
        )
        known = bytes.fromhex(identity.fingerprint(stored.authority))
        answer = await self._ask_any(self._issuers, known, question)
        self._install(answer)
        log.info("identity renewed", holder=str(self._holder), issuer=self._issuer)

    async def _fetch_revocations(self) -> None:
        assert self.stored is not None
        self._polled_s = time.monotonic()
        known = bytes.fromhex(identity.fingerprint(self.stored.authority))
        try:
            answer = await self._ask_any(self._issuers, known, enrolment.Fetch(self._list_number))
        except IsthmusError as error:
            log.info("revocations not fetched", error=str(error))
            return
        if isinstance(answer.message, enrolment.Fetched) and answer.message.revocations:
            self._hand_on(answer.message.revocations)

    async def _ask_any(self, addresses: Sequence[str], known: bytes, question: enrolment.FromClient) -> enrol.Answer:
        if not addresses:
            raise enrol.IssuerUnreachable(
                "no issuer is known", hint="set `issuer` or a relay, or put it into the token"
            )
        failures: list[IsthmusError] = []
        for address in addresses:
            try:
                answer = await enrol.ask(address, known, question, clock=self._clock)
            except enrol.RefusedByIssuer as error:
                if error.reason_code != RefusalCode.UNAVAILABLE:
                    raise
                failures.append(error)
            except IsthmusError as error:
                failures.append(error)
            else:
                self._issuer = address
                self._clock_offset_s = answer.clock_offset_s
                return answer
        raise failures[0]

    def _install(self, answer: enrol.Answer) -> None:
        certificate = enrol.issued_certificate(answer, self._holder, now_s=self._clock())
        self.stored = self._store.install(certificate, answer.authority)
        self._failures, self._error, self._refused, self._refused_token = 0, "", False, ""
        self._jitter = self._rng.uniform(0, JITTER)
        self._changed(self.stored)
        assert isinstance(answer.message, enrolment.Issued)
        if answer.message.revocations:
            self._hand_on(answer.message.revocations)

    def _hand_on(self, signed: bytes) -> None:
        try:
            if self.adopt_revocations(signed):
                self._revoked_list(signed)
        except IsthmusError as error:
            self._note_failure(str(error))

    def _keep(self, signed: bytes) -> None:
        """On disk for the next start; a full disk must not keep the list from being obeyed now."""
        try:
            if signed != self._store.revocations():
                self._store.keep_revocations(signed)
        except IsthmusError as error:
            log.error("revocation list not kept", error=str(error))

    def _note_refusal(self, error: enrol.RefusedByIssuer) -> None:
        if self.stored is not None and error.reason_code in FINAL:
            self._refused = True
        self._note_failure(error.message)

    def _note_failure(self, text: str) -> None:
        self._failures += 1
        if text != self._error:
            log.warning("identity not renewed" if self.stored else "identity not enrolled", error=text)
        self._error = text

    def _current_token(self) -> str:
        """The configured token, unless the issuer has refused exactly that one: then a new one is waited for."""
        text = self._token().strip()
        return text if text and _digest(text) != self._refused_token else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()
