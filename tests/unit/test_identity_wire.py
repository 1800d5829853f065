"""Certificates, tokens, renewals and revocation lists: what is accepted, and what is not, and why."""

import base64
import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.model.errors import IsthmusError
from isthmus.wire import enrolment, identity, revocation, token
from isthmus.wire.enrolment import ClientReader, EnrolmentError, Greeting, IssuerReader
from isthmus.wire.identity import Expired, Holder, IdentityError, Role
from isthmus.wire.token import Token, TokenError

NOW_S = 1_800_000_000.0
CA_KEY = identity.new_key()
CA = identity.new_authority("test", CA_KEY, now_s=NOW_S)
OTHER_KEY = identity.new_key()
OTHER = identity.new_authority("other", OTHER_KEY, now_s=NOW_S)
KEY = identity.new_key()
NODE = Holder(Role.NODE, "edge-1")


def issued(*holders: Holder, life_s: float = 3600.0, now_s: float = NOW_S) -> identity.Certificate:
    return identity.issue(CA, CA_KEY, KEY.public_key(), holders or (NODE,), now_s=now_s, life_s=life_s)


def test_a_certificate_names_its_holder_in_its_role_only() -> None:
    certificate = issued(Holder(Role.RELAY, "r1"), Holder(Role.ISSUER, "r1"))
    assert identity.verify(certificate, CA, Role.RELAY, now_s=NOW_S) == "r1"
    assert identity.verify(certificate, CA, Role.ISSUER, now_s=NOW_S) == "r1"
    with pytest.raises(IdentityError, match="does not name one node"):
        identity.verify(certificate, CA, Role.NODE, now_s=NOW_S)


@pytest.mark.parametrize(
    ("at_s", "error"),
    [
        (NOW_S - identity.BACKDATE_S, None),  # the holder's clock is behind
        (NOW_S - identity.BACKDATE_S - 1, "not valid yet"),
        (NOW_S + 3600, None),
        (NOW_S + 3601, "expired"),
    ],
)
def test_a_certificate_counts_in_its_time(at_s: float, error: str | None) -> None:
    if error is None:
        assert identity.verify(issued(), CA, Role.NODE, now_s=at_s) == "edge-1"
    else:
        with pytest.raises(IdentityError, match=error):
            identity.verify(issued(), CA, Role.NODE, now_s=at_s)


def test_another_authoritys_certificate_is_none() -> None:
    with pytest.raises(IdentityError, match="not issued by this cluster"):
        identity.verify(issued(), OTHER, Role.NODE, now_s=NOW_S)
    forged = identity.issue(CA, OTHER_KEY, KEY.public_key(), (NODE,), now_s=NOW_S)
    with pytest.raises(IdentityError, match="not issued by this cluster"):
        identity.verify(forged, CA, Role.NODE, now_s=NOW_S)


def test_a_leaf_cannot_issue() -> None:
    leaf = issued()
    second = identity.issue(leaf, KEY, OTHER_KEY.public_key(), (NODE,), now_s=NOW_S)
    with pytest.raises(IdentityError):
        identity.verify(second, CA, Role.NODE, now_s=NOW_S)
    with pytest.raises(IdentityError, match="not the certificate of an authority"):
        identity.check_authority(leaf)


@given(st.floats(min_value=2, max_value=1e7))
def test_two_thirds_of_the_life_are_two_thirds_whatever_the_life(life_s: float) -> None:
    certificate = issued(life_s=life_s)
    assert identity.renewal_time_s(certificate) == pytest.approx(NOW_S + life_s * 2 / 3, abs=2.0)


@pytest.mark.parametrize("name", ["", "A", "a_b", "a/b", "-a", "a" * 254, "a\n", "é", "a b", "../x", "a."])
def test_a_name_that_could_be_misread_is_refused(name: str) -> None:
    with pytest.raises(IdentityError):
        identity.check_name(name)


@given(st.binary(max_size=300))
def test_garbage_is_an_identity_error_and_nothing_else(data: bytes) -> None:
    for parse in (identity.load_certificate, identity.load_key, identity.requested_key):
        with pytest.raises(IdentityError):
            parse(data)
    with pytest.raises(IdentityError):
        revocation.open_list(data, CA)


@given(st.integers(0, 1_000), st.integers(0, 7))
def test_a_certificate_with_a_flipped_bit_is_refused_unless_nothing_that_counts_has_changed(
    place: int, bit: int
) -> None:
    good = issued()
    data = bytearray(identity.certificate_der(good))
    data[place % len(data)] ^= 1 << bit
    try:
        damaged = identity.load_certificate(bytes(data))
        identity.verify(damaged, CA, Role.NODE, now_s=NOW_S)
    except IdentityError:
        return
    # DER counts the unused bits at the end of a signature; where these are zero, the count may be a wrong one.
    assert damaged.tbs_certificate_bytes == good.tbs_certificate_bytes
    assert damaged.signature == good.signature


