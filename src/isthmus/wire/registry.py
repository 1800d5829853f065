"""What a relay knows of nodes: their announcements, who is here, who is revoked. Pure: bytes and time come in."""

from collections.abc import Sequence

import msgspec

from isthmus.wire import announcement, identity, revocation
from isthmus.wire.announcement import Announcement, AnnouncementError, Network
from isthmus.wire.identity import Certificate
from isthmus.wire.revocation import RevocationList

MAX_NODES = 20_000


class Known(msgspec.Struct, frozen=True):
    """A node's last good announcement. ``expires_s`` is when the certificate that it came with ends."""

    announcement: Announcement
    signed: bytes
    serial: str
    expires_s: float


class Registry:
    """Accepted announcements and the newest revocation list. Used by relays and by agents alike."""

    def __init__(
        self, authority: Certificate, *, service_ranges: Sequence[Network] = (), max_nodes: int = MAX_NODES
    ) -> None:
        self._authority = authority
        self._service_ranges = tuple(service_ranges)
        self._max_nodes = max_nodes
        self.nodes: dict[str, Known] = {}
        self.revocations = RevocationList()
        self.signed_revocations = b""
        self._revoked: frozenset[str] = frozenset()

    def is_revoked(self, serial: str) -> bool:
        """Whether a certificate's serial number (lower-case hexadecimal) is on the list."""
        return serial in self._revoked

    @property
    def revoked_serials(self) -> frozenset[str]:
        """All revoked serial numbers."""
        return self._revoked

    def accept(self, signed: bytes, *, now_s: float) -> Announcement:
        """Check and keep an announcement; raises AnnouncementError, Stale or IdentityError and keeps what was known."""
        opened = announcement.open_announcement(
            signed, self._authority, now_s=now_s, is_revoked=self.is_revoked, service_ranges=self._service_ranges
        )
        known = self.nodes.get(opened.node)
        if known is not None and opened.sequence <= known.announcement.sequence:
            raise announcement.Stale(
                f"announcement {opened.sequence} of node {opened.node} is not newer than {known.announcement.sequence}"
            )
        if known is None and len(self.nodes) >= self._max_nodes:
            raise AnnouncementError(f"{self._max_nodes} nodes are known, the limit; {opened.node} is not taken")
        certificate = announcement.certificate_of(signed)
        serial = identity.serial_text(certificate)
        self.nodes[opened.node] = Known(opened, signed, serial, identity.expiry_s(certificate))
        return opened

    def known_sequence(self, node: str) -> int:
        """The number of the node's last accepted announcement, or 0."""
        known = self.nodes.get(node)
        return known.announcement.sequence if known else 0

    def adopt(self, signed_list: bytes) -> list[str] | None:
        """Take over a newer revocation list; returns the nodes whose announcement it takes away, None if not newer.

        Raises IdentityError for a list that the authority did not sign.
        """
        opened = revocation.open_list(signed_list, self._authority)
        if self.signed_revocations and opened.number <= self.revocations.number:
            return None
        self.revocations, self.signed_revocations = opened, signed_list
        self._revoked = opened.serials
        out = [node for node, known in self.nodes.items() if known.serial in self._revoked]
        for node in out:
            del self.nodes[node]
        return out

    def expire(self, now_s: float) -> list[str]:
        """Forget the nodes whose certificate ended so long ago that it cannot be renewed; returns them.

        Not at its end: the issuer may be down, and what a node said of itself stays the best that is known.
        """
        out = [node for node, known in self.nodes.items() if known.expires_s + identity.GRACE_S < now_s]
        for node in out:
            del self.nodes[node]
        return out
