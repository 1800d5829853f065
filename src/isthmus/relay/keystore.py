"""The identity of one node or relay on disk, replaced whole: a key and its certificate are never of two ages.

ca.pem                      the authority's certificate
revocations                 the newest revocation list
pending/key.pem             the key of a request that is under way; kept over a crash, so the request can be repeated
000001/key.pem, certificate.pem   generations; the highest complete one counts, the one before stays for readers
"""

import shutil
from pathlib import Path

import msgspec

from isthmus.files import (
    StateNotWritten,
    StateUnreadable,
    make_private_directory,
    read_if_there,
    read_private,
    sync_directory,
    write_private,
)
from isthmus.wire import identity
from isthmus.wire.identity import Certificate, IdentityError
from isthmus.wire.tls import TlsFiles

KEPT_GENERATIONS = 3


class Stored(msgspec.Struct, frozen=True):
    """A usable identity: the parsed values, and the files for a TLS context. Its ``repr`` shows no key."""

    certificate: Certificate
    key: identity.Key
    authority: Certificate
    files: TlsFiles

    @property
    def serial(self) -> str:
        """The certificate's serial number, as revocation lists spell it."""
        return identity.serial_text(self.certificate)

    def __repr__(self) -> str:
        return f"Stored({self.files.certificate_file})"


class KeyStore:
    """The directory of one identity. Only one process writes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self) -> None:
        """Make the directory, and finish what a crash interrupted."""
        make_private_directory(self.directory)
        pending = self.directory / "pending"
        if (pending / "certificate.pem").exists() and self._read(pending) is not None:
            self._promote(pending)

    def current(self) -> Stored | None:
        """The newest complete generation, or None before the first enrolment."""
        for generation in reversed(self._generations()):
            stored = self._read(generation)
            if stored is not None:
                return stored
        return None

    def pending_key(self) -> identity.Key:
        """The key for the request under way: the one on disk, or a new one, written before it is used."""
        path = self.directory / "pending" / "key.pem"
        kept = read_if_there(path)
        if kept:
            try:
                return identity.load_key(kept)
            except IdentityError:
                pass  # cut off by a crash of the file system; it was never used
        key = identity.new_key()
        make_private_directory(path.parent)
        write_private(path, identity.key_pem(key))
        return key

    def install(self, certificate: Certificate, authority: Certificate) -> Stored:
        """Make ``certificate``, issued for the pending key, the current one. Raises StateNotWritten, IdentityError."""
        pending = self.directory / "pending"
        key = identity.load_key(read_private(pending / "key.pem"))
        if identity.key_fingerprint(identity.public_key(certificate)) != identity.key_fingerprint(key.public_key()):
            raise IdentityError("the issuer answered with a certificate for another key")
        self.keep_authority(authority)
        write_private(pending / "certificate.pem", identity.certificate_pem(certificate))
        return self._promote(pending)

    def authority(self) -> Certificate | None:
        """The authority's certificate that this identity trusts, or None before the first enrolment."""
        data = read_if_there(self.directory / "ca.pem")
        return identity.load_certificate(data) if data else None

    def keep_authority(self, authority: Certificate) -> None:
        """Trust this authority from now on."""
        pem = identity.certificate_pem(authority)
        if read_if_there(self.directory / "ca.pem") != pem:
            write_private(self.directory / "ca.pem", pem)

    def revocations(self) -> bytes:
        """The newest revocation list that was kept, b"" for none."""
        return read_if_there(self.directory / "revocations") or b""

    def keep_revocations(self, signed: bytes) -> None:
        """Keep the list over a restart."""
        write_private(self.directory / "revocations", signed)

    def _promote(self, pending: Path) -> Stored:
        generations = self._generations()
        number = int(generations[-1].name) + 1 if generations else 1
        place = self.directory / f"{number:06}"
        try:
            pending.rename(place)
            sync_directory(self.directory)
        except OSError as error:
            raise StateNotWritten(f"could not rename {pending} to {place}: {error.strerror}") from error
        for old in generations[: -(KEPT_GENERATIONS - 1)]:
            shutil.rmtree(old, ignore_errors=True)
        stored = self._read(place)
        if stored is None:
            raise IdentityError(f"the new identity in {place} cannot be read back")
        return stored

    def _read(self, generation: Path) -> Stored | None:
        try:
            certificate = identity.load_certificate(read_private(generation / "certificate.pem"))
            key = identity.load_key(read_private(generation / "key.pem"))
            authority = identity.load_certificate(read_private(self.directory / "ca.pem"))
        except (StateUnreadable, IdentityError):
            return None
        if identity.key_fingerprint(identity.public_key(certificate)) != identity.key_fingerprint(key.public_key()):
            return None
        files = TlsFiles(
            ca_file=str(self.directory / "ca.pem"),
            certificate_file=str(generation / "certificate.pem"),
            key_file=str(generation / "key.pem"),
        )
        return Stored(certificate, key, authority, files)

    def _generations(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("[0-9]" * 6) if path.is_dir())
