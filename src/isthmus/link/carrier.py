"""What proxy/ uses: streams and datagrams to endpoints of other nodes (model/ports.py)."""

from collections.abc import Callable
from socket import socket

from isthmus.link.peer import Peer, Room
from isthmus.link.pool import Wish
from isthmus.model.ports import CancelOpen, Outcome, StreamRequest
from isthmus.wire.worker import DropPeer, PutPeer

Opened = Callable[[Outcome, str], None]


class Carrier:
    """Implements StreamCarrier and DatagramCarrier over the peers that the control process names."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.peers: dict[str, Peer] = {}
        self._sessions: dict[int, Peer] = {}
        self._next_session = 0
        self._draining = False
        self.unknown_peers = 0

    # StreamCarrier.

    def carry(
        self,
        node: str,
        request: StreamRequest,
        client: socket,
        opened: Opened,
        ended: Callable[[int, int], None],
    ) -> CancelOpen:
        """See model/ports.py."""
        peer = self.peers.get(node)
        wish = Wish(request, client, opened, ended, self._room.main.loop.now_s + self._room.limits.wait_s)
        if peer is None or self._draining:
            self.unknown_peers += 1
            detail = "draining" if self._draining else f"node {node} is not known"
            self._room.main.loop.call_soon(lambda: None if wish.cancelled else opened(Outcome.NO_PATH, detail))
            return lambda: setattr(wish, "cancelled", True)
        pool = peer.pool
        pool.want(wish)
        return lambda: pool.cancel(wish)

    # DatagramCarrier.

    def open_session(
        self,
        node: str,
        request: StreamRequest,
        received: Callable[[bytes], None],
        closed: Opened,
    ) -> int:
        """See model/ports.py."""
        self._next_session = self._next_session % 0xFFFF_FFFF + 1
        number = self._next_session
        peer = self.peers.get(node)

        def over(outcome: Outcome, detail: str) -> None:
            if self._sessions.pop(number, None) is not None:
                closed(outcome, detail)

        if peer is None:
            self.unknown_peers += 1
            self._room.main.loop.call_soon(lambda: closed(Outcome.NO_PATH, f"node {node} is not known"))
        elif peer.udp.open(number, request, received, over):
            self._sessions[number] = peer
        else:
            self._room.main.loop.call_soon(lambda: closed(Outcome.EXHAUSTED, "too many sessions"))
        return number

    def send(self, session: int, payload: bytes) -> None:
        """See model/ports.py."""
        peer = self._sessions.get(session)
        if peer is not None:
            peer.udp.send(session, payload)

    def close_session(self, session: int) -> None:
        """See model/ports.py."""
        peer = self._sessions.pop(session, None)
        if peer is not None:
            peer.udp.close(session)

    # From Link.

    def put(self, message: PutPeer) -> None:
        peer = self.peers.get(message.node)
        if peer is None:
            peer = self.peers[message.node] = Peer(message.node, self._room)
        peer.put(message)

    def drop(self, message: DropPeer) -> None:
        peer = self.peers.pop(message.node, None)
        if peer is not None:
            peer.drop(message)

    def drain(self) -> None:
        """No new streams from here."""
        self._draining = True
