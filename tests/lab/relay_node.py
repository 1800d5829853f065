"""A node without pods: real identity, real control channel, and the dialling that a data worker would do.

Usage: python relay_node.py NAME STATE_DIRECTORY ADDRESS RELAY_ADDRESS...
Reads commands from standard input (``connect NODE RELAY``), writes events as lines of JSON.
"""

import asyncio
import json
import sys
import time

from isthmus.agent.identity import NodeIdentity
from isthmus.link.control import ControlClient
from isthmus.model.settings import AgentSettings, RelayAddress
from isthmus.wire.announcement import Announcement
from isthmus.wire.ticket import AnswerReader, preamble
from isthmus.wire.tls import TlsFiles
from isthmus.wire.worker import Dial, DialFailed, NeedConnection


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, "at": time.time(), **fields}), flush=True)


class Node:
    """Tells everything; dials what it is told to, and echoes what comes over a pair it did not ask for."""

    def __init__(self, name: str, state: str, address: str, relays: list[str]) -> None:
        self.name = name
        named = tuple(RelayAddress(f"r{number}", relay) for number, relay in enumerate(relays, 1))
        self.settings = AgentSettings(node=name, state_directory=state, issuer=relays[0], relays=named)
        self.control = ControlClient(name, named, self)
        self.control.announce(Announcement(name, 0, 0.0, addresses=(address,)))
        self.identity = NodeIdentity(self.settings, changed=self._changed, revocations=self.control.adopt_revocations)
        self.requests = 0
        self.tasks: set[asyncio.Task[None]] = set()

    def _changed(self, files: TlsFiles) -> None:
        self.control.use(files)
        say("credentials", serial=self.identity.status().serial)

    def peer_announced(self, peer: Announcement) -> None:
        say("announced", node=peer.node, addresses=peer.addresses)

    def peer_gone(self, node: str, reason: str) -> None:
        say("gone", node=node, reason=reason)

    def relays_changed(self) -> None:
        states = self.control.relays()
        say("relays", connected=[one.name for one in states if one.connected], present=sorted(states[0].present))

    def dial(self, message: Dial) -> None:
        say("dial", node=message.node, kind=message.kind, address=message.address, role=message.role)
        if message.ticket:
            task = asyncio.get_running_loop().create_task(self._dial(message))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def announcement_signed(self, signed: bytes) -> None:
        pass

    def dial_failed(self, message: DialFailed) -> None:
        say("failed", node=message.node, reason=message.reason)

    def revoked(self, signed: bytes, serials: frozenset[str]) -> None:
        self.identity.adopt_revocations(signed)
        say("revocations", count=len(serials))

    async def _dial(self, message: Dial) -> None:
        host, port = message.address.rsplit(":", 1)
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(preamble(bytes.fromhex(message.ticket)))
            answer = AnswerReader()
            while data := await reader.read(1):
                if answer.feed(data):
                    break
            else:
                raise EOFError("the relay closed the connection")
            if message.role == "client":
                writer.write(f"hello from {self.name}".encode())
                say("heard", text=(await reader.read(100)).decode())
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
            say("ended", node=message.node)
        except Exception as error:
            say("broken", node=message.node, error=str(error))

    async def run(self) -> None:
        stop = asyncio.Event()
        self.identity.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.identity.run(stop))
            tasks.create_task(self.control.run(stop))
            tasks.create_task(self._commands())

    async def _commands(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := (await reader.readline()).decode().split():
            self.requests += 1
            self.control.need(NeedConnection(self.requests, line[1], "relayed", line[2]))


if __name__ == "__main__":
    asyncio.run(Node(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]).run())
