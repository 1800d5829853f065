"""Processes in namespaces: started with a pid file, found again by it, and found without it by their namespace.

A pid file holds the process id and the kernel's start time of the process, so that a number used again is not mistaken.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from isthmus.lab.resident import NETNS_DIRECTORY
from isthmus.model.errors import IsthmusError

_POLL_S = 0.01


class ProcessesRemain(IsthmusError):
    """Processes of the lab did not die of SIGKILL within the deadline."""

    code = "lab.processes-remain"


def in_namespace(namespace: str, command: Sequence[str]) -> list[str]:
    """Return ``command`` as it is run in ``namespace``; files in /etc/netns/NAMESPACE cover those in /etc there."""
    return ["ip", "netns", "exec", namespace, *command]


def spawn(namespace: str, command: Sequence[str], log: Path, pid_file: Path, cwd: Path) -> int:
    """Start ``command`` in ``namespace`` as a session of its own, output appended to ``log``; return its process id."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            in_namespace(namespace, command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
        )
    started = start_time(process.pid)
    pid_file.write_text(f"{process.pid} {started}\n")
    # The lab may end before its processes: nobody waits for them but whoever reads the pid file.
    process.returncode = 0
    return process.pid


def start_time(pid: int) -> int:
    """Return the start time of a living process in clock ticks since boot (proc(5), field 22), 0 if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def read_pid(pid_file: Path) -> int:
    """Return the id of the living process that ``pid_file`` names, else 0."""
    try:
        pid, started = (int(word) for word in pid_file.read_text().split())
    except (FileNotFoundError, ValueError):
        return 0
    if start_time(pid) == started and started:
        return pid
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a dead child of this very process would stay a zombie
    return 0


def stop(pid_file: Path, number: signal.Signals, deadline_s: float) -> bool:
    """Send a signal and wait until the process is gone; False if it still lives after ``deadline_s``."""
    pid = read_pid(pid_file)
    if not pid:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return wait_until(lambda: not read_pid(pid_file), deadline_s)


def wait_until(condition: Callable[[], bool], deadline_s: float) -> bool:
    """Poll ``condition`` every 10 ms; return whether it became true in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


def processes_in(namespaces: Iterable[str]) -> dict[int, str]:
    """Return {process id: namespace} of all living processes in ``namespaces``, never one of our own namespace."""
    own = Path("/proc/self/ns/net").stat()
    inodes: dict[int, str] = {}
    for name in namespaces:
        with contextlib.suppress(FileNotFoundError):
            found = (NETNS_DIRECTORY / name).stat()
            # A name without a namespace on it (a crash between the two) is an ordinary file of another device.
            if found.st_dev == own.st_dev and found.st_ino != own.st_ino:
                inodes[found.st_ino] = name
    members: dict[int, str] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or not inodes:
            continue
        with contextlib.suppress(OSError):
            inode = Path(f"/proc/{entry.name}/ns/net").stat().st_ino
            if inode in inodes and start_time(int(entry.name)):
                members[int(entry.name)] = inodes[inode]
    return members


def kill_all(namespaces: Sequence[str], deadline_s: float) -> None:
    """SIGKILL every process in ``namespaces`` until none is left. Raises ProcessesRemain."""
    end = time.monotonic() + deadline_s
    while members := processes_in(namespaces):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > end:
            text = ", ".join(f"{pid} in {name}" for pid, name in members.items())
            raise ProcessesRemain(
                f"cannot kill processes of the lab: {text}", hint="they may hang in the kernel (state D)"
            )
        time.sleep(_POLL_S)
