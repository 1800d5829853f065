"""One agent a state directory: two would undo each other's rules, and share a certificate."""

import fcntl
import os
from pathlib import Path

from isthmus.model.errors import IsthmusError

LOCK_FILE = "lock"


class AlreadyRunning(IsthmusError):
    """Another agent works with the same state directory."""

    code = "agent.already-running"


def hold_alone(state: Path) -> int:
    """Return a descriptor that holds ``state`` until this process ends, however it ends. Raises AlreadyRunning.

    A record lock (fcntl(2)): children do not inherit it, so a worker or a hung trial that outlives the agent
    holds nothing.
    """
    descriptor = os.open(state / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(
            f"an agent that keeps its state in {state} runs already", hint="isthmus status shows it"
        ) from None
    return descriptor
