"""The local API's server: frames of JSON on a Unix socket that only root may open."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from isthmus.model.errors import IsthmusError, UsageError
from isthmus.wire.frames import FrameError, FrameReader, encode
from isthmus.wire.local import Failure, Response, json_encoder, request_decoder

log = structlog.get_logger(__name__)

Answerer = Callable[[dict[str, str]], Awaitable[Any]]

REQUEST_BYTES = 64 * 1024
IDLE_S = 30.0
MAX_CLIENTS = 64


class LocalApi:
    """Serves ``answerers`` by name. A question that fails is answered with the error's code and hint."""

    def __init__(self, path: Path, answerers: Mapping[str, Answerer]) -> None:
        self._path = path
        self._answerers = answerers
        self._clients = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``; the socket file is removed at the end."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._serve, path=str(self._path), limit=REQUEST_BYTES)
        finally:
            os.umask(mask)
        async with server:
            await stop.wait()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        frames = FrameReader(REQUEST_BYTES)
        try:
            while data := await asyncio.wait_for(reader.read(REQUEST_BYTES), IDLE_S):
                for frame in frames.feed(data):
                    writer.write(encode(json_encoder.encode(await self._answer(frame))))
                    await writer.drain()
        except (TimeoutError, ConnectionError, FrameError):
            pass
        finally:
            self._clients -= 1
            writer.close()

    async def _answer(self, frame: bytes) -> Response:
        try:
            request = request_decoder.decode(frame)
            answerer = self._answerers.get(request.what)
            if answerer is None:
                known = ", ".join(sorted(self._answerers))
                raise UsageError(f"the agent was asked for '{request.what}'", hint=f"it answers {known}")
            return Response(data=await answerer(request.arguments))
        except IsthmusError as error:
            return Response(failure=Failure(error.code, error.message, error.hint))
        except msgspec.MsgspecError as error:
            return Response(failure=Failure(UsageError.code, f"the question cannot be read: {error}"))
        except Exception as error:
            log.exception("question failed")
            return Response(failure=Failure("agent.internal", f"the agent failed to answer: {type(error).__name__}"))
