"""Asks this node's agent over its Unix socket; the protocol is that of wire/local.py.

Every question has one deadline, from connect to the last byte of the answer.
"""

import errno
import socket
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from isthmus.model.errors import IsthmusError, UsageError
from isthmus.wire import frames
from isthmus.wire.local import Failure, Request, json_encoder

DEFAULT_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 256 * 1024 * 1024

Answer = TypeVar("Answer")


class AgentAbsent(IsthmusError):
    """No process listens on the agent's socket."""

    code = "agent.absent"


class AgentNotPermitted(IsthmusError):
    """The socket is there and may not be used by this user."""

    code = "agent.not-permitted"


class AgentSlow(IsthmusError):
    """The agent did not answer within the deadline."""

    code = "agent.slow"


class AgentGarbled(IsthmusError):
    """The agent's answer cannot be read: most often another release answers."""

    code = "agent.garbled"


class AgentRefused(IsthmusError):
    """The agent answered that it cannot answer; ``reason`` is the code it gave, which is what is shown."""

    code = "agent.refused"

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"the agent cannot answer: {failure.message}", hint=failure.hint)
        self.reason = failure.code


class _Reply(msgspec.Struct, frozen=True):
    data: msgspec.Raw = msgspec.Raw(b"null")
    failure: Failure | None = None


class LocalAgent:
    """One agent, by the path of its socket. Each question is a connection of its own."""

    def __init__(self, path: Path, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.path = path
        self.timeout_s = timeout_s

    def ask(self, what: str, answer: type[Answer], arguments: dict[str, str] | None = None) -> Answer:
        """Return the answer to ``what``, decoded as ``answer``. Raises the errors of this file."""
        body = self._exchange(json_encoder.encode(Request(what, arguments or {})))
        try:
            reply = msgspec.json.decode(body, type=_Reply)
            if reply.failure is None:
                return msgspec.json.decode(reply.data, type=answer)
        except msgspec.DecodeError as error:
            raise AgentGarbled(
                f"the agent's answer to “{what}” cannot be read: {error}",
                hint="command and agent are probably of different releases: restart the agent",
            ) from error
        if reply.failure.code == UsageError.code:
            raise UsageError(reply.failure.message, hint=reply.failure.hint)
        raise AgentRefused(reply.failure)

    def rows(self, what: str, row: type[Answer]) -> list[Answer]:
        """Return the answer to a question that is answered with a list."""
        return self.ask(what, list[row])  # type: ignore[valid-type]

    def _exchange(self, body: bytes) -> bytes:
        deadline_s = time.monotonic() + self.timeout_s
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(self.timeout_s)
            try:
                self._connect(connection)
                connection.sendall(frames.encode(body))
                return self._read(connection, deadline_s)
            except TimeoutError as error:
                raise AgentSlow(
                    f"the agent on {self.path} did not answer within {self.timeout_s:g} s",
                    hint="it is busy or stuck: try a longer --timeout, then look at its log",
                ) from error
            except (ConnectionResetError, BrokenPipeError) as error:
                raise self._ended() from error

    def _connect(self, connection: socket.socket) -> None:
        try:
            connection.connect(str(self.path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AgentAbsent(
                f"no agent here: the socket {self.path} does not exist",
                hint="is the agent running? `isthmus agent --config FILE` starts it; "
                "--run-directory says where another agent keeps its socket",
            ) from error
        except ConnectionRefusedError as error:
            raise AgentAbsent(
                f"no agent here: nothing listens on {self.path}",
                hint="is the agent running? its socket was left behind, so it was killed or crashed: look at its log",
            ) from error
        except PermissionError as error:
            raise AgentNotPermitted(
                f"{self.path} may not be used by this user", hint="ask as root: the socket has mode 0600"
            ) from error
        except BlockingIOError as error:
            # A Unix socket whose backlog is full says EAGAIN where TCP would wait.
            raise TimeoutError from error
        except OSError as error:
            if error.errno is None:  # "AF_UNIX path too long" has no number
                raise AgentAbsent(f"{self.path} cannot be a socket: {error}", hint="use a shorter path") from error
            name = errno.errorcode.get(error.errno, "")
            raise AgentAbsent(f"{self.path} cannot be connected to: {error.strerror} ({name})") from error

    def _read(self, connection: socket.socket, deadline_s: float) -> bytes:
        reader = frames.FrameReader(MAX_ANSWER_BYTES)
        while True:
            connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
            data = connection.recv(1 << 20)
            if not data:
                raise self._ended()
            if complete := reader.feed(data):
                return complete[0]

    def _ended(self) -> AgentAbsent:
        return AgentAbsent(
            f"the agent on {self.path} closed the connection before it answered",
            hint="it is stopping or was killed: ask again, then look at its log",
        )
