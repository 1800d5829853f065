"""Tokens by which a node or relay enrols: one line for copying. Pure.

``isthmus1.`` and base64url of a MessagePack array: role, name, secret, SHA-256 of the authority's certificate, address
of the issuer ('' where the setting ``issuer`` names it). The hash lets the agent authenticate the issuer before it
sends anything; the authority keeps only a hash of the secret.
"""

import base64
import binascii
import hashlib
import hmac

import msgspec

from isthmus.model.errors import IsthmusError
from isthmus.wire.identity import Holder, Role, check_name

PREFIX = "isthmus1."
SECRET_BYTES = 32
MAX_TOKEN_CHARS = 1_024
MAX_ADDRESS_CHARS = 262


class TokenError(IsthmusError):
    """The text is not a token of ours; the message never quotes it."""

    code = "identity.token"


class Token(msgspec.Struct, frozen=True, array_like=True):
    """What a token says. Its ``repr`` keeps the secret out of logs."""

    role: Role
    name: str
    secret: bytes
    authority: bytes
    address: str = ""

    def __repr__(self) -> str:
        return f"Token(role={self.role!s}, name={self.name!r}, address={self.address!r})"

    @property
    def holder(self) -> Holder:
        """Whom the token enrols."""
        return Holder(self.role, self.name)


def encode(token: Token) -> str:
    """The token as one line."""
    return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(token)).rstrip(b"=").decode("ascii")


def decode(text: str) -> Token:
    """Parse a token; white space around it is ignored. Raises TokenError."""
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARS:
        raise TokenError("not an enrolment token", hint="make one with `isthmus token create`")
    body = text[len(PREFIX) :]
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        token = msgspec.msgpack.decode(raw, type=Token)
        check_name(token.name)
    except (binascii.Error, ValueError, msgspec.DecodeError, IsthmusError):
        # The cause may quote the input, and with it the secret: it is not chained.
        raise TokenError("the enrolment token is damaged", hint="copy it again, as one line") from None
    if len(token.secret) != SECRET_BYTES or len(token.authority) != 32 or len(token.address) > MAX_ADDRESS_CHARS:
        raise TokenError("the enrolment token is damaged", hint="copy it again, as one line")
    return token


def secret_hash(secret: bytes) -> str:
    """What the authority keeps. The secret has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(b"isthmus token\0" + secret).hexdigest()


def secret_matches(secret: bytes, kept_hash: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(secret_hash(secret), kept_hash)
