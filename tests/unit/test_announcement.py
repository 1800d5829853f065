"""Announcements: only the node can have made them, only sane ones are taken, garbage harms nobody."""

import ipaddress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.wire import announcement, identity, revocation
from isthmus.wire.announcement import Announcement, AnnouncementError, Stale
from isthmus.wire.identity import Holder, IdentityError, Role
from isthmus.wire.registry import Registry

NOW_S = 1_800_000_000.0
CA_KEY = identity.new_key()
CA = identity.new_authority("test", CA_KEY, now_s=NOW_S)
KEY = identity.new_key()
CERTIFICATE = identity.issue(CA, CA_KEY, KEY.public_key(), (Holder(Role.NODE, "edge-1"),), now_s=NOW_S)
SERVICES = (ipaddress.ip_network("10.96.0.0/12"),)
GOOD = Announcement(
    "edge-1",
    5,
    NOW_S,
    "site-1",
    ("192.0.2.1:20006", "[2001:db8::1]:20006"),
    ("172.17.0.0/16", "fd00:1::/64"),
    "boot",
    {"esp": b"k" * 32},
    (17,),
)


def opened(made: Announcement, **arguments: Any) -> Announcement:
    values = {"now_s": NOW_S, "is_revoked": lambda _serial: False, "service_ranges": SERVICES} | arguments
    return announcement.open_announcement(announcement.seal(made, CERTIFICATE, KEY), CA, **values)


def test_a_good_announcement_arrives_as_it_was() -> None:
    assert opened(GOOD) == GOOD


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"node": "edge-2"}, "announced itself as 'edge-2'"),
        ({"pod_cidrs": ("0.0.0.0/0",)}, "shorter than /8"),
        ({"pod_cidrs": ("::/0",)}, "shorter than /16"),
        ({"pod_cidrs": ("10.96.4.0/24",)}, "covers the service range 10.96.0.0/12"),
        ({"pod_cidrs": ("10.0.0.0/8",)}, "covers the service range"),
        ({"pod_cidrs": ("169.254.0.0/16",)}, "holds no pods"),
        ({"pod_cidrs": ("127.0.0.0/8",)}, "holds no pods"),
        ({"pod_cidrs": ("224.0.0.0/8",)}, "holds no pods"),
        ({"pod_cidrs": ("10.1.2.3/8",)}, "not an address range"),  # host bits: a typing error
        ({"pod_cidrs": tuple(f"10.{n}.0.0/24" for n in range(65))}, "65 pod ranges"),
        ({"addresses": ("127.0.0.1:20006",)}, "no other machine can reach"),
        ({"addresses": ("0.0.0.0:20006",)}, "no other machine can reach"),
        ({"addresses": ("169.254.96.16:40001",)}, "no other machine can reach"),
        ({"addresses": ("[::1]:1",)}, "no other machine can reach"),
        ({"addresses": ("192.0.2.1",)}, "not ADDRESS:PORT"),
        ({"addresses": ("192.0.2.1:0",)}, "not ADDRESS:PORT"),
        ({"addresses": ("192.0.2.1:65536",)}, "not ADDRESS:PORT"),
        ({"addresses": ("2001:db8::1:20006",)}, "not ADDRESS:PORT"),  # without brackets
        ({"addresses": ("[192.0.2.1]:1",)}, "not ADDRESS:PORT"),
        ({"addresses": ("evil.example:80",)}, "not ADDRESS:PORT"),  # nobody looks up a name for a stranger
        ({"addresses": tuple(f"192.0.2.{n}:1" for n in range(17))}, "17 addresses"),
        ({"sequence": 0}, "sequence number"),
        ({"sequence": 2**63}, "sequence number"),
        ({"spis": (2**32,)}, "outside 32 bits"),
        ({"site": "x" * 254}, "254 characters of the site"),
        ({"keys": {str(n): b"" for n in range(9)}}, "9 keys"),
        ({"keys": {"esp": b"x" * 257}}, "257 bytes of a key"),
    ],
)
def test_an_announcement_that_makes_no_sense_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(AnnouncementError, match=reason.replace("(", r"\(")):
        opened(msgspec.structs.replace(GOOD, **changes))


def test_an_old_announcement_cannot_be_played_back() -> None:
    for sequence in (4, 5):
        with pytest.raises(Stale):
            opened(msgspec.structs.replace(GOOD, sequence=sequence), known=GOOD)
    assert opened(msgspec.structs.replace(GOOD, sequence=6), known=GOOD).sequence == 6


