"""The offline copy: what a start without the store knows, and what a bad copy or a full disk does."""

import asyncio
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
from store_following import following, key, run, service

from isthmus.model.findings import Code
from isthmus.store import offline
from isthmus.store.change import Origin
from isthmus.store.directory import DirectoryStore
from isthmus.store.offline import OfflineError, load, save


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


async def once(store: DirectoryStore) -> None:
    """Follow until the first change, then stop, which saves."""
    async with following(store):
        pass


def test_a_start_without_the_directory_serves_the_copy_and_says_so(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "state" / "store.copy"
    (directory / "web.yaml").write_text(service("web"))

    async def scenario() -> None:
        await once(DirectoryStore(directory, copy))
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        shutil.rmtree(directory)
        async with following(DirectoryStore(directory, copy)) as seen:
            assert seen.address("web") == "10.96.0.1"
            assert seen.changes[0].origin is Origin.OFFLINE_COPY
            assert seen.codes == {Code.STORE_MISSING, Code.STORE_OFFLINE}
            directory.mkdir()
            (directory / "web.yaml").write_text(service("web", "10.96.0.2"))
            await seen.until(lambda: seen.address("web") == "10.96.0.2" and not seen.findings)
            assert seen.changes[-1].origin is Origin.DIRECTORY

    run(scenario)


def test_a_start_with_the_copy_reads_no_document_again(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store.copy"
    (directory / "all.yaml").write_text("---\n".join(service(f"s{i}") for i in range(50)))

    async def scenario() -> None:
        await once(DirectoryStore(directory, copy))
        async with following(DirectoryStore(directory, copy)) as seen:
            assert len(seen.objects) == 50
            assert seen.changes[0].counters.documents_read_total == 0
            assert seen.objects[key("s3")].source.file == "all.yaml"

    run(scenario)


def test_the_last_good_state_of_a_broken_file_outlives_a_restart(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store.copy"
    file = directory / "web.yaml"
    file.write_text(service("web"))

    async def scenario() -> None:
        await once(DirectoryStore(directory, copy))
        file.write_text("{ broken")
        for _ in range(2):  # the second start has only what the first one kept
            async with following(DirectoryStore(directory, copy)) as seen:
                assert seen.address("web") == "10.96.0.1"
                assert seen.codes == {Code.SYNTAX}

    run(scenario)


def test_what_went_while_nobody_watched_is_not_served(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store.copy"
    (directory / "web.yaml").write_text(service("web"))

    async def scenario() -> None:
        await once(DirectoryStore(directory, copy))
        (directory / "web.yaml").unlink()
        async with following(DirectoryStore(directory, copy)) as seen:
            assert not seen.objects

    run(scenario)


@pytest.mark.parametrize("damage", [b"", b"\x92\xa1x", os.urandom(200)], ids=["empty", "cut short", "garbage"])
def test_a_damaged_copy_is_reported_and_not_used(directory: Path, tmp_path: Path, damage: bytes) -> None:
    copy = tmp_path / "store.copy"
    copy.write_bytes(damage)
    (directory / "web.yaml").write_text(service("web"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory, copy)) as seen:
            assert seen.address("web") == "10.96.0.1"
            assert seen.codes == {Code.OFFLINE_UNREADABLE}

    run(scenario)
    assert load(copy)


def test_a_copy_of_another_release_is_passed_over(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "store.copy"
    monkeypatch.setattr(offline, "FORMAT", "another")
    save(copy, [])
    monkeypatch.undo()
    assert load(copy) is None


def test_a_copy_that_cannot_be_saved_is_counted_and_harms_nothing(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "full" / "store.copy"
    copy.parent.write_text("a file where the directory should be")
    (directory / "web.yaml").write_text(service("web"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory, copy)) as seen:
            await seen.until(lambda: Code.OFFLINE_UNSAVED in seen.codes)
            assert seen.changes[-1].counters.save_failures_total == 1
            assert seen.address("web") == "10.96.0.1"

    run(scenario)


def test_a_save_that_fails_leaves_the_earlier_copy(tmp_path: Path) -> None:
    copy = tmp_path / "store.copy"
    save(copy, [])
    before = copy.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OfflineError, match="cannot save"):
            save(copy, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert copy.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["store.copy"]


def test_cancelling_ends_the_watch(directory: Path) -> None:
    async def scenario() -> None:
        stop = asyncio.Event()

        async def follow() -> None:
            async for _ in DirectoryStore(directory).changes(stop):
                pass

        task = asyncio.create_task(follow(), name="follow")
        await asyncio.sleep(0.1)
        task.cancel()
        async with asyncio.timeout(2):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not stop.is_set()

    run(scenario)
