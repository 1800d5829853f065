"""What an agent or relay and the issuer say to each other under ALPN ``isthmus-enrol/1``. Pure: bytes in, messages out.

The TLS connection carries no client certificate. The issuer speaks first and shows the authority's certificate; the
other side compares its hash with the token (or the certificate that it knows), checks that this authority issued the
issuer's TLS certificate to an issuer, and only then asks. One request a connection, one answer.
"""

from enum import StrEnum

import msgspec

from isthmus.model.errors import IsthmusError
from isthmus.wire import identity
from isthmus.wire.frames import FrameError, FrameReader, encode
from isthmus.wire.identity import Certificate, IdentityError, Role

ALPN = "isthmus-enrol/1"
RENEWAL_CONTEXT = b"isthmus renewal 1"
MAX_FROM_CLIENT_BYTES = 16_384
MAX_FROM_ISSUER_BYTES = 4 * 1024 * 1024 + 65_536


class EnrolmentError(IsthmusError):
    """The other side breaks the enrolment protocol."""

    code = "wire.enrolment"


class Greeting(msgspec.Struct, frozen=True, tag=True):
    """Issuer, first: the authority's certificate (DER), and the issuer's clock."""

    authority: bytes
    now_s: float


class Enrol(msgspec.Struct, frozen=True, tag=True):
    """Ask for the first certificate with a token's secret. The same key may ask again with the same token."""

    role: Role
    name: str
    secret: bytes
    request: bytes

    def __repr__(self) -> str:
        return f"Enrol(role={self.role!s}, name={self.name!r})"


class Renew(msgspec.Struct, frozen=True, tag=True):
    """Ask for the next certificate: the present one's key signs the new request."""

    role: Role
    name: str
    certificate: bytes
    request: bytes
    signature: bytes


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Ask for the revocation list if it is newer than ``number``."""

    number: int


class Issued(msgspec.Struct, frozen=True, tag=True):
    """The new certificate (DER) and the present revocation list."""

    certificate: bytes
    revocations: bytes


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """The revocation list; empty when there is none newer."""

    revocations: bytes


class RefusalCode(StrEnum):
    """Reasons on which the asking side acts; others are shown to a person."""

    REVOKED = "revoked"
    UNKNOWN_TOKEN = "unknown-token"  # noqa: S105 - a reason's name
    USED_TOKEN = "used-token"  # noqa: S105
    EXPIRED_TOKEN = "expired-token"  # noqa: S105
    WRONG_NODE = "wrong-node"
    TOO_LATE = "too-late"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The issuer's refusal: a code of RefusalCode and a sentence."""

    code: str
    reason: str


FromClient = Enrol | Renew | Fetch
FromIssuer = Greeting | Issued | Fetched | Refused

_encoder = msgspec.msgpack.Encoder()
_client_decoder = msgspec.msgpack.Decoder(FromClient)
_issuer_decoder = msgspec.msgpack.Decoder(FromIssuer)


def pack(message: FromClient | FromIssuer) -> bytes:
    """One message as a frame."""
    return encode(_encoder.encode(message))


class ClientReader:
    """The issuer's side: what a client sent."""

    def __init__(self) -> None:
        self._frames = FrameReader(MAX_FROM_CLIENT_BYTES)

    def feed(self, data: bytes) -> list[FromClient]:
        """Raises EnrolmentError for garbage."""
        try:
            return [_client_decoder.decode(frame) for frame in self._frames.feed(data)]
        except (msgspec.DecodeError, FrameError, RecursionError):
            raise EnrolmentError("not a message of the enrolment protocol") from None  # may hold a secret


class IssuerReader:
    """The client's side: what the issuer sent."""

    def __init__(self) -> None:
        self._frames = FrameReader(MAX_FROM_ISSUER_BYTES)

    def feed(self, data: bytes) -> list[FromIssuer]:
        """Raises EnrolmentError for garbage."""
        try:
            return [_issuer_decoder.decode(frame) for frame in self._frames.feed(data)]
        except (msgspec.DecodeError, FrameError, RecursionError) as error:
            raise EnrolmentError("the issuer's answer is not of the enrolment protocol") from error


def renewal(role: Role, name: str, certificate: Certificate, key: identity.Key, request: bytes) -> Renew:
    """A renewal, signed by the key of the present certificate."""
    signature = identity.sign(key, RENEWAL_CONTEXT, request)
    return Renew(role, name, identity.certificate_der(certificate), request, signature)


def check_renewal(message: Renew, authority: Certificate, *, now_s: float, grace_s: float) -> Certificate:
    """Return the present certificate of whoever asks; raises IdentityError.

    An expired certificate is accepted for ``grace_s`` longer: an issuer that was down must not lock nodes out. Whether
    it is revoked is the caller's to check.
    """
    certificate = identity.load_certificate(message.certificate)
    end_s = identity.expiry_s(certificate)
    if now_s > end_s + grace_s:
        raise identity.Expired(
            f"the certificate of {message.role} {message.name[:80]} expired more than {grace_s / 3600:.0f} h ago",
            hint="enrol again with a new token",
        )
    name = identity.verify(certificate, authority, message.role, now_s=min(now_s, end_s))
    if name != message.name:
        raise IdentityError(f"the certificate names {name}, not {message.name[:80]}")
    identity.check_signature(identity.public_key(certificate), RENEWAL_CONTEXT, message.request, message.signature)
    return certificate


def authenticate_issuer(greeting: Greeting, leaf: bytes, authority_hash: bytes, *, now_s: float) -> Certificate:
    """Return the authority's certificate if it is the one we were told of and the TLS peer is its issuer.

    ``leaf`` is the DER certificate that the TLS handshake proved; ``authority_hash`` the SHA-256 that a token or our
    own files hold. Raises IdentityError; nothing may be sent before.
    """
    authority = identity.load_certificate(greeting.authority)
    if identity.fingerprint(authority) != authority_hash.hex():
        raise IdentityError(
            "the issuer shows another authority than the token names",
            hint="the address leads to another cluster, or somebody is between; make a new token on the CA host",
        )
    identity.check_authority(authority)
    identity.verify(identity.load_certificate(leaf), authority, Role.ISSUER, now_s=now_s)
    return authority
