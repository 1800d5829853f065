"""The cluster's certificates: the authority, keys, requests, issue, validation. Pure: time and serials come in.

One authority a cluster (a self-signed ECDSA P-256 certificate); its leaf certificates are short-lived and name their
holder in URI subject alternative names (RFC 5280 4.2.1.6): ``isthmus://node/NAME``, ``isthmus://relay/NAME``,
``isthmus://issuer/NAME``. Nothing else in a certificate is trusted. No text made here ever holds a key.
"""

import datetime
import re
from enum import StrEnum

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.model.errors import IsthmusError

AUTHORITY_LIFE_S = 10 * 365 * 86_400.0
DEFAULT_LIFE_S = 86_400.0
BACKDATE_S = 300.0  # a holder's clock may be this much behind the issuer's
RENEW_AT = 2 / 3
GRACE_S = 7 * 86_400.0  # how long an expired certificate still proves who asks for its renewal
MAX_CERTIFICATE_BYTES = 4_096
MAX_REQUEST_BYTES = 4_096

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Certificate = x509.Certificate

_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")
_URI = re.compile(r"isthmus://(node|relay|issuer)/(.+)")


class IdentityError(IsthmusError):
    """A certificate, key, request or signature is not what it must be."""

    code = "identity.invalid"


class Expired(IdentityError):
    """The certificate was valid once; the one failure that renewal may forgive."""

    code = "identity.expired"


class Role(StrEnum):
    """What the holder of a certificate may do."""

    NODE = "node"
    RELAY = "relay"
    ISSUER = "issuer"


class Holder(msgspec.Struct, frozen=True, order=True):
    """One name in a certificate."""

    role: Role
    name: str

    @property
    def uri(self) -> str:
        """The text of the subject alternative name."""
        return f"isthmus://{self.role}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


def check_name(name: str) -> str:
    """Return ``name`` if it can name a node or relay (RFC 1123 subdomain, lower case); raises IdentityError."""
    if not _NAME.fullmatch(name):
        raise IdentityError(f"{name[:80]!r} is not a name: lower-case letters, digits, '-' and '.', at most 253")
    return name


def new_key() -> Key:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """The private key as PKCS#8 PEM, for a file of mode 0600 and for nothing else."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(pem: bytes) -> Key:
    """Parse a private key; the error never quotes its input."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError("the key file does not hold a private key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError("the key file holds a key of another kind than ECDSA")
    return key


