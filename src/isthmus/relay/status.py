"""What a relay says of itself: one JSON document to whoever connects to ``relay.sock`` in the run directory."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

SOCKET_NAME = "relay.sock"
DEADLINE_S = 5.0


class ChannelRow(msgspec.Struct, frozen=True):
    """A node with a control channel."""

    node: str
    observed: str
    serial: str
    since: float
    streams: int


class RelayReport(msgspec.Struct, frozen=True):
    """``relay.sock``. Times are seconds since the epoch; ``state`` is that of the relay's own certificate."""

    name: str
    version: str
    pid: int
    started_at: float
    listen: str
    issuer: bool
    state: str
    serial: str
    expires_at: float
    error: str
    nodes: list[ChannelRow]
    announced: int
    joined: int
    pending: int
    strangers: int
    revocation_list: int
    revoked: int
    descriptors: int
    counters: dict[str, int]


class StatusSocket:
    """Answers every connection with a fresh report, and closes."""

    def __init__(self, path: Path, report: Callable[[], RelayReport]) -> None:
        self._path = path
        self._report = report
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen; a socket that a crash left behind is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._answer, self._path)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop, and remove the socket."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                writer.write(msgspec.json.encode(self._report()) + b"\n")
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        writer.transport.abort()


async def read_report(run_directory: Path) -> RelayReport:
    """The report of a relay on this machine; raises OSError (TimeoutError) where none answers."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_unix_connection(run_directory / SOCKET_NAME)
        try:
            return msgspec.json.decode(await reader.read(), type=RelayReport)
        finally:
            writer.close()


def open_descriptors() -> int:
    """How many descriptors this process holds; -1 when there is none left to look with."""
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return -1
