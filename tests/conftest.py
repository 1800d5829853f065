"""For every suite: how hard hypothesis tries, and a guard that nothing outlives the run.

``ISTHMUS_TEST_PROFILE=thorough`` tries twenty times as many examples. Neither profile has a deadline an example:
a machine that others use is slow, which says nothing of the code.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

PROFILE_VARIABLE = "ISTHMUS_TEST_PROFILE"
RUN_VARIABLE = "ISTHMUS_TEST_RUN"
GRACE_S = 5.0

settings.register_profile("usual", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("usual"), max_examples=2000)
settings.load_profile(os.environ.get(PROFILE_VARIABLE, "usual"))


class Guard:
    """Finds what a run has left on the machine.

    Processes of the run are known by a variable in their environment. Namespaces and directories bear no such mark:
    what is there after and was not before is held against the run where it has the machine for itself, as in CI.
    """

    def __init__(self) -> None:
        self._mark = f"{RUN_VARIABLE}={os.getpid()}-{time.time_ns()}"
        os.environ.update([self._mark.split("=")])
        self._before = set(_places())
        self.left: list[str] = []
        self.perhaps: list[str] = []

    def look(self) -> None:
        """Wait for what is just ending, then note what is still there."""
        end = time.monotonic() + GRACE_S
        while (found := list(self._processes())) and time.monotonic() < end:
            time.sleep(0.1)
        self.left += found
        new = sorted(set(_places()) - self._before)
        (self.left if os.environ.get("CI") else self.perhaps).extend(new)

    def _processes(self) -> Iterator[str]:
        mark = self._mark.encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if int(path.name) != os.getpid() and mark in (path / "environ").read_bytes().split(b"\0"):
                    line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    yield f"process {path.name}: {line.strip()[:200]}"
            except OSError:
                continue


def _places() -> Iterator[str]:
    """Where tests make things that outlive a process."""
    for directory in ("/run/netns", "/etc/netns", "/run/isthmus-lab"):
        if Path(directory).is_dir():
            yield from (str(path) for path in Path(directory).iterdir())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if (place := line.split()[1]) not in ("/run/netns", "/run"):
            yield f"mount {place}"


GUARD = pytest.StashKey[Guard]()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in the workers of xdist: their parent looks after all of them
        config.stash[GUARD] = Guard()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if guard := session.config.stash.get(GUARD, None):
        guard.look()
        if guard.left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not (guard := config.stash.get(GUARD, None)):
        return
    if guard.left:
        terminalreporter.section("left behind by this run")
        for each in guard.left:
            terminalreporter.line(each)
    if guard.perhaps:
        first, count = guard.perhaps[0], len(guard.perhaps)
        terminalreporter.line(f"new on this machine, from this run or from others: {first} and {count - 1} more")