def certificate_pem(certificate: Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def certificate_der(certificate: Certificate) -> bytes:
    """The certificate as DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def load_certificate(data: bytes) -> Certificate:
    """Parse one certificate, PEM or DER, of bounded size."""
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise IdentityError(f"a certificate of {len(data)} bytes; the limit is {MAX_CERTIFICATE_BYTES}")
    try:
        if data.startswith(b"-----"):
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise IdentityError("not a certificate") from error


def fingerprint(certificate: Certificate) -> str:
    """SHA-256 over the DER form, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 over the public key's SubjectPublicKeyInfo, in hexadecimal."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def public_key(certificate: Certificate) -> ec.EllipticCurvePublicKey:
    """The certificate's key; raises IdentityError for another kind than ECDSA."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError("the certificate holds a key of an unknown kind") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError("the certificate holds a key of another kind than ECDSA")
    return key


def serial_text(certificate: Certificate) -> str:
    """The serial number as revocation lists carry it: lower-case hexadecimal."""
    return f"{certificate.serial_number:x}"


def new_authority(cluster: str, key: Key, *, now_s: float, life_s: float = AUTHORITY_LIFE_S) -> Certificate:
    """The self-signed certificate of a cluster's authority."""
    name = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "isthmus"), x509.NameAttribute(NameOID.COMMON_NAME, cluster)]
    )
    return (
        _builder(name, name, key.public_key(), now_s - BACKDATE_S, now_s + life_s, x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def new_request(key: Key) -> bytes:
    """A certificate request (PKCS#10, DER): proves possession of the key. Nobody trusts its subject."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def requested_key(der: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request whose signature holds; raises IdentityError."""
    if len(der) > MAX_REQUEST_BYTES:
        raise IdentityError(f"a certificate request of {len(der)} bytes; the limit is {MAX_REQUEST_BYTES}")
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        holds = request.is_signature_valid
    except (ValueError, TypeError, x509.InvalidVersion, InvalidSignature, UnsupportedAlgorithm) as error:
        raise IdentityError("not a certificate request") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the requested key is not ECDSA on the curve P-256")
    if not holds:
        raise IdentityError("the certificate request is not signed by its own key")
    return key


def issue(
    authority: Certificate,
    authority_key: Key,
    key: ec.EllipticCurvePublicKey,
    holders: tuple[Holder, ...],
    *,
    now_s: float,
    life_s: float = DEFAULT_LIFE_S,
) -> Certificate:
    """A leaf certificate for ``holders``, valid from a little before ``now_s`` until ``life_s`` after it."""
    if not holders:
        raise IdentityError("a certificate without a holder")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(holders[0].name)[:64])])
    start_s = now_s - min(BACKDATE_S, life_s)
    uris = [x509.UniformResourceIdentifier(holder.uri) for holder in holders]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    return (
        _builder(subject, authority.subject, key, start_s, now_s + life_s, x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(uris), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def holders_of(certificate: Certificate) -> frozenset[Holder]:
    """The names in a certificate that are ours; says nothing about their truth (see ``verify``)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError, x509.DuplicateExtension):
        return frozenset()
    found = set()
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        match = _URI.fullmatch(uri)
        if match and _NAME.fullmatch(match[2]):
            found.add(Holder(Role(match[1]), match[2]))
    return frozenset(found)


def verify(certificate: Certificate, authority: Certificate, role: Role, *, now_s: float) -> str:
    """Return the name that ``certificate`` gives its holder in ``role``.

    Raises Expired (only when everything else holds) and IdentityError. Revocation is the caller's to check.
    """
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError("the certificate was not issued by this cluster's authority") from error
    names = [holder.name for holder in holders_of(certificate) if holder.role is role]
    if len(names) != 1:
        raise IdentityError(f"the certificate does not name one {role}")
    if now_s < certificate.not_valid_before_utc.timestamp():
        raise IdentityError(
            f"the certificate of {role} {names[0]} is not valid yet", hint="compare the clocks of the two machines"
        )
    if now_s > certificate.not_valid_after_utc.timestamp():
        raise Expired(f"the certificate of {role} {names[0]} expired at {certificate.not_valid_after_utc:%FT%TZ}")
    return names[0]


def check_authority(certificate: Certificate) -> None:
    """Raise IdentityError unless ``certificate`` is an authority that signed itself."""
    try:
        certificate.verify_directly_issued_by(certificate)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise IdentityError("not the certificate of an authority") from error
    if not constraints.ca:
        raise IdentityError("not the certificate of an authority")


def life_of(certificate: Certificate) -> tuple[float, float]:
    """When the certificate was issued, and for how many seconds; ``issue`` backdated its start."""
    start_s = certificate.not_valid_before_utc.timestamp()
    total_s = certificate.not_valid_after_utc.timestamp() - start_s
    backdated_s = min(BACKDATE_S, total_s / 2)
    return start_s + backdated_s, total_s - backdated_s


def renewal_time_s(certificate: Certificate) -> float:
    """When two thirds of the certificate's life have passed."""
    issued_s, life_s = life_of(certificate)
    return issued_s + life_s * RENEW_AT


def expiry_s(certificate: Certificate) -> float:
    """When the certificate ends."""
    return certificate.not_valid_after_utc.timestamp()


def sign(key: Key, context: bytes, payload: bytes) -> bytes:
    """Sign ``payload`` for one purpose: a signature made for one ``context`` is none in another."""
    return key.sign(context + b"\0" + payload, ec.ECDSA(hashes.SHA256()))


def check_signature(key: ec.EllipticCurvePublicKey, context: bytes, payload: bytes, signature: bytes) -> None:
    """Raise IdentityError unless ``signature`` was made by ``sign`` with the same context and payload."""
    try:
        key.verify(signature, context + b"\0" + payload, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise IdentityError("the signature does not hold") from error


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    start_s: float,
    end_s: float,
    serial: int,
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(issuer, subject, key, serial, _moment(start_s), _moment(end_s))


def _moment(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(at_s), datetime.UTC)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
