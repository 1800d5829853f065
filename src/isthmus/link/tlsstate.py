"""The contexts in use, changed as credentials are renewed. Connections that exist keep the certificate they showed."""

import ssl

from isthmus.wire.tls import ALPN_LINK, ALPN_REVERSE, TlsFiles, client_context, normal_serial, server_context
from isthmus.wire.worker import Credentials


class TlsState:
    """Contexts for new handshakes, and the revoked serial numbers. Without credentials ``ready`` is False."""

    def __init__(self) -> None:
        self._client: ssl.SSLContext | None = None
        self._client_reverse: ssl.SSLContext | None = None
        self._server: ssl.SSLContext | None = None
        self.revoked: frozenset[str] = frozenset()

    @property
    def ready(self) -> bool:
        return self._server is not None

    def load(self, credentials: Credentials) -> None:
        """Use these from now on. Raises TlsError and keeps the old ones where they cannot be read."""
        files = TlsFiles(credentials.ca_file, credentials.certificate_file, credentials.key_file)
        client = client_context(files, (ALPN_LINK,))
        reverse = client_context(files, (ALPN_REVERSE,))
        server = server_context(files)
        self._client, self._client_reverse, self._server = client, reverse, server
        self.revoked = frozenset(normal_serial(serial) for serial in credentials.revoked)

    def client(self, *, reverse: bool) -> ssl.SSLContext:
        """For dialling: as the one who opens streams, or (``reverse``) as the one who accepts them."""
        context = self._client_reverse if reverse else self._client
        assert context is not None
        return context

    def server(self) -> ssl.SSLContext:
        assert self._server is not None
        return self._server