def test_a_revoked_or_expired_certificate_announces_nothing() -> None:
    with pytest.raises(AnnouncementError, match="revoked"):
        opened(GOOD, is_revoked=lambda serial: serial == identity.serial_text(CERTIFICATE))
    with pytest.raises(IdentityError, match="expired"):
        opened(GOOD, now_s=NOW_S + 2 * 86_400)


def test_a_relays_certificate_announces_no_node() -> None:
    relay = identity.issue(CA, CA_KEY, KEY.public_key(), (Holder(Role.RELAY, "edge-1"),), now_s=NOW_S)
    with pytest.raises(IdentityError, match="does not name one node"):
        announcement.open_announcement(
            announcement.seal(GOOD, relay, KEY), CA, now_s=NOW_S, is_revoked=lambda _serial: False
        )


@given(st.integers(0, 2_000), st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(place: int, bit: int) -> None:
    """Either an error, or, where the bit is in the signature's encoding, the very same announcement."""
    data = bytearray(announcement.seal(GOOD, CERTIFICATE, KEY))
    data[place % len(data)] ^= 1 << bit
    try:
        found = announcement.open_announcement(bytes(data), CA, now_s=NOW_S, is_revoked=lambda _serial: False)
    except IdentityError:
        return
    assert found == GOOD


@given(st.binary(max_size=400))
def test_garbage_is_refused_and_never_crashes(data: bytes) -> None:
    with pytest.raises(IdentityError):
        announcement.open_announcement(data, CA, now_s=NOW_S, is_revoked=lambda _serial: False)


@given(st.recursive(st.none() | st.integers() | st.binary() | st.text(), lambda inner: st.lists(inner, max_size=4)))
def test_well_formed_nonsense_is_refused_too(value: Any) -> None:
    payload = msgspec.msgpack.encode(str(value)) if not isinstance(value, bytes) else value
    signed = announcement.SignedAnnouncement(
        payload, identity.certificate_der(CERTIFICATE), identity.sign(KEY, announcement.CONTEXT, payload)
    )
    with pytest.raises(IdentityError):
        announcement.open_announcement(
            msgspec.msgpack.encode(signed), CA, now_s=NOW_S, is_revoked=lambda _serial: False
        )


def test_a_registry_keeps_the_newest_and_drops_the_revoked() -> None:
    registry = Registry(CA)
    registry.accept(announcement.seal(GOOD, CERTIFICATE, KEY), now_s=NOW_S)
    with pytest.raises(Stale):
        registry.accept(announcement.seal(GOOD, CERTIFICATE, KEY), now_s=NOW_S)
    entry = revocation.Entry(identity.serial_text(CERTIFICATE), Holder(Role.NODE, "edge-1"), NOW_S)
    newer = revocation.seal(revocation.RevocationList(2, NOW_S, (entry,)), CA_KEY)
    older = revocation.seal(revocation.RevocationList(1, NOW_S), CA_KEY)
    assert registry.adopt(newer) == ["edge-1"]
    assert registry.adopt(older) is None and registry.adopt(newer) is None
    assert registry.nodes == {} and registry.revoked_serials
    with pytest.raises(AnnouncementError, match="revoked"):
        registry.accept(announcement.seal(GOOD, CERTIFICATE, KEY), now_s=NOW_S)


def test_a_registry_is_bounded() -> None:
    registry = Registry(CA, max_nodes=1)
    registry.accept(announcement.seal(GOOD, CERTIFICATE, KEY), now_s=NOW_S)
    other = identity.issue(CA, CA_KEY, KEY.public_key(), (Holder(Role.NODE, "edge-2"),), now_s=NOW_S)
    with pytest.raises(AnnouncementError, match="the limit"):
        registry.accept(announcement.seal(msgspec.structs.replace(GOOD, node="edge-2"), other, KEY), now_s=NOW_S)


def test_an_expired_node_stays_known_while_it_could_still_renew() -> None:
    registry = Registry(CA)
    registry.accept(announcement.seal(GOOD, CERTIFICATE, KEY), now_s=NOW_S)
    assert registry.expire(NOW_S + 2 * 86_400) == []
    assert registry.expire(NOW_S + 9 * 86_400) == ["edge-1"]
