"""One control channel: a node that showed its certificate. Reads its messages, sends its outbox, notices silence."""

import asyncio
import time
from typing import Protocol

import structlog

from isthmus.relay.outbox import Outbox
from isthmus.wire import control
from isthmus.wire.registry import Registry

log = structlog.get_logger(__name__)

READ_BYTES = 65_536
SEND_DEADLINE_S = 20.0
MESSAGES_A_SECOND = 500.0
BURST = 2_000.0


class Hub(Protocol):
    """What a channel needs of the relay."""

    registry: Registry

    def received(self, channel: "Channel", message: control.FromNode) -> None:
        """A message of the node, in order. Raises ControlError when the channel shall end."""


class Channel:
    """A node's control channel. ``close`` says why and ends it; ``run`` returns then."""

    def __init__(
        self,
        hub: Hub,
        node: str,
        serial: str,
        observed: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        outbox_bytes: int,
    ) -> None:
        self.node = node
        self.serial = serial
        self.observed = observed
        self.outbox = Outbox(outbox_bytes)
        self.greeted = False
        self.expires_s = 0.0
        self.since_s = time.time()
        self.why = ""
        self._hub = hub
        self._reader = reader
        self._writer = writer
        self._more = asyncio.Event()
        self._over = asyncio.Event()
        self._allowance = BURST
        self._refilled_s = time.monotonic()

    def send(self, message: control.FromRelay) -> None:
        """Queue an answer; a node that does not read its answers loses its channel."""
        if not self.outbox.put(message):
            self.close("slow", "answers are not read")
        self._more.set()

    def kick(self) -> None:
        """The outbox has something new."""
        self._more.set()

    def close(self, code: str, reason: str) -> None:
        """End the channel; the node is told why if it still reads."""
        if self._over.is_set():
            return
        self.why = code
        try:
            self._writer.write(self.outbox.take_answers() + control.pack(control.Goodbye(code, reason)))
        except (OSError, RuntimeError):
            pass
        self._over.set()

    async def run(self) -> None:
        """Serve until either side ends it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._read(), name=f"read {self.node}")
                sending = tasks.create_task(self._send(), name=f"send {self.node}")
                await self._over.wait()
                reading.cancel()
                sending.cancel()
        finally:
            self._writer.close()  # flushes the Goodbye if the node reads; the door aborts what is left

    async def _read(self) -> None:
        messages = control.NodeReader()
        while True:
            try:
                async with asyncio.timeout(control.SILENCE_S):
                    data = await self._reader.read(READ_BYTES)
            except TimeoutError:
                return self.close("silent", f"nothing was heard for {control.SILENCE_S:.0f} s")
            except OSError:
                return self.close("broken", "the connection broke")
            if not data:
                return self.close("left", "the node closed the channel")
            try:
                for message in messages.feed(data):
                    self._spend()
                    self._hub.received(self, message)
            except control.ControlError as error:
                return self.close("protocol", error.message)

    def _spend(self) -> None:
        now_s = time.monotonic()
        self._allowance = min(BURST, self._allowance + (now_s - self._refilled_s) * MESSAGES_A_SECOND)
        self._refilled_s = now_s
        if self._allowance < 1:
            raise control.ControlError(f"more than {MESSAGES_A_SECOND:.0f} messages a second")
        self._allowance -= 1

    async def _send(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while data := self.outbox.take(self._hub.registry):
                self._writer.write(data)
                try:
                    async with asyncio.timeout(SEND_DEADLINE_S):
                        await self._writer.drain()
                except TimeoutError:
                    return self.close("slow", "the node does not read")
                except OSError:
                    return self.close("broken", "the connection broke")
