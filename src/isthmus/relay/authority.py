"""The authority's directory: its key and certificate, tokens, what was issued, what is revoked.

Several processes may use it at once: the issuer that runs in a relay, and the commands `isthmus token create` and
`isthmus node revoke` on the same machine. Whatever reads and then writes does so under one file lock, so a certificate
is either on record before a revocation looks, or refused after it.

    ca.key, ca.crt          the authority (0600, 0644)
    tokens/ID.json          one token: whom it enrols, hash of its secret, expiry, which key used it
    holders/ROLE/NAME.json  the certificates issued to NAME that could still be used or renewed
    revocations             the signed list (wire/revocation.py), watched by the running issuer
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from isthmus.files import (
    StateNotWritten,
    StateUnreadable,
    create_private,
    make_private_directory,
    read_if_there,
    read_private,
    sync_directory,
    write_private,
)
from isthmus.wire import enrolment, identity, revocation, token
from isthmus.wire.enrolment import Enrol, RefusalCode, Renew
from isthmus.wire.identity import Certificate, Holder, IdentityError
from isthmus.wire.token import Token

DEFAULT_DIRECTORY = Path("/var/lib/isthmus-ca")
MAX_EXPIRED_KEPT = 16
USED_TOKEN_KEPT_S = 7 * 86_400.0

Record = TypeVar("Record")


class AuthorityError(IdentityError):
    """The authority's directory is missing, damaged, or already there."""

    code = "identity.authority"