def test_a_certificate_or_request_of_another_version_is_refused() -> None:
    data = identity.certificate_der(issued()).replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020107"), 1)
    with pytest.raises(IdentityError):
        identity.load_certificate(data)
    request = identity.new_request(identity.new_key())
    with pytest.raises(IdentityError):
        identity.requested_key(request.replace(bytes.fromhex("020100"), bytes.fromhex("020107"), 1))


def test_a_token_survives_copying_and_hides_its_secret_in_logs() -> None:
    made = Token(Role.NODE, "edge-1", os.urandom(32), os.urandom(32), "[2001:db8::1]:20004")
    assert token.decode(f"  {token.encode(made)}\n") == made
    assert made.secret.hex() not in repr(made) and str(made.secret) not in repr(made)
    question = enrolment.Enrol(made.role, made.name, made.secret, b"")
    assert str(made.secret) not in repr(question)


@given(st.text(max_size=200))
def test_a_damaged_token_is_refused_without_being_quoted(text: str) -> None:
    for attempt in (text, token.PREFIX + text, token.PREFIX + base64.urlsafe_b64encode(text.encode()).decode()):
        with pytest.raises(TokenError) as caught:
            token.decode(attempt)
        if len(text) > 20:
            assert text not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_secret_matches_only_its_own_hash() -> None:
    secret = os.urandom(32)
    assert token.secret_matches(secret, token.secret_hash(secret))
    assert not token.secret_matches(os.urandom(32), token.secret_hash(secret))


def renewal_at(now_s: float, *, certificate: identity.Certificate | None = None, key: identity.Key = KEY) -> str:
    """The outcome of a renewal: '' or the refusal."""
    message = enrolment.renewal(Role.NODE, "edge-1", certificate or issued(), key, identity.new_request(OTHER_KEY))
    try:
        enrolment.check_renewal(message, CA, now_s=now_s, grace_s=7 * 86_400)
    except IdentityError as error:
        return str(error)
    return ""


def test_an_expired_certificate_renews_within_the_grace_and_not_after() -> None:
    assert renewal_at(NOW_S + 1_000) == ""
    assert renewal_at(NOW_S + 3_600 + 7 * 86_400 - 1) == ""
    assert "expired more than 168 h ago" in renewal_at(NOW_S + 3_600 + 7 * 86_400 + 2)


def test_a_renewal_is_signed_by_the_present_key_for_its_own_name() -> None:
    assert "signature does not hold" in renewal_at(NOW_S, key=OTHER_KEY)
    assert "names edge-2" in renewal_at(NOW_S, certificate=issued(Holder(Role.NODE, "edge-2")))
    assert "does not name one node" in renewal_at(NOW_S, certificate=issued(Holder(Role.RELAY, "edge-1")))


def test_the_issuer_is_authenticated_before_anything_is_sent() -> None:
    greeting = Greeting(identity.certificate_der(CA), NOW_S)
    known = bytes.fromhex(identity.fingerprint(CA))
    issuer = identity.certificate_der(issued(Holder(Role.ISSUER, "i")))
    assert enrolment.authenticate_issuer(greeting, issuer, known, now_s=NOW_S) == CA
    with pytest.raises(IdentityError, match="another authority"):
        enrolment.authenticate_issuer(Greeting(identity.certificate_der(OTHER), NOW_S), issuer, known, now_s=NOW_S)
    node = identity.certificate_der(issued())
    with pytest.raises(IdentityError, match="does not name one issuer"):  # a stolen node key catches no tokens
        enrolment.authenticate_issuer(greeting, node, known, now_s=NOW_S)


@given(st.binary(max_size=200))
def test_enrolment_garbage_is_an_enrolment_error(data: bytes) -> None:
    framed = len(data).to_bytes(4, "big") + data
    for reader in (ClientReader(), IssuerReader()):
        with pytest.raises(EnrolmentError):
            reader.feed(framed)


def test_a_revocation_list_is_believed_only_with_the_authoritys_signature() -> None:
    entry = revocation.Entry("abc", NODE, NOW_S)
    made = revocation.RevocationList(3, NOW_S, (entry,))
    assert revocation.open_list(revocation.seal(made, CA_KEY), CA) == made
    with pytest.raises(IdentityError, match="signature"):
        revocation.open_list(revocation.seal(made, OTHER_KEY), CA)


def test_a_signature_for_one_purpose_is_none_for_another() -> None:
    signature = identity.sign(KEY, b"one", b"payload")
    identity.check_signature(KEY.public_key(), b"one", b"payload", signature)
    with pytest.raises(IdentityError):
        identity.check_signature(KEY.public_key(), b"two", b"payload", signature)


def test_every_error_here_is_one_of_ours() -> None:
    assert issubclass(Expired, IdentityError) and issubclass(IdentityError, IsthmusError)
    assert msgspec.structs.fields(Token)[2].name == "secret"
