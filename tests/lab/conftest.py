"""Fixtures for tests that need a lab: real namespaces, NATs, processes. Tests that ask for none are left alone."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import LabMaker, eventually, residue

__all__ = ["eventually", "lab_name", "make_lab", "make_module_lab", "make_session_lab"]


def _makers(directory: Path) -> Iterator[LabMaker]:
    if os.geteuid() != 0:
        pytest.skip("a lab needs root")
    maker = LabMaker(directory)
    try:
        yield maker
    finally:
        maker.clean()


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[LabMaker]:
    """Make labs for one test; after it nothing of them may be left."""
    yield from _makers(tmp_path)


@pytest.fixture(scope="module")
def make_module_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabMaker]:
    """The same for a module."""
    yield from _makers(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def make_session_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabMaker]:
    """The same for the whole run."""
    yield from _makers(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def lab_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for a lab that the command line brings up; whatever the test does, the lab is down after it."""
    from isthmus.lab.removal import take_down

    chosen = f"c{os.getpid() % 0x10000:x}{zlib.crc32(request.node.name.encode()):x}"[:12]
    yield chosen
    take_down(chosen)
    assert not any(residue(chosen).values())
