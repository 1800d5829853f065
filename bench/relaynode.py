"""linknode.py with control channels: a data worker for measurements, whose links go over a relay. One JSON argument.

    {"node": "a", "port": 20006, "files": [CA, CERTIFICATE, KEY], "address": "10.77.2.1:20006",
     "relays": [["r1", "10.77.4.1:20004"]], "listen": [["127.0.0.1", 4000, "b", "127.0.0.1", 5000]]}

Prints one JSON line when a relay holds this node, a second one when it holds another node too.
"""

import asyncio
import json
import sys
import threading

from isthmus.link.control import ControlClient
from isthmus.link.link import Link
from isthmus.loop.loop import Loop
from isthmus.model.settings import RelayAddress
from isthmus.wire.announcement import Announcement
from isthmus.wire.tls import TlsFiles
from isthmus.wire.worker import Credentials, Dial, DialFailed, FromWorker, NeedConnection, PathSpec, PutPeer

if __package__:
    from bench.linknode import PlainConnector, listen
else:
    from linknode import PlainConnector, listen


class Control:
    """The control process's part, in a thread of its own."""

    def __init__(self, spec: dict[str, object], loop: Loop) -> None:
        self._loop = loop
        self._asyncio = asyncio.new_event_loop()
        self.link: Link
        self._said = 0
        node = str(spec["node"])
        relays = [RelayAddress(*relay) for relay in spec["relays"]]  # type: ignore[attr-defined]
        asyncio.set_event_loop(self._asyncio)
        self._client = ControlClient(node, relays, self)
        self._client.use(TlsFiles(*spec["files"]))  # type: ignore[misc]
        self._client.announce(Announcement(node, 0, 0.0, addresses=(str(spec["address"]),)))

    def run(self) -> None:
        self._asyncio.run_until_complete(self._client.run(asyncio.Event()))

    def heard(self, message: FromWorker) -> None:
        if isinstance(message, NeedConnection):
            self._asyncio.call_soon_threadsafe(self._client.need, message)

    def peer_announced(self, peer: Announcement) -> None:
        self.relays_changed()

    def peer_gone(self, node: str, reason: str) -> None:
        pass

    def relays_changed(self) -> None:
        here = [relay for relay in self._client.relays() if relay.connected]
        peers = [peer.node for peer in self._client.peers()]
        for node in peers:
            paths = tuple(PathSpec("relayed", relay.address, relay.name) for relay in here if node in relay.present)
            self._hand(PutPeer(node, paths))
        level = (1 if here else 0) + (1 if here and peers else 0)
        for number in range(self._said, level):
            print(json.dumps({"level": number + 1}), flush=True)
        self._said = max(self._said, level)

    def dial(self, message: Dial) -> None:
        self._hand(message)

    def announcement_signed(self, signed: bytes) -> None:
        pass

    def dial_failed(self, message: DialFailed) -> None:
        self._hand(message)

    def revoked(self, signed: bytes, serials: frozenset[str]) -> None:
        pass

    def _hand(self, message: PutPeer | Dial | DialFailed) -> None:
        self._loop.call_threadsafe(lambda: self.link.handle(message))


def main() -> None:
    spec = json.loads(sys.argv[1])
    loop = Loop()
    control = Control(spec, loop)
    control.link = Link(loop, control.heard, PlainConnector(loop), port=spec["port"])
    control.link.handle(Credentials(*spec["files"]))
    control.link.start()
    for entry in spec.get("listen", []):
        listen(loop, control.link, entry)
    threading.Thread(target=control.run, name="control", daemon=True).start()
    loop.run()


if __name__ == "__main__":
    main()
