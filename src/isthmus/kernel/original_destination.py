"""Where an intercepted TCP connection was going.

Three ways, one for each situation: the netfilter socket option (include/uapi/linux/netfilter_ipv4.h, SO_ORIGINAL_DST,
and ip6_tables.h, IP6T_SO_ORIGINAL_DST, both 80) after DNAT; conntrack's record (conntrack.py) after DNAT on a kernel
whose option must not be called; the socket's own name after TPROXY.

Linux 4.15.6 and some vendor kernels take the socket's lock twice in that option: the caller sleeps for ever in state
D and cannot be killed. So a child process tries the call first, once a boot and kernel release (``Trial``).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from isthmus.files import StateNotWritten, write_private
from isthmus.kernel.conntrack import Conntrack, NotIntercepted
from isthmus.kernel.sockets import Address, parse_sockaddr, peer_of
from isthmus.model.errors import KernelError

SO_ORIGINAL_DST = 80

TRIAL_DEADLINE_S = 2.0
TRIAL_FILE = "original-destination.json"

Reader = Callable[[socket.socket], Address]


def original_destination(sock: socket.socket) -> Address:
    """Where the connection was going before DNAT: one system call, about a microsecond.

    For a connection made to the listener directly it returns the listener's own address. NotIntercepted where
    conntrack has no record. Never call it where the trial has not ended well.
    """
    try:
        if sock.family == socket.AF_INET:
            return parse_sockaddr(sock.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16))
        return parse_sockaddr(sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
    except OSError as error:
        raise NotIntercepted(f"reading the original destination: {error.strerror}") from error


def own_name(sock: socket.socket) -> Address:
    """The address the socket answers for: after TPROXY, the original destination."""
    return peer_of(sock.getsockname())


class Method(StrEnum):
    """How a TCP connection's original destination is learnt on this kernel."""

    GETSOCKOPT = "so-original-dst"
    TPROXY = "tproxy"


def reader(method: Method, listeners: Collection[Address]) -> Reader:
    """The function to call for each connection that one of ``listeners`` (addresses and ports) accepts.

    With TPROXY a connection may still have come through DNAT, from a bridge whose packets TPROXY cannot take
    (docs/interception.md): then its own name is the listener's, and conntrack's record tells.
    """
    if method is Method.GETSOCKOPT:
        return original_destination
    records: list[Conntrack] = []

    def name_or_record(sock: socket.socket) -> Address:
        name = own_name(sock)
        if name not in listeners:
            return name
        if not records:
            records.append(Conntrack())
        return records[0].record(socket.IPPROTO_TCP, peer_of(sock.getpeername()), name).destination

    return name_or_record


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the trial found, and on which boot of which kernel. ``reason`` is for ``status``; '' where all is well.

    ``stuck_pid`` is the child that never came back (0: none). It is reported, never waited for.
    """

    boot_id: str
    release: str
    method: Method
    reason: str = ""
    stuck_pid: int = 0


# The child: both families, unconnected, then connected over loopback where loopback is up. Any errno is a good
# answer: the call returned. Isolated and without site-packages it runs in some 15 ms.
_CHILD = """
import socket
for family, level, size, here in ((2, 0, 16, "127.0.0.1"), (10, 41, 28, "::1")):
    try:
        a, b = socket.socket(family, 1), socket.socket(family, 1)
        try:
            b.getsockopt(level, 80, size)
        except OSError:
            pass
        a.bind((here, 0)); a.listen(1)
        b.settimeout(0.5); b.connect(a.getsockname())
        a.accept()[0].getsockopt(level, 80, size)
    except OSError:
        pass
"""
TRIAL_COMMAND: tuple[str, ...] = (sys.executable, "-I", "-S", "-c", _CHILD)


class Trial:
    """Tries the socket option in a child under a deadline, and remembers the finding for this boot and kernel."""

    def __init__(
        self,
        state_dir: Path,
        boot_id: str,
        *,
        release: str = "",
        command: Sequence[str] = TRIAL_COMMAND,
        deadline_s: float = TRIAL_DEADLINE_S,
    ) -> None:
        self._file = state_dir / TRIAL_FILE
        self._boot_id = boot_id
        self._release = release or os.uname().release
        self._command = tuple(command)
        self._deadline_s = deadline_s

    def finding(self) -> Finding:
        """The remembered finding, else a new trial; returns within the deadline and half a second."""
        known = self._remembered()
        if known is not None:
            return known
        # Written before the trial: an agent that is killed while its child hangs must not start another one.
        self._remember(self._hung(0, "an earlier trial of SO_ORIGINAL_DST did not end"))
        finding = self._try()
        self._remember(finding)
        return finding

    def _try(self) -> Finding:
        try:
            child = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise KernelError(f"starting the trial of SO_ORIGINAL_DST: {error.strerror}") from error
        if _ended(child, self._deadline_s):
            return Finding(self._boot_id, self._release, Method.GETSOCKOPT)
        state = _state_of(child.pid)
        child.send_signal(signal.SIGKILL)
        gone = _ended(child, 0.25)
        if not gone:
            child.returncode = -signal.SIGKILL  # so that Popen's destructor neither waits nor complains
        outcome = "it was killed" if gone else f"process {child.pid} is stuck and was left behind"
        reason = f"SO_ORIGINAL_DST did not return within {self._deadline_s:g} s (state {state}); {outcome}"
        return self._hung(0 if gone else child.pid, reason)

    def _hung(self, pid: int, reason: str) -> Finding:
        return Finding(self._boot_id, self._release, Method.TPROXY, f"{reason}, on kernel {self._release}", pid)

    def _remembered(self) -> Finding | None:
        try:
            finding = msgspec.json.decode(self._file.read_bytes(), type=Finding)
        except (OSError, msgspec.DecodeError):  # absent, cut off, or of another release: try again
            return None
        same = finding.boot_id == self._boot_id and finding.release == self._release
        return finding if same else None

    def _remember(self, finding: Finding) -> None:
        text = json.dumps(msgspec.to_builtins(finding), indent=2) + "\n"
        try:
            write_private(self._file, text.encode())
        except StateNotWritten:  # a full disk costs one more trial at the next start, nothing else
            pass


def _ended(child: "subprocess.Popen[bytes]", within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while child.poll() is None:
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(0.005)
    return True


def _state_of(pid: int) -> str:
    """The state letter of /proc/PID/stat, or '?'; the name in parentheses may hold anything, so count from its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"
