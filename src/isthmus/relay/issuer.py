"""The answering side of enrolment: greets, reads one question, asks the authority, answers, closes.

The authority's directory is read and written in a thread: it syncs to disk, and forwarding must not wait for that.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import structlog

from isthmus.files import StateNotWritten
from isthmus.model.errors import IsthmusError
from isthmus.relay.authority import Authority, NotIssued
from isthmus.wire import enrolment, identity, revocation
from isthmus.wire.enrolment import ClientReader, Enrol, Fetch, FromClient, FromIssuer, RefusalCode, Renew

log = structlog.get_logger(__name__)

QUESTION_DEADLINE_S = 10.0
READ_BYTES = 65_536
AT_ONCE = 8


class Issuer:
    """Serves enrolment connections of an authority."""

    def __init__(
        self,
        authority: Authority,
        *,
        life_s: float,
        grace_s: float = identity.GRACE_S,
        counters: Counter[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._authority = authority
        self._life_s = life_s
        self._grace_s = grace_s
        self._counters = counters
        self._clock = clock
        self._busy = asyncio.Semaphore(AT_ONCE)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, after its handshake."""
        greeting = enrolment.Greeting(identity.certificate_der(self._authority.certificate), self._clock())
        try:
            async with asyncio.timeout(QUESTION_DEADLINE_S):
                writer.write(enrolment.pack(greeting))
                question = await self._question(reader)
                if question is not None:
                    async with self._busy:
                        answer = await asyncio.to_thread(self._answer, question)
                    writer.write(enrolment.pack(answer))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except (OSError, TimeoutError):
            self._counters["enrolment-broken"] += 1
        finally:
            writer.transport.abort()

    async def _question(self, reader: asyncio.StreamReader) -> FromClient | None:
        messages = ClientReader()
        try:
            while data := await reader.read(READ_BYTES):
                if found := messages.feed(data):
                    return found[0]
        except enrolment.EnrolmentError:
            self._counters["enrolment-garbage"] += 1
        return None

    def _answer(self, question: FromClient) -> FromIssuer:
        try:
            return self._decide(question)
        except NotIssued as error:
            return self._refusal(question, error.reason_code, str(error))
        except StateNotWritten as error:
            log.error("issuer cannot write", error=str(error))
            return self._refusal(question, RefusalCode.UNAVAILABLE, "the issuer cannot write its records")
        except IsthmusError as error:
            return self._refusal(question, RefusalCode.INVALID, str(error))

    def _decide(self, question: FromClient) -> FromIssuer:
        now_s = self._clock()
        if isinstance(question, Fetch):
            signed = self._authority.revocations()
            known = revocation.open_list(signed, self._authority.certificate)
            return enrolment.Fetched(signed if known.number > question.number else b"")
        if isinstance(question, Enrol):
            certificate = self._authority.enrol(question, now_s=now_s, life_s=self._life_s)
        else:
            certificate = self._authority.renew(question, now_s=now_s, life_s=self._life_s, grace_s=self._grace_s)
        what = "enrolled" if isinstance(question, Enrol) else "renewed"
        self._counters[what] += 1
        log.info(what, role=str(question.role), name=question.name, serial=identity.serial_text(certificate))
        return enrolment.Issued(identity.certificate_der(certificate), self._authority.revocations())

    def _refusal(self, question: FromClient, code: RefusalCode, reason: str) -> FromIssuer:
        self._counters[f"enrolment-refused-{code}"] += 1
        if isinstance(question, Enrol | Renew):
            log.warning("not issued", role=str(question.role), name=question.name[:80], reason=code.value)
        return enrolment.Refused(code, reason)
