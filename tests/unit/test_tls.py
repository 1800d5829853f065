"""TLS contexts of links: TLS 1.3 and both certificates, or nothing; names are URIs; revoked serials are out."""

import ssl
import time
from pathlib import Path

import pytest

from isthmus.wire import identity
from isthmus.wire.tls import (
    ALPN_LINK,
    ALPN_REVERSE,
    TlsError,
    TlsFiles,
    WrongPeer,
    check_peer,
    client_context,
    identity_of_uris,
    normal_serial,
    peer_identity,
    server_context,
)


class Authority:
    """An issuer in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.key = identity.new_key()
        self.certificate = identity.new_authority(name, self.key, now_s=time.time())
        (directory / f"{name}-ca.pem").write_bytes(identity.certificate_pem(self.certificate))

    def issue(self, *holders: identity.Holder, age_s: float = 0.0) -> TlsFiles:
        key = identity.new_key()
        now_s = time.time() - age_s
        certificate = identity.issue(self.certificate, self.key, key.public_key(), holders, now_s=now_s, life_s=3600)
        stem = self.directory / f"{self.name}-{holders[0].name}-{age_s:g}"
        Path(f"{stem}.pem").write_bytes(identity.certificate_pem(certificate))
        Path(f"{stem}.key").write_bytes(identity.key_pem(key))
        return TlsFiles(f"{self.directory}/{self.name}-ca.pem", f"{stem}.pem", f"{stem}.key")

    def node(self, name: str, **options: float) -> TlsFiles:
        return self.issue(identity.Holder(identity.Role.NODE, name), **options)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "home")


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after a handshake, and one byte from the server so that the client has seen its verdict."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialler = client.wrap_bio(to_client, to_server)
    listener = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (dialler, listener):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    listener.write(b"!")
    assert dialler.read(1) == b"!"
    return dialler, listener


def test_both_sides_learn_who_the_other_is(authority: Authority) -> None:
    dialler, listener = shake_hands(client_context(authority.node("a")), server_context(authority.node("b")))
    assert (peer_identity(dialler).uri, peer_identity(listener).uri) == ("isthmus://node/b", "isthmus://node/a")
    assert dialler.version() == "TLSv1.3"
    assert dialler.selected_alpn_protocol() == ALPN_LINK
    assert (dialler.cipher() or ("",))[0] == "TLS_AES_256_GCM_SHA384"


def test_no_session_ticket_is_given(authority: Authority) -> None:
    dialler, _ = shake_hands(client_context(authority.node("a")), server_context(authority.node("b")))
    assert dialler.session is None or not dialler.session.has_ticket


def test_the_reverse_protocol_is_told_apart(authority: Authority) -> None:
    client = client_context(authority.node("a"), (ALPN_REVERSE,))
    _, listener = shake_hands(client, server_context(authority.node("b")))
    assert listener.selected_alpn_protocol() == ALPN_REVERSE


def test_another_authority_is_refused_by_both_sides(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "away")
    with pytest.raises(ssl.SSLError):
        shake_hands(client_context(stranger.node("a")), server_context(authority.node("b")))
    foreign = stranger.node("a")
    trusting = TlsFiles(authority.node("b").ca_file, foreign.certificate_file, foreign.key_file)
    with pytest.raises(ssl.SSLError):
        shake_hands(client_context(trusting), server_context(authority.node("b")))


def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    with pytest.raises(ssl.SSLError):
        shake_hands(client_context(authority.node("a", age_s=7200)), server_context(authority.node("b")))


def test_a_client_without_certificate_is_refused_unless_optional(authority: Authority) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(authority.node("a").ca_file)
    bare.set_alpn_protocols([ALPN_LINK])
    with pytest.raises(ssl.SSLError):
        shake_hands(bare, server_context(authority.node("b")))
    _, listener = shake_hands(bare, server_context(authority.node("b"), client_optional=True))
    with pytest.raises(TlsError):
        peer_identity(listener)


def test_tls_1_2_is_refused(authority: Authority) -> None:
    old = client_context(authority.node("a"))
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake_hands(old, server_context(authority.node("b")))


def test_the_wrong_node_and_the_wrong_kind_are_told_from_other_failures(authority: Authority) -> None:
    dialler, _ = shake_hands(client_context(authority.node("a")), server_context(authority.node("b")))
    assert check_peer(dialler, wanted="b").name == "b"
    with pytest.raises(WrongPeer):
        check_peer(dialler, wanted="c")
    with pytest.raises(WrongPeer):
        check_peer(dialler, kind="relay")


def test_a_revoked_serial_is_refused(authority: Authority) -> None:
    dialler, _ = shake_hands(client_context(authority.node("a")), server_context(authority.node("b")))
    serial = peer_identity(dialler).serial
    with pytest.raises(TlsError, match="revoked"):
        check_peer(dialler, wanted="b", revoked=frozenset({serial}))


def test_serials_are_spelled_as_revocation_lists_spell_them(authority: Authority) -> None:
    files = authority.node("a")
    certificate = identity.load_certificate(Path(files.certificate_file).read_bytes())
    _, listener = shake_hands(client_context(files), server_context(authority.node("b")))
    assert peer_identity(listener).serial == identity.serial_text(certificate)
    assert normal_serial("0x00AB") == "ab"


@pytest.mark.parametrize(
    ("uris", "name"),
    [
        (["isthmus://node/a"], "a"),
        (["https://x", "isthmus://node/a", "isthmus://issuer/i"], "a"),  # another role beside it
        (["isthmus://node/a", "isthmus://node/b"], None),  # two names: whose is it?
        (["isthmus://relay/a"], None),
        (["isthmus://node/"], None),
        (["isthmus://node/a/b"], None),
        ([], None),
    ],
)
def test_exactly_one_name_of_the_kind_counts(uris: list[str], name: str | None) -> None:
    if name is None:
        with pytest.raises(TlsError):
            identity_of_uris(uris, "node")
    else:
        assert identity_of_uris(uris, "node").name == name


def test_credentials_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"none\.pem"):
        client_context(TlsFiles(str(tmp_path / "ca"), str(tmp_path / "none.pem"), "k"))
