"""The store on a real directory: what a change of files becomes, and how soon."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store_following import following, key, run, service

from isthmus.model.cluster import Key
from isthmus.model.findings import Code
from isthmus.store.change import Origin
from isthmus.store.directory import DirectoryStore


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


def test_an_empty_directory_is_an_empty_cluster(directory: Path) -> None:
    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            assert not seen.objects
            assert not seen.findings
            assert seen.changes[0].origin is Origin.DIRECTORY

    run(scenario)


def test_a_change_names_exactly_the_objects_that_changed(directory: Path) -> None:
    file = directory / "all.yaml"
    file.write_text("---\n".join(service(f"s{i}", f"10.96.0.{i + 1}") for i in range(20)))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            assert len(seen.objects) == 20
            file.write_text(file.read_text().replace("10.96.0.7\n", "10.96.1.7\n"))
            await seen.until(lambda: seen.address("s6") == "10.96.1.7")
            assert [obj.key for obj in seen.changes[-1].put] == [key("s6")]
            assert not seen.changes[-1].dropped
            assert seen.changes[-1].counters.documents_read_total == 21

    run(scenario)


def test_a_changed_line_count_moves_what_follows_without_changing_it(directory: Path) -> None:
    file = directory / "all.yaml"
    file.write_text("---\n".join(service(f"s{i}") for i in range(3)))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            before = seen.objects[key("s2")].source.line
            file.write_text("# a comment\n" + file.read_text())
            await seen.until(lambda: len(seen.changes) > 1)
            assert not seen.changes[-1].put
            assert seen.objects[key("s2")].source.line == before + 1

    run(scenario)


def test_a_change_is_live_within_a_tenth_of_a_second(directory: Path) -> None:
    file = directory / "web.yaml"
    file.write_text(service("web"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            times_s = []
            for i in range(2, 12):
                file.write_text(service("web", f"10.96.0.{i}"))
                times_s.append(await seen.until(lambda i=i: seen.address("web") == f"10.96.0.{i}"))
            assert sorted(times_s)[5] < 0.1, times_s

    run(scenario)


def test_a_broken_document_keeps_its_last_good_state_until_it_is_mended(directory: Path) -> None:
    file = directory / "web.yaml"
    file.write_text(service("web") + "---\n" + service("api", "10.96.0.2"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            broken = service("web").replace("80", "eighty") + "---\n" + service("api", "10.96.0.3")
            file.write_text(broken)
            await seen.until(lambda: seen.address("api") == "10.96.0.3")
            assert seen.address("web") == "10.96.0.1"
            (problem,) = seen.findings
            assert (problem.file, problem.line, problem.field) == ("web.yaml", 9, "spec.ports[0].port")
            assert seen.changes[-1].counters.broken_documents == 1
            file.write_text(service("web", "10.96.0.9"))
            await seen.until(lambda: not seen.findings)
            assert seen.address("web") == "10.96.0.9"
            assert key("api") not in seen.objects

    run(scenario)


def test_a_file_that_is_no_yaml_any_more_keeps_all_it_had(directory: Path) -> None:
    file = directory / "web.yaml"
    file.write_text(service("web") + "---\n" + service("api", "10.96.0.2"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            file.write_text("{{ broken")
            await seen.until(lambda: Code.SYNTAX in seen.codes)
            assert set(seen.objects) == {key("web"), key("api")}
            assert seen.changes[-1].counters.retained_objects == 2
            file.unlink()
            await seen.until(lambda: not seen.objects)
            assert not seen.findings

    run(scenario)


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (lambda file: file.write_bytes(b"a: \xff\xfe"), Code.ENCODING),
        (lambda file: file.write_text("a: b".ljust(10), "utf-16"), Code.ENCODING),
        (lambda file: file.symlink_to("nowhere"), Code.UNREADABLE),
        (lambda file: os.mkfifo(file), Code.UNREADABLE),
    ],
    ids=["not UTF-8", "UTF-16", "dangling link", "a pipe"],
)
def test_a_file_that_cannot_be_read_keeps_what_it_gave(
    directory: Path, write: Callable[[Path], None], code: Code
) -> None:
    file = directory / "web.yaml"
    file.write_text(service("web"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            fresh = directory / ".fresh"
            write(fresh)
            fresh.rename(file)
            await seen.until(lambda: code in seen.codes)
            assert key("web") in seen.objects
            file.unlink()
            file.write_text(service("web", "10.96.0.5"))
            await seen.until(lambda: seen.address("web") == "10.96.0.5")
            assert not seen.findings

    run(scenario)


def test_a_mounted_configmap_is_followed_through_its_swaps(directory: Path) -> None:
    def mount(version: str, address: str) -> None:
        (directory / version).mkdir()
        (directory / version / "web.yaml").write_text(service("web", address))
        (directory / "..tmp").symlink_to(version)
        (directory / "..tmp").rename(directory / "..data")

    mount("..v1", "10.96.0.1")
    (directory / "web.yaml").symlink_to("..data/web.yaml")

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            assert list(seen.objects) == [key("web")]
            mount("..v2", "10.96.0.2")
            shutil.rmtree(directory / "..v1")
            await seen.until(lambda: seen.address("web") == "10.96.0.2")
            assert not seen.findings

    run(scenario)


def test_an_editor_that_renames_leaves_no_gap(directory: Path) -> None:
    file = directory / "web.yaml"
    file.write_text(service("web"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            (directory / ".web.yaml.swp").write_text("garbage: [")
            (directory / "4913").write_text("")
            (directory / "4913").unlink()
            file.rename(directory / "web.yaml~")
            file.write_text(service("web", "10.96.0.2"))
            await seen.until(lambda: seen.address("web") == "10.96.0.2")
            assert not any(change.dropped for change in seen.changes)
            assert not seen.findings

    run(scenario)


def test_a_directory_that_vanishes_keeps_the_last_good_state_and_is_followed_when_it_is_back(directory: Path) -> None:
    (directory / "web.yaml").write_text(service("web"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            shutil.rmtree(directory)
            await seen.until(lambda: Code.STORE_MISSING in seen.codes)
            assert list(seen.objects) == [key("web")]
            directory.mkdir()
            (directory / "api.yaml").write_text(service("api"))
            await seen.until(lambda: set(seen.objects) == {key("api")})
            assert not seen.findings

    run(scenario)


def test_a_directory_that_is_swapped_for_another_is_read_anew(directory: Path) -> None:
    (directory / "web.yaml").write_text(service("web"))
    other = directory.with_name("other")
    other.mkdir()
    (other / "web.yaml").write_text(service("web", "10.96.0.8"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            directory.rename(directory.with_name("old"))
            other.rename(directory)
            await seen.until(lambda: seen.address("web") == "10.96.0.8")

    run(scenario)


def test_new_subdirectories_are_read_and_hidden_ones_are_not(directory: Path) -> None:
    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            for name in ("team/a", ".git"):
                (directory / name).mkdir(parents=True)
                (directory / name / "x.YAML").write_text(service("web" if name == "team/a" else "hidden"))
            await seen.until(lambda: key("web") in seen.objects)
            assert seen.objects[key("web")].source.file == "team/a/x.YAML"
            shutil.rmtree(directory / "team")
            (directory / "y.json").write_text('{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}')
            await seen.until(lambda: set(seen.objects) == {Key("Namespace", "", "shop")})

    run(scenario)


def test_the_second_of_two_definitions_is_reported_and_takes_over_when_the_first_goes(directory: Path) -> None:
    (directory / "a.yaml").write_text(service("web", "10.96.0.1"))
    (directory / "b.yaml").write_text(service("web", "10.96.0.2"))

    async def scenario() -> None:
        async with following(DirectoryStore(directory)) as seen:
            assert seen.address("web") == "10.96.0.1"
            (problem,) = seen.findings
            assert (problem.code, problem.file) == (Code.DUPLICATE_OBJECT, "b.yaml")
            assert "a.yaml:1" in problem.text
            (directory / "a.yaml").unlink()
            await seen.until(lambda: seen.address("web") == "10.96.0.2")
            assert not seen.findings
            assert not seen.changes[-1].dropped

    run(scenario)
