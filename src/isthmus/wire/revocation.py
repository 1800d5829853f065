"""The list of revoked certificates: signed by the authority, numbered, carried by anyone. Pure.

A serial stays on the list until its certificate could no longer be renewed, so the list stays short. A list with a
smaller number than the one that is known is ignored.
"""

import msgspec

from isthmus.wire import identity
from isthmus.wire.identity import Holder, IdentityError

CONTEXT = b"isthmus revocations 1"
MAX_ENTRIES = 20_000
MAX_LIST_BYTES = 4 * 1024 * 1024


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One revoked certificate; ``until_s`` is when the entry may be forgotten."""

    serial: str
    holder: Holder
    until_s: float


class RevocationList(msgspec.Struct, frozen=True, array_like=True):
    """What the authority signs."""

    number: int = 0
    issued_s: float = 0.0
    entries: tuple[Entry, ...] = ()

    @property
    def serials(self) -> frozenset[str]:
        """The revoked serial numbers."""
        return frozenset(entry.serial for entry in self.entries)


class SignedList(msgspec.Struct, frozen=True, array_like=True):
    """A list on the wire and in files."""

    payload: bytes
    signature: bytes


_encoder = msgspec.msgpack.Encoder()
_list_decoder = msgspec.msgpack.Decoder(RevocationList)
_signed_decoder = msgspec.msgpack.Decoder(SignedList)


def seal(revocations: RevocationList, authority_key: identity.Key) -> bytes:
    """Sign a list."""
    payload = _encoder.encode(revocations)
    return _encoder.encode(SignedList(payload, identity.sign(authority_key, CONTEXT, payload)))


def open_list(data: bytes, authority: identity.Certificate) -> RevocationList:
    """Check the authority's signature and parse; raises IdentityError."""
    if len(data) > MAX_LIST_BYTES:
        raise IdentityError(f"a revocation list of {len(data)} bytes; the limit is {MAX_LIST_BYTES}")
    try:
        signed = _signed_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise IdentityError("not a revocation list") from error
    identity.check_signature(identity.public_key(authority), CONTEXT, signed.payload, signed.signature)
    try:
        revocations = _list_decoder.decode(signed.payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise IdentityError("not a revocation list, though signed by the authority") from error
    if len(revocations.entries) > MAX_ENTRIES:
        raise IdentityError(f"a revocation list of {len(revocations.entries)} entries; the limit is {MAX_ENTRIES}")
    return revocations
