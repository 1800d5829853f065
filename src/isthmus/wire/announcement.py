"""A node's announcement of itself: how it is reached and what is behind it, signed with its certificate's key. Pure.

Anyone may carry it; only the node can have made it. ``sequence`` grows with every announcement of a node, so an old one
cannot be played back over a newer one.
"""

import ipaddress
from collections.abc import Callable, Sequence

import msgspec

from isthmus.wire import identity
from isthmus.wire.identity import Certificate, IdentityError, Role

CONTEXT = b"isthmus announcement 1"
MAX_BYTES = 16_384
MAX_ADDRESSES = 16
MAX_RANGES = 64
MAX_KEYS = 8
MAX_SPIS = 64
MAX_TEXT = 253
MAX_KEY_BYTES = 256
SHORTEST_PREFIX = {4: 8, 6: 16}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AnnouncementError(IdentityError):
    """An announcement that is not accepted; the message says why."""

    code = "identity.announcement"


class Stale(AnnouncementError):
    """Not newer than what is known of the node."""

    code = "identity.announcement-stale"


class Announcement(msgspec.Struct, frozen=True):
    """What a node says of itself. ``addresses`` are HOST:PORT of its link port, IPv6 hosts in brackets."""

    node: str
    sequence: int
    issued_s: float
    site: str = ""
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    boot_id: str = ""
    keys: dict[str, bytes] = {}
    spis: tuple[int, ...] = ()


class SignedAnnouncement(msgspec.Struct, frozen=True, array_like=True):
    """An announcement on the wire: the payload, the node's certificate (DER), the signature by its key."""

    payload: bytes
    certificate: bytes
    signature: bytes


_encoder = msgspec.msgpack.Encoder()
_signed_decoder = msgspec.msgpack.Decoder(SignedAnnouncement)
_decoder = msgspec.msgpack.Decoder(Announcement)


def seal(announcement: Announcement, certificate: Certificate, key: identity.Key) -> bytes:
    """Sign an announcement."""
    payload = _encoder.encode(announcement)
    signature = identity.sign(key, CONTEXT, payload)
    return _encoder.encode(SignedAnnouncement(payload, identity.certificate_der(certificate), signature))


def open_announcement(
    data: bytes,
    authority: Certificate,
    *,
    now_s: float,
    is_revoked: Callable[[str], bool],
    service_ranges: Sequence[Network] = (),
    known: Announcement | None = None,
) -> Announcement:
    """Return the announcement if everything about it holds; raises AnnouncementError, Stale or IdentityError.

    ``is_revoked`` tells of a serial number in hexadecimal. ``known`` is the node's last accepted announcement, if any.
    """
    if len(data) > MAX_BYTES:
        raise AnnouncementError(f"an announcement of {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        signed = _signed_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AnnouncementError("not an announcement") from error
    certificate = identity.load_certificate(signed.certificate)
    name = identity.verify(certificate, authority, Role.NODE, now_s=now_s)
    if is_revoked(identity.serial_text(certificate)):
        raise AnnouncementError(f"the certificate of node {name} is revoked")
    identity.check_signature(identity.public_key(certificate), CONTEXT, signed.payload, signed.signature)
    try:
        announcement = _decoder.decode(signed.payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AnnouncementError(f"what node {name} signed is not an announcement") from error
    if announcement.node != name:
        raise AnnouncementError(f"node {name} announced itself as {announcement.node[:80]!r}")
    check_content(announcement, service_ranges)
    if known is not None and known.node == name and announcement.sequence <= known.sequence:
        raise Stale(f"announcement {announcement.sequence} of node {name} is not newer than {known.sequence}")
    return announcement


def certificate_of(data: bytes) -> Certificate:
    """The certificate that an announcement carries; for announcements that were accepted before."""
    return identity.load_certificate(_signed_decoder.decode(data).certificate)


def check_content(announcement: Announcement, service_ranges: Sequence[Network] = ()) -> None:
    """Raise AnnouncementError unless every field is bounded and sane. The agent checks its own before it signs."""
    node = announcement.node
    _bounded(node, "addresses", len(announcement.addresses), MAX_ADDRESSES)
    _bounded(node, "pod ranges", len(announcement.pod_cidrs), MAX_RANGES)
    _bounded(node, "keys", len(announcement.keys), MAX_KEYS)
    _bounded(node, "SPIs", len(announcement.spis), MAX_SPIS)
    _bounded(node, "characters of the site", len(announcement.site), MAX_TEXT)
    _bounded(node, "characters of the boot id", len(announcement.boot_id), MAX_TEXT)
    if not 0 < announcement.sequence < 2**63:
        raise AnnouncementError(f"node {node} announced the sequence number {announcement.sequence}")
    for name, key in announcement.keys.items():
        _bounded(node, "characters of a key's name", len(name), MAX_TEXT)
        _bounded(node, "bytes of a key", len(key), MAX_KEY_BYTES)
    if not all(0 < spi < 2**32 for spi in announcement.spis):
        raise AnnouncementError(f"node {node} announced an SPI outside 32 bits")
    for address in announcement.addresses:
        check_address(node, address)
    for text in announcement.pod_cidrs:
        check_range(node, text, service_ranges)


def check_address(node: str, text: str) -> tuple[str, int]:
    """Split HOST:PORT of an announcement; the host must be an address that another machine can mean."""
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    except ValueError:
        raise AnnouncementError(f"node {node} announced {text[:80]!r}, which is not ADDRESS:PORT") from None
    if not 0 < number < 65_536 or (address.version == 6) != host.startswith("["):
        raise AnnouncementError(f"node {node} announced {text[:80]!r}, which is not ADDRESS:PORT")
    if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
        raise AnnouncementError(f"node {node} announced {text}, which no other machine can reach")
    return str(address), number


def check_range(node: str, text: str, service_ranges: Sequence[Network] = ()) -> Network:
    """Parse a pod range; raises AnnouncementError for one that no node can own."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise AnnouncementError(f"node {node} announced {text[:80]!r}, which is not an address range") from None
    if network.prefixlen < SHORTEST_PREFIX[network.version]:
        raise AnnouncementError(
            f"node {node} announced the range {network}; shorter than /{SHORTEST_PREFIX[network.version]} is refused"
        )
    if network.is_loopback or network.is_multicast or network.is_link_local or network.is_unspecified:
        raise AnnouncementError(f"node {node} announced the range {network}, which holds no pods")
    for service in service_ranges:
        if network.version == service.version and network.overlaps(service):
            raise AnnouncementError(
                f"node {node} announced the range {network}, which covers the service range {service}"
            )
    return network


def _bounded(node: str, what: str, count: int, limit: int) -> None:
    if count > limit:
        raise AnnouncementError(f"node {node[:80]} announced {count} {what}; the limit is {limit}")
