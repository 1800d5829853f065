"""SO_ORIGINAL_DST is tried in a child under a deadline: real children, one of which hangs in state D."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from isthmus.kernel.original_destination import TRIAL_COMMAND, Finding, Method, Trial

# vfork suspends its parent uninterruptibly (state D) until the child execs or ends; the child here only sleeps.
HANGS_IN_STATE_D = (
    sys.executable,
    "-c",
    "import ctypes, time\nif ctypes.CDLL(None).vfork() == 0: time.sleep(5)",
)
IGNORES_SIGNALS = (sys.executable, "-c", "import time; time.sleep(5)")


def _trial(tmp_path: Path, command: tuple[str, ...]) -> Trial:
    return Trial(tmp_path, "boot-1", release="4.15.6", command=command, deadline_s=0.4)


def test_a_kernel_that_answers_is_used_as_it_is(tmp_path: Path) -> None:
    finding = Trial(tmp_path, "boot-1").finding()
    assert finding.method is Method.GETSOCKOPT
    assert finding.reason == ""


def test_a_call_that_hangs_in_state_d_selects_tproxy_and_says_why(tmp_path: Path) -> None:
    start = time.monotonic()
    finding = _trial(tmp_path, HANGS_IN_STATE_D).finding()
    assert time.monotonic() - start < 2
    assert finding.method is Method.TPROXY
    assert "state D" in finding.reason
    assert "4.15.6" in finding.reason


# Killed but never reaped: it is traced by a process that does not look, so for its parent it has not ended.
_TRACED = """
import ctypes, os, time
libc = ctypes.CDLL(None)
tracee = os.getpid()
libc.prctl(0x59616d61, -1, 0, 0, 0)
if os.fork() == 0:
    os.setsid()
    libc.ptrace(0x4206, tracee, 0, 0)
    time.sleep(3)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="tracing another process needs root")
def test_a_child_that_cannot_be_ended_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    finding = _trial(tmp_path, (sys.executable, "-c", _TRACED)).finding()
    assert time.monotonic() - start < 2
    assert finding.method is Method.TPROXY
    assert finding.stuck_pid > 0
    assert f"process {finding.stuck_pid} is stuck and was left behind" in finding.reason
    ended = time.monotonic() + 10  # the tracer lets go after three seconds; then the child can be reaped
    while time.monotonic() < ended and os.waitpid(finding.stuck_pid, os.WNOHANG)[0] == 0:
        time.sleep(0.1)


def test_the_trial_is_made_once_a_boot_and_kernel(tmp_path: Path) -> None:
    first = _trial(tmp_path, IGNORES_SIGNALS).finding()
    start = time.monotonic()
    assert _trial(tmp_path, IGNORES_SIGNALS).finding() == first
    assert time.monotonic() - start < 0.1, "no second child"
    assert Trial(tmp_path, "boot-2", release="4.15.6").finding().method is Method.GETSOCKOPT
    assert Trial(tmp_path, "boot-2", release="4.19.12").finding().method is Method.GETSOCKOPT


def test_an_agent_that_is_killed_during_the_trial_does_not_hang_another_child(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        Trial(tmp_path, "boot-1", release="4.15.6", command=IGNORES_SIGNALS, deadline_s=30).finding()
        os._exit(0)
    state = tmp_path / "original-destination.json"
    ended = time.monotonic() + 6
    while not state.exists():
        assert time.monotonic() < ended
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    finding = Trial(tmp_path, "boot-1", release="4.15.6", command=TRIAL_COMMAND).finding()
    assert finding.method is Method.TPROXY
    assert "did not end" in finding.reason


@pytest.mark.parametrize("content", [b"", b"{", b'{"boot_id": 1}', b"\xff\xfe"])
def test_a_state_file_that_cannot_be_read_means_a_new_trial(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "original-destination.json").write_bytes(content)
    assert Trial(tmp_path, "boot-1").finding() == Finding("boot-1", os.uname().release, Method.GETSOCKOPT)