class NotIssued(IdentityError):
    """The issuer refuses; ``reason_code`` tells the asking side which reason it is."""

    code = "identity.not-issued"

    def __init__(self, reason_code: RefusalCode, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason_code = reason_code


class TokenRecord(msgspec.Struct, frozen=True):
    """What the authority keeps of a token. ``used_by`` is the fingerprint of the key that used it, '' before."""

    id: str
    holder: Holder
    secret_hash: str
    created_s: float
    expires_s: float
    used_by: str = ""
    used_s: float = 0.0

    def state(self, now_s: float) -> str:
        """ "used", "expired" or "waiting"."""
        if self.used_by:
            return "used"
        return "expired" if now_s > self.expires_s else "waiting"


class IssuedRecord(msgspec.Struct, frozen=True):
    """One certificate."""

    serial: str
    issued_s: float
    expires_s: float
    key: str


class HolderRecord(msgspec.Struct, frozen=True):
    """What was issued to one holder. ``revoked_s`` is when it was last revoked, 0 for never or enrolled again since."""

    holder: Holder
    certificates: tuple[IssuedRecord, ...] = ()
    revoked_s: float = 0.0


class Authority:
    """An open directory. Methods read the files anew, since other processes change them."""

    def __init__(self, directory: Path) -> None:
        """Raises AuthorityError where ``directory`` holds no authority."""
        self.directory = directory
        try:
            self.certificate = identity.load_certificate(read_private(directory / "ca.crt"))
            self._key = identity.load_key(read_private(directory / "ca.key"))
        except (StateUnreadable, IdentityError) as error:
            raise AuthorityError(
                f"{directory} holds no usable authority: {error}",
                hint=f"make one with `isthmus ca init --dir {directory}`",
            ) from error

    @property
    def revocation_file(self) -> Path:
        """The signed list; it is replaced in one step when somebody is revoked."""
        return self.directory / "revocations"

    def revocations(self) -> bytes:
        """The signed list, as it travels."""
        return read_private(self.revocation_file)

    def create_token(self, holder: Holder, *, ttl_s: float, address: str, now_s: float, secret: bytes) -> Token:
        """Record a token and return it; only its secret's hash is kept."""
        identity.check_name(holder.name)
        kept = token.secret_hash(secret)
        record = TokenRecord(kept[:16], holder, kept, now_s, now_s + ttl_s)
        with self._locked():
            self._forget_old_tokens(now_s)
            write_private(self._token_file(record.id), _json(record))
        return Token(holder.role, holder.name, secret, bytes.fromhex(identity.fingerprint(self.certificate)), address)

    def tokens(self) -> list[TokenRecord]:
        """All tokens on record, oldest first."""
        found = [_read(path, TokenRecord) for path in sorted((self.directory / "tokens").glob("*.json"))]
        return sorted(found, key=lambda record: record.created_s)

    def holders(self) -> list[HolderRecord]:
        """Everybody who ever got a certificate here."""
        return [_read(path, HolderRecord) for path in sorted((self.directory / "holders").glob("*/*.json"))]

    def enrol(self, ask: Enrol, *, now_s: float, life_s: float) -> Certificate:
        """Issue for a token. The key that used a token may ask again until it expires: an answer can get lost."""
        key = identity.requested_key(ask.request)
        asking_key = identity.key_fingerprint(key)
        with self._locked():
            record = self._token(ask, asking_key, now_s)
            holder = record.holder
            if not record.used_by:
                used = msgspec.structs.replace(record, used_by=asking_key, used_s=now_s)
                write_private(self._token_file(record.id), _json(used))
            return self._issue(key, (holder,), now_s, life_s, enrolled_again=True)

    def renew(self, ask: Renew, *, now_s: float, life_s: float, grace_s: float) -> Certificate:
        """Issue to a holder of a certificate, also one that expired less than ``grace_s`` ago; never a revoked one."""
        try:
            present = enrolment.check_renewal(ask, self.certificate, now_s=now_s, grace_s=grace_s)
        except identity.Expired as error:
            raise NotIssued(RefusalCode.TOO_LATE, error.message, hint=error.hint) from error
        key = identity.requested_key(ask.request)
        with self._locked():
            if identity.serial_text(present) in self._list().serials:
                raise NotIssued(
                    RefusalCode.REVOKED, f"{ask.role} {ask.name} is revoked", hint="enrol it again with a new token"
                )
            holder = Holder(ask.role, ask.name)
            self._put_on_record(holder, present)
            return self._issue(key, (holder,), now_s, life_s)

    def issue_local(
        self, key: identity.Key, holders: tuple[Holder, ...], *, now_s: float, life_s: float
    ) -> Certificate:
        """Issue to a process of this machine that can read the authority's key anyway: a relay, the issuer itself."""
        with self._locked():
            return self._issue(key.public_key(), holders, now_s, life_s)

    def revoke(self, holder: Holder, *, now_s: float, grace_s: float = identity.GRACE_S) -> int:
        """Put every usable certificate of ``holder`` on the list, and end its waiting tokens; returns how many.

        A holder that never had a certificate and has no waiting token raises AuthorityError.
        """
        with self._locked():
            record = self._holder(holder)
            ended = self._end_tokens(holder, now_s)
            if not record.certificates and not ended:
                raise AuthorityError(f"{holder} has no certificate of this authority", hint="see `isthmus node list`")
            present = self._list()
            kept = tuple(entry for entry in present.entries if entry.until_s > now_s)
            known = present.serials
            added = tuple(
                revocation.Entry(issued.serial, holder, issued.expires_s + grace_s)
                for issued in record.certificates
                if issued.serial not in known and issued.expires_s + grace_s > now_s
            )
            # At least the time, so that a directory restored from a backup does not fall behind what is known.
            number = max(present.number + 1, int(now_s))
            revocations = revocation.RevocationList(number, now_s, kept + added)
            # The list first: after a crash between the two writes the holder is out, and the command may be repeated.
            write_private(self.revocation_file, revocation.seal(revocations, self._key))
            self._write_holder(msgspec.structs.replace(record, revoked_s=now_s))
        return len(added)

    def _put_on_record(self, holder: Holder, certificate: Certificate) -> None:
        """A certificate of ours that a restored backup does not know: a revocation must find it."""
        record = self._holder(holder)
        serial = identity.serial_text(certificate)
        if serial not in {issued.serial for issued in record.certificates}:
            issued = _record_of(certificate, identity.life_of(certificate)[0])
            self._write_holder(msgspec.structs.replace(record, certificates=(*record.certificates, issued)))

    def _write_holder(self, record: HolderRecord) -> None:
        make_private_directory(self._holder_file(record.holder).parent)
        write_private(self._holder_file(record.holder), _json(record))

    def _token(self, ask: Enrol, asking_key: str, now_s: float) -> TokenRecord:
        kept = token.secret_hash(ask.secret)
        path = self._token_file(kept[:16])
        if not path.exists():
            raise NotIssued(RefusalCode.UNKNOWN_TOKEN, "the token is not known here", hint="make a new token")
        record = _read(path, TokenRecord)
        if not token.secret_matches(ask.secret, record.secret_hash):
            raise NotIssued(RefusalCode.UNKNOWN_TOKEN, "the token is not known here", hint="make a new token")
        if record.holder != Holder(ask.role, ask.name):
            raise NotIssued(RefusalCode.WRONG_NODE, f"the token is for {record.holder}, not {ask.role} {ask.name[:80]}")
        if now_s > record.expires_s:
            raise NotIssued(RefusalCode.EXPIRED_TOKEN, "the token has expired", hint="make a new token")
        if record.used_by and record.used_by != asking_key:
            raise NotIssued(RefusalCode.USED_TOKEN, "the token was used already", hint="make a new token")
        return record

    def _issue(
        self,
        key: identity.PublicKey,
        holders: tuple[Holder, ...],
        now_s: float,
        life_s: float,
        *,
        enrolled_again: bool = False,
    ) -> Certificate:
        """Issue, and put the certificate on record before anybody sees it."""
        certificate = identity.issue(self.certificate, self._key, key, holders, now_s=now_s, life_s=life_s)
        issued = _record_of(certificate, now_s)
        for holder in holders:
            record = self._holder(holder)
            usable = _usable(record.certificates, now_s)
            revoked_s = 0.0 if enrolled_again else record.revoked_s
            self._write_holder(HolderRecord(holder, (*usable, issued), revoked_s))
        return certificate

    def _holder(self, holder: Holder) -> HolderRecord:
        path = self._holder_file(holder)
        return _read(path, HolderRecord) if path.exists() else HolderRecord(holder)

    def _list(self) -> revocation.RevocationList:
        data = read_if_there(self.revocation_file)
        return revocation.open_list(data, self.certificate) if data else revocation.RevocationList()

    def _end_tokens(self, holder: Holder, now_s: float) -> int:
        waiting = [one for one in self.tokens() if one.holder == holder and one.state(now_s) != "expired"]
        for record in waiting:
            self._token_file(record.id).unlink(missing_ok=True)
        return len(waiting)

    def _forget_old_tokens(self, now_s: float) -> None:
        for record in self.tokens():
            if now_s > record.expires_s + USED_TOKEN_KEPT_S:
                self._token_file(record.id).unlink(missing_ok=True)

    def _token_file(self, token_id: str) -> Path:
        return self.directory / "tokens" / f"{token_id}.json"

    def _holder_file(self, holder: Holder) -> Path:
        return self.directory / "holders" / holder.role.value / f"{identity.check_name(holder.name)}.json"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateNotWritten(f"could not lock {self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def init(directory: Path, cluster: str, *, now_s: float) -> Authority:
    """Make a new authority in ``directory``; raises AuthorityError where one is already."""
    if (directory / "ca.crt").exists():
        raise AuthorityError(
            f"{directory} holds an authority already", hint="every certificate depends on it; choose another --dir"
        )
    make_private_directory(directory)
    make_private_directory(directory / "tokens")
    make_private_directory(directory / "holders")
    # A key without a certificate is what a crash of an earlier attempt left: it was never used.
    key_file = directory / "ca.key"
    kept = read_if_there(key_file)
    key = identity.load_key(kept) if kept else identity.new_key()
    if not kept:
        create_private(key_file, identity.key_pem(key))
    write_private(directory / "revocations", revocation.seal(revocation.RevocationList(0, now_s), key))
    certificate = identity.new_authority(cluster, key, now_s=now_s)
    write_private(directory / "ca.crt", identity.certificate_pem(certificate))
    (directory / "ca.crt").chmod(0o644)
    sync_directory(directory)
    return Authority(directory)


def _record_of(certificate: Certificate, issued_s: float) -> IssuedRecord:
    return IssuedRecord(
        identity.serial_text(certificate),
        issued_s,
        identity.expiry_s(certificate),
        identity.key_fingerprint(identity.public_key(certificate)),
    )


def _usable(certificates: tuple[IssuedRecord, ...], now_s: float) -> tuple[IssuedRecord, ...]:
    """Those that could still be used or renewed. Of the expired ones only the newest: it alone is anybody's last."""
    living = tuple(one for one in certificates if one.expires_s > now_s)
    expired = [one for one in certificates if now_s - identity.GRACE_S < one.expires_s <= now_s]
    return (*expired[-MAX_EXPIRED_KEPT:], *living)


def _json(record: TokenRecord | HolderRecord) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def _read(path: Path, kind: type[Record]) -> Record:
    try:
        return msgspec.json.decode(read_private(path), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AuthorityError(f"{path} is damaged: {error}", hint="remove it or restore it from a backup") from error
