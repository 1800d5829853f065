"""Announcements between two agents at the start of every link connection: ours out, theirs to the control process.

The control process checks signatures; here they are bytes. So nodes that share no relay still learn of each other.
"""

from collections.abc import Callable

from isthmus.wire.worker import FromWorker, Heard


class Gossip:
    """What we announce, and where what we hear goes: each announcement of a peer once while it stays the same."""

    def __init__(self, send: Callable[[FromWorker], None]) -> None:
        self._send = send
        self._last: dict[str, tuple[bytes, ...]] = {}
        self.ours: tuple[bytes, ...] = ()

    def tell(self, peer: str, announcements: tuple[bytes, ...]) -> None:
        """Pass on what ``peer`` announced."""
        if self._last.get(peer) != announcements:
            self._last[peer] = announcements
            self._send(Heard(peer, announcements))
