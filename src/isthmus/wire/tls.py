"""TLS contexts of links and relays, and who is at the other end. Opens no socket.

TLS 1.3 only, both sides authenticated against the cluster's authority. A node's name is a URI in its certificate,
``isthmus://node/NAME``; a relay's is ``isthmus://relay/NAME``. Session resumption is off: a resumed session would skip
the check of a certificate that was revoked since. OpenSSL puts AES-256-GCM first, which suits every processor with AES
instructions; its order for TLS 1.3 cannot be changed through the ssl module.
"""

import ssl
from collections.abc import Collection, Iterable

import msgspec

from isthmus.model.errors import IsthmusError

ALPN_LINK = "isthmus-link/1"  # the dialler opens streams
ALPN_REVERSE = "isthmus-link-reverse/1"  # the dialler was asked to dial, and accepts streams
URI_PREFIX = "isthmus://"


class TlsError(IsthmusError):
    """Credentials cannot be used, or the other side is not who it must be."""

    code = "wire.tls"


class WrongPeer(TlsError):
    """A valid certificate, but of another node: another host has that address here."""

    code = "wire.tls.wrong-peer"


class Identity(msgspec.Struct, frozen=True):
    """Who a certificate says its holder is. ``serial`` is lower-case hexadecimal without leading zeros."""

    kind: str
    name: str
    serial: str = ""

    @property
    def uri(self) -> str:
        return f"{URI_PREFIX}{self.kind}/{self.name}"


class TlsFiles(msgspec.Struct, frozen=True):
    """PEM files: the authority, our certificate (chain) and its key."""

    ca_file: str
    certificate_file: str
    key_file: str


def client_context(files: TlsFiles, alpn: Iterable[str] = (ALPN_LINK,)) -> ssl.SSLContext:
    """A context for dialling. Names are compared by the caller (``check_peer``), for they are URIs."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, files, alpn)


def server_context(
    files: TlsFiles, alpn: Iterable[str] = (ALPN_LINK, ALPN_REVERSE), *, client_optional: bool = False
) -> ssl.SSLContext:
    """A context for accepting. ``client_optional``: for enrolment, where ALPN decides who needs a certificate."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, files, alpn)
    context.num_tickets = 0
    if client_optional:
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _context(protocol: ssl._SSLMethod, files: TlsFiles, alpn: Iterable[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(alpn))
    try:
        context.load_verify_locations(cafile=files.ca_file)
        context.load_cert_chain(files.certificate_file, files.key_file)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"the credentials {files.certificate_file} cannot be loaded: {error}") from error
    return context


def identity_of_uris(uris: Iterable[str], kind: str, serial: str = "") -> Identity:
    """The one ``isthmus://KIND/NAME`` of that kind among a certificate's URIs. Raises TlsError without or with several.

    A relay's certificate may also make its holder the issuer; such other names are passed over.
    """
    prefix = f"{URI_PREFIX}{kind}/"
    names = [uri[len(prefix) :] for uri in uris if uri.startswith(prefix)]
    if not names and any(uri.startswith(URI_PREFIX) for uri in uris):
        raise WrongPeer(f"a {kind} was expected, the certificate is {', '.join(uris)[:200]}")
    if len(names) != 1 or not names[0] or "/" in names[0]:
        raise TlsError(f"the certificate does not name one {kind}")
    return Identity(kind, names[0], normal_serial(serial))


def normal_serial(serial: str) -> str:
    """A serial number as lower-case hexadecimal without leading zeros, so that two spellings compare equal."""
    return serial.lower().removeprefix("0x").lstrip("0")


def peer_identity(ssl_object: "ssl.SSLObject | ssl.SSLSocket", kind: str = "node") -> Identity:
    """Who is at the other end, after the handshake. Raises TlsError where no certificate of ours was shown."""
    certificate = ssl_object.getpeercert()
    if not certificate:
        raise TlsError("the other side showed no certificate")
    names: tuple[tuple[str, str], ...] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    uris = [value for name_kind, value in names if name_kind == "URI"]
    return identity_of_uris(uris, kind, str(certificate.get("serialNumber", "")))


def check_peer(
    ssl_object: "ssl.SSLObject | ssl.SSLSocket", *, wanted: str = "", kind: str = "node", revoked: Collection[str] = ()
) -> Identity:
    """Return who is at the other end, if that is allowed: right kind, right name (any, when ''), not revoked.

    ``revoked`` holds serial numbers as ``normal_serial`` spells them.
    """
    identity = peer_identity(ssl_object, kind)
    if wanted and identity.name != wanted:
        raise WrongPeer(f"{kind} {wanted} was expected, the certificate is {identity.uri}")
    if identity.serial in revoked:
        raise TlsError(f"the certificate {identity.serial} of {identity.uri} is revoked")
    return identity
