"""The asking side of enrolment: one TLS connection to the issuer, one question, one answer."""

import asyncio
import ssl
from collections.abc import Callable

from isthmus.model.errors import IsthmusError
from isthmus.wire import enrolment, identity
from isthmus.wire.enrolment import FromClient, FromIssuer, Greeting, IssuerReader
from isthmus.wire.identity import Certificate

DEADLINE_S = 10.0
CLOCK_TOLERANCE_S = 120.0
READ_BYTES = 65_536


class IssuerUnreachable(IsthmusError):
    """No answer from the issuer: not running, no route, or the connection broke. Worth another try."""

    code = "identity.issuer-unreachable"


class RefusedByIssuer(IsthmusError):
    """The issuer said no; ``reason_code`` is its code."""

    code = "identity.refused"

    def __init__(self, reason_code: str, message: str) -> None:
        super().__init__(message)
        self.reason_code = reason_code


class Answer:
    """The issuer's answer, with the authority that was proved and how far the clocks are apart."""

    def __init__(self, message: FromIssuer, authority: Certificate, clock_offset_s: float) -> None:
        self.message = message
        self.authority = authority
        self.clock_offset_s = clock_offset_s


def _context() -> ssl.SSLContext:
    """The handshake proves the issuer's key; whose key that is, ``enrolment.authenticate_issuer`` decides after it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([enrolment.ALPN])
    return context


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets; raises IsthmusError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65_536:
        raise IsthmusError(
            f"{address!r} is not HOST:PORT", hint="write an IPv6 address in brackets: [2001:db8::1]:20004"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


async def ask(
    address: str,
    authority_hash: bytes,
    question: FromClient,
    *,
    clock: Callable[[], float],
    deadline_s: float = DEADLINE_S,
) -> Answer:
    """Authenticate the issuer at ``address``, then ask. Raises IssuerUnreachable, RefusedByIssuer or IdentityError."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=_context(), server_hostname="isthmus")
            try:
                return await _converse(reader, writer, authority_hash, question, clock)
            finally:
                writer.transport.abort()
    except TimeoutError as error:
        raise IssuerUnreachable(f"the issuer at {address} did not answer within {deadline_s:.0f} s") from error
    except (OSError, EOFError) as error:
        raise IssuerUnreachable(
            f"the issuer at {address} cannot be reached: {error or 'the connection broke'}"
        ) from error


async def _converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    authority_hash: bytes,
    question: FromClient,
    clock: Callable[[], float],
) -> Answer:
    messages = IssuerReader()
    greeting = await _next(reader, messages)
    if not isinstance(greeting, Greeting):
        raise enrolment.EnrolmentError("the issuer did not introduce itself")
    tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
    leaf = tls.getpeercert(binary_form=True) or b""
    now_s = clock()
    authority = enrolment.authenticate_issuer(greeting, leaf, authority_hash, now_s=now_s)
    writer.write(enrolment.pack(question))
    await writer.drain()
    message = await _next(reader, messages)
    if isinstance(message, enrolment.Refused):
        raise RefusedByIssuer(message.code, message.reason)
    return Answer(message, authority, greeting.now_s - now_s)


async def _next(reader: asyncio.StreamReader, messages: IssuerReader) -> FromIssuer:
    while data := await reader.read(READ_BYTES):
        if found := messages.feed(data):
            return found[0]
    raise EOFError("the issuer closed the connection")


def issued_certificate(answer: Answer, holder: identity.Holder, *, now_s: float) -> Certificate:
    """The certificate in an answer, checked: from this authority, for us, valid now. Raises IdentityError."""
    if not isinstance(answer.message, enrolment.Issued):
        raise enrolment.EnrolmentError("the issuer answered another question")
    certificate = identity.load_certificate(answer.message.certificate)
    name = identity.verify(certificate, answer.authority, holder.role, now_s=now_s)
    if name != holder.name:
        raise identity.IdentityError(f"the issuer answered with the certificate of {holder.role} {name}")
    return certificate
