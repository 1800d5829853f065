"""``isthmus uninstall``: which files it takes away and which it leaves, and how it stops an agent.

What it does to the kernel is in tests/lab/test_uninstall.py.
"""

import subprocess
import sys
import time

import pytest
from answering_agent import a_status, answering

from isthmus.cli import uninstall as command
from isthmus.cli.main import run
from isthmus.cli.uninstall import STATE_ENTRIES, AgentRunning, Outcome, listener_of, present, remove_files, stop_agent
from isthmus.kernel.devices import Device
from isthmus.kernel.interception import Reading
from isthmus.kernel.sysctls import Change
from isthmus.model.settings import AgentSettings


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "state" / "identity").mkdir(parents=True)
    (tmp_path / "state" / "identity" / "key.pem").write_text("secret")
    (tmp_path / "state" / "probe.json").write_text("{}")
    return AgentSettings(run_directory=f"{tmp_path}/run", state_directory=f"{tmp_path}/state")


def removed(settings, *, purge=False, dry_run=False):
    outcome = Outcome(dry_run)
    remove_files(settings, outcome, purge)
    assert not outcome.failed
    return outcome


def test_it_says_what_it_removed_and_keeps_keys_unless_told(settings, tmp_path):
    outcome = removed(settings)
    assert outcome.removed == [f"{tmp_path}/run"] and not (tmp_path / "run").exists()
    assert "--purge" in outcome.kept[0] and (tmp_path / "state/identity/key.pem").exists()


def test_purge_takes_what_is_ours_and_names_what_is_not(settings, tmp_path):
    (tmp_path / "state" / "notes.txt").write_text("mine")
    outcome = removed(settings, purge=True)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["notes.txt"]
    assert outcome.kept == [f"{tmp_path}/state: not ours: notes.txt"]


def test_purge_removes_the_directory_when_nothing_else_is_in_it(settings, tmp_path):
    removed(settings, purge=True)
    assert not (tmp_path / "state").exists()


def test_a_link_in_the_state_directory_is_removed_and_not_followed(settings, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (tmp_path / "state" / "store.msgpack").symlink_to(tmp_path / "elsewhere")
    removed(settings, purge=True)
    assert (tmp_path / "elsewhere" / "file").exists()


def test_a_second_time_there_is_nothing_to_do(settings):
    removed(settings, purge=True)
    assert removed(settings, purge=True) == Outcome(False)


def test_a_dry_run_changes_nothing(settings, tmp_path):
    outcome = removed(settings, purge=True, dry_run=True)
    assert f"{tmp_path}/state/identity" in outcome.removed and (tmp_path / "state/identity/key.pem").exists()


def test_a_running_agent_is_not_cleaned_under_its_feet(tmp_path):
    with answering(tmp_path, {"status": a_status()}), pytest.raises(AgentRunning, match="--force"):
        stop_agent(tmp_path / "agent.sock", Outcome(False), force=False)


STUBBORN = """
import signal, socket, sys, time
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()
time.sleep(60)
"""


@pytest.mark.parametrize(("kind", "says"), [("gentle", "stopped"), ("stubborn", "killed")])
def test_force_stops_an_agent_even_one_that_answers_nothing(tmp_path, monkeypatch, kind, says):
    monkeypatch.setattr(command, "STOP_S", 0.5)
    path, outcome = tmp_path / "agent.sock", Outcome(False)
    process = subprocess.Popen([sys.executable, "-c", STUBBORN, str(path), kind])
    deadline_s = time.monotonic() + 6
    while listener_of(path) != process.pid:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    stop_agent(path, outcome, force=True)
    assert process.wait(6) != 0
    assert f"agent, process {process.pid}, {says}" in outcome.removed[0]


def test_broken_settings_are_told(tmp_path, capsys):
    (tmp_path / "agent.yaml").write_text("runs: here\n")
    assert run(["uninstall", "--config", str(tmp_path / "agent.yaml")]) == 1
    assert "agent.yaml" in capsys.readouterr().err


def test_the_run_directory_may_come_from_the_environment(tmp_path, monkeypatch, capsys):
    """So it does within a lab's node: the agent there must be seen."""
    monkeypatch.setenv("ISTHMUS_RUN_DIRECTORY", str(tmp_path))
    with answering(tmp_path, {"status": a_status()}):
        run(["uninstall", "--dry-run"])
    assert "would remove: agent, process" in capsys.readouterr().out


@pytest.mark.parametrize("contents", [b"\xff\xfe", None])
def test_settings_that_cannot_be_read_are_wrong_use(tmp_path, capsys, contents):
    path = tmp_path / "agent.yaml"
    if contents is not None:
        path.write_bytes(contents)
    assert run(["uninstall", "--config", str(path)]) == 2
    assert "could not read the settings" in capsys.readouterr().err


def test_everything_the_kernel_holds_is_named():
    reading = Reading(
        Device(3, "dummy", True, True, frozenset()),
        frozenset({"rule4"}),
        (Change("net/x", "1", "2"),),
        {"nftables": "table inet isthmus"},
        0,
    )
    assert present(reading, "isthmus0") == [
        *("nftables rules", "routes for marked packets", "device isthmus0", "sysctl net/x: 2 -> 1"),
    ]
    foreign = Reading(Device(3, "dummy", True, False, frozenset()), frozenset(), (), {}, 0)
    assert present(foreign, "isthmus0") == []


def test_the_agents_own_files_are_known():
    agent = pytest.importorskip("isthmus.agent.agent")
    assert {agent.VIRTUAL_FILE, agent.OFFLINE_FILE} <= set(STATE_ENTRIES)
