"""What tests of labs share: polling with a deadline, making labs from text, and looking for what they left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from isthmus.lab.cluster import Lab

POLL_S = 0.1


def eventually(condition: Callable[[], object], deadline_s: float = 6.0, what: str = "") -> object:
    """Poll until ``condition()`` is true and return its value; fail after ``deadline_s``.

    An AssertionError within the condition counts as "not yet", and the last one is what the failure says.
    """
    end = time.monotonic() + deadline_s
    while True:
        why: object = ""
        try:
            if value := condition():
                return value
        except AssertionError as error:
            why = error
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline_s} s: {what or condition} {why}")
        time.sleep(POLL_S)


def heed_ctrl_c() -> None:
    """For ``preexec_fn``: what a shell starts in the background, and so all below it, ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def residue(name: str) -> dict[str, list[str]]:
    """What exists of lab ``name`` on this machine: namespaces, mounts, files, processes."""
    from isthmus.lab.processes import processes_in
    from isthmus.lab.removal import BASE_DIRECTORY
    from isthmus.lab.resident import NETNS_DIRECTORY
    from isthmus.lab.topology import prefix

    start = prefix(name)
    namespaces = [path.name for path in NETNS_DIRECTORY.glob(f"{start}*")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if start in line]
    files = [str(path) for path in Path("/etc/netns").glob(f"{start}*")]
    files += [str(path) for path in BASE_DIRECTORY.glob(name)]
    processes = [f"{pid} in {where}" for pid, where in processes_in(namespaces).items()]
    processes += [text for text in command_lines() if start in text or f"/{name}/" in text]
    return {"namespaces": namespaces, "mounts": mounts, "files": files, "processes": processes}


def command_lines() -> Iterator[str]:
    """The command lines of all processes: those of a lost namespace are found by the lab's name in them."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


class LabMaker:
    """Makes labs from YAML text, and takes down what it made."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: list[Lab] = []

    def __call__(self, text: str, *, name: str, manifests: Path | None = None, base: Path | None = None) -> Lab:
        """Bring up the lab that ``text`` describes as ``name``; ``manifests`` replaces the file's directory."""
        import msgspec

        from isthmus.lab.cluster import Lab
        from isthmus.lab.loader import parse_lab_file

        # Two runs of the tests on one machine must not meet.
        unique = f"t{os.getpid() % 0x10000:x}{name}"[:12]
        file = msgspec.structs.replace(parse_lab_file(text, "test.yaml", self._directory), name=unique)
        if manifests:
            file = msgspec.structs.replace(file, manifests=str(manifests))
        lab = Lab(file, base) if base else Lab(file)
        self._made.append(lab)
        lab.up()
        return lab

    def clean(self) -> None:
        for lab in self._made:
            lab.down()
        leaks = {lab.name: residue(lab.name) for lab in self._made if any(residue(lab.name).values())}
        assert not leaks, f"left behind: {leaks}"
