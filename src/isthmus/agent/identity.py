"""This node's certificate, as the agent keeps it: settings in, messages for workers and rows for ``status`` out."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from isthmus.model.settings import AgentSettings
from isthmus.relay.credentials import Credentials as KeptCredentials
from isthmus.relay.credentials import Snapshot, State
from isthmus.relay.keystore import KeyStore, Stored
from isthmus.wire.identity import Holder, Role, check_name
from isthmus.wire.local import IdentityStatus
from isthmus.wire.registry import Registry
from isthmus.wire.tls import TlsFiles
from isthmus.wire.worker import Credentials

TOKEN_VARIABLE = "ISTHMUS_TOKEN"  # noqa: S105 - a variable's name
CLOCK_TOLERANCE_S = 120.0


class NodeIdentity:
    """The identity of a node's agent.

    ``changed(files)`` is called with new credentials, also for those found on disk by ``start``;
    ``revocations(signed)`` with a newer signed list that the issuer gave. Both on the event loop.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        changed: Callable[[TlsFiles], None],
        revocations: Callable[[bytes], None],
        has_channel: Callable[[], bool] = lambda: False,
        token: str = "",
    ) -> None:
        """``token`` wins over the environment and the file. ``has_channel``: a relay would push revocations to us."""
        self._settings = settings
        self._changed = changed
        self._revocations = revocations
        self._token_text = token
        self._store = KeyStore(Path(settings.state_directory) / "identity")
        self._kept = KeptCredentials(
            self._store,
            Holder(Role.NODE, check_name(settings.node)),
            issuers=issuers(settings),
            token=self._token,
            changed=self._new,
            revoked=revocations,
            poll_revocations=lambda: not has_channel(),
        )

    def start(self) -> None:
        """Load what is on disk. Raises IsthmusError where the state directory cannot be used."""
        stored = self._kept.load()
        if stored is not None:
            self._new(stored)
            if signed := self._store.revocations():
                self._revocations(signed)

    async def run(self, stop: asyncio.Event) -> None:
        """Enrol and renew until ``stop``."""
        await self._kept.run(stop)

    @property
    def ready(self) -> bool:
        """Whether there are credentials to use."""
        return self._kept.stored is not None

    @property
    def files(self) -> TlsFiles | None:
        """The credentials' files."""
        return self._kept.stored.files if self._kept.stored else None

    def adopt_revocations(self, signed: bytes) -> None:
        """A list that a relay pushed: kept on disk, and our own revocation is noticed. Raises IsthmusError."""
        self._kept.adopt_revocations(signed)

    def message(self, registry: Registry | None) -> Credentials | None:
        """What workers are told, or None without credentials."""
        files = self.files
        if files is None:
            return None
        revoked = tuple(sorted(registry.revoked_serials)) if registry else ()
        return Credentials(files.ca_file, files.certificate_file, files.key_file, revoked)

    def status(self) -> IdentityStatus:
        """For the local API."""
        now: Snapshot = self._kept.snapshot()
        return IdentityStatus(now.state, now.serial, now.expires_s, now.renews_s, now.issuer, now.error)

    def trouble(self) -> tuple[str, str, str] | None:
        """Code, severity and text of what a person should know; None when all is well."""
        now = self._kept.snapshot()
        if now.state is State.NONE:
            hint = f"; put a token from `isthmus token create --node {self._settings.node}` into {self.token_file}"
            return "identity.none", "error", (now.error or "this node has no certificate") + hint
        if now.state is State.REVOKED:
            return "identity.revoked", "error", now.error
        if now.state is State.EXPIRED:
            return "identity.expired", "error", f"this node's certificate has expired: {now.error or 'renewing'}"
        if now.state is State.ENROLLING and now.error:
            return "identity.enrolling", "error", now.error
        if now.error:
            return "identity.renewal", "warning", now.error
        if abs(now.clock_offset_s) > CLOCK_TOLERANCE_S:
            return "identity.clock", "warning", f"this clock and the issuer's are {now.clock_offset_s:+.0f} s apart"
        return None

    @property
    def token_file(self) -> Path:
        """Where a token is looked for."""
        return Path(self._settings.token_file or Path(self._settings.state_directory) / "token")

    def _new(self, stored: Stored) -> None:
        self._changed(stored.files)

    def _token(self) -> str:
        if text := self._token_text or os.environ.get(TOKEN_VARIABLE, ""):
            return text
        try:
            return self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""


def issuers(settings: AgentSettings) -> list[str]:
    """Where a renewal is asked for: the setting ``issuer``, then every relay (one of them may hold the issuer)."""
    addresses = [settings.issuer] if settings.issuer else []
    return addresses + [relay.address for relay in settings.relays if relay.address not in addresses]
