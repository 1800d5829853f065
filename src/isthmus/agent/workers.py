"""Worker processes: started, fed, asked, and started again when they end."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from itertools import count

import msgspec
import structlog

from isthmus.model.errors import IsthmusError
from isthmus.wire.local import WorkerStatus
from isthmus.wire.worker import Answer, Ask, FromWorker, FromWorkerReader, Ready, ToWorker, pack

log = structlog.get_logger(__name__)

FIRST_RESTART_S = 0.1
LAST_RESTART_S = 5.0
STEADY_S = 10.0
STOP_S = 8.0
ASK_S = 3.0
READ_BYTES = 256 * 1024


class WorkerSilent(IsthmusError):
    """A worker did not answer a question in time, or is not running."""

    code = "agent.worker-silent"


class WorkerProcess:
    """One worker. ``config`` and ``welcome`` give what a new process needs: its settings as JSON, the full state.

    ``received`` gets what it says.
    """

    def __init__(
        self,
        name: str,
        module: str,
        config: Callable[[], bytes],
        welcome: Callable[[], Iterable[ToWorker]],
        received: Callable[[FromWorker], None],
    ) -> None:
        self.name = name
        self._module = module
        self._config = config
        self._welcome = welcome
        self._received = received
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._questions: dict[int, asyncio.Future[bytes]] = {}
        self._numbers = count(1)
        self._starts = 0
        self._detail: dict[str, str] = {}
        self.ready = asyncio.Event()

    def status(self) -> WorkerStatus:
        """What ``isthmus status`` shows."""
        running = self._process is not None
        state = "ready" if self.ready.is_set() else "starting" if running else "down"
        pid = self._process.pid if self._process else 0
        return WorkerStatus(self.name, pid, state, max(0, self._starts - 1), dict(self._detail))

    def send(self, message: ToWorker) -> None:
        """Send ``message`` if the worker runs; one that starts later gets the full state anyway."""
        if self._writer is not None:
            self._writer.write(pack(message))

    async def ask(self, what: str, arguments: dict[str, str] | None = None, timeout_s: float = ASK_S) -> bytes:
        """Return the worker's answer as MessagePack. Raises WorkerSilent."""
        if self._writer is None:
            raise WorkerSilent(f"the {self.name} worker was asked for {what}, but it is not running")
        number = next(self._numbers)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        self.send(Ask(number, what, arguments or {}))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise WorkerSilent(f"the {self.name} worker did not answer '{what}' within {timeout_s:g} s") from None
        finally:
            self._questions.pop(number, None)

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the worker running until ``stop``, then end it gently."""
        delay_s = FIRST_RESTART_S
        while not stop.is_set():
            started_s = time.monotonic()
            await self._serve(stop)
            if stop.is_set():
                return
            if time.monotonic() - started_s > STEADY_S:
                delay_s = FIRST_RESTART_S
            log.error("worker ended, starting it again", worker=self.name, delay_s=delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), delay_s)
            delay_s = min(delay_s * 2, LAST_RESTART_S)

    async def _serve(self, stop: asyncio.Event) -> None:
        ours, theirs = socket.socketpair()
        try:
            command = [sys.executable, "-m", self._module, "--fd", str(theirs.fileno())]
            self._process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                [*command, "--config", self._config().decode()], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        finally:
            theirs.close()
        self._starts += 1
        ours.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        for message in self._welcome():
            self.send(message)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read(reader), name=f"{self.name}-read")
            stopping = tasks.create_task(stop.wait(), name=f"{self.name}-stop")
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._end()
            reading.cancel()
            stopping.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        messages = FromWorkerReader()
        try:
            while data := await reader.read(READ_BYTES):
                for message in messages.feed(data):
                    self._handle(message)
        except (ConnectionError, IsthmusError, msgspec.MsgspecError) as error:
            log.error("worker's channel failed", worker=self.name, error=str(error))

    def _handle(self, message: FromWorker) -> None:
        if isinstance(message, Answer):
            future = self._questions.get(message.id)
            if future is not None and not future.done():
                future.set_result(bytes(message.data))
            return
        if isinstance(message, Ready):
            self._detail = dict(message.detail)
            self.ready.set()
        self._received(message)

    async def _end(self) -> None:
        process, self._process = self._process, None
        writer, self._writer = self._writer, None
        self.ready.clear()
        for future in self._questions.values():
            if not future.done():
                future.set_exception(WorkerSilent(f"the {self.name} worker ended before it answered"))
        if process is not None:
            if process.poll() is None:
                process.terminate()
            try:
                await asyncio.to_thread(process.wait, STOP_S)
            except subprocess.TimeoutExpired:
                log.error("worker does not stop, killing it", worker=self.name, pid=process.pid)
                process.kill()
                await asyncio.to_thread(process.wait)
        if writer is not None:
            writer.close()
