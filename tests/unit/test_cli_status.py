"""``isthmus status``: the first line says whether a person has to get up, and the exit code says it to programs."""

import json
import signal
import subprocess
import sys

import msgspec
import pytest
import yaml
from answering_agent import A_WARNING, AN_ERROR, NOW_S, a_status, answering

from isthmus.cli.main import run
from isthmus.explain.summary import State, summarise
from isthmus.explain.words import bytes_text, duration_text, join_text
from isthmus.wire.local import IdentityStatus, PeerStatus, RelayStatus, WorkerStatus


def lines_of(status, name):
    subsystem = next(one for one in summarise(status, NOW_S).subsystems if one.name == name)
    return subsystem.state, "\n".join((subsystem.text, *subsystem.more))


def changed(part, **changes):
    return a_status(**{part: msgspec.structs.replace(getattr(a_status(), part), **changes)})


@pytest.mark.parametrize(
    ("changes", "healthy", "headline"),
    [
        ({}, True, "node edge-1 (site home): healthy"),
        ({"site": ""}, True, "node edge-1: healthy"),
        ({"troubles": [A_WARNING]}, True, "node edge-1 (site home): healthy, 1 warning"),
        (
            {"troubles": [A_WARNING, AN_ERROR], "healthy": False},
            False,
            "node edge-1 (site home): NOT HEALTHY, 1 error and 1 warning",
        ),
        ({"troubles": [AN_ERROR]}, False, "node edge-1 (site home): NOT HEALTHY, 1 error"),  # whatever the agent says
        ({"healthy": False}, False, "node edge-1 (site home): NOT HEALTHY"),
    ],
)
def test_the_headline_says_whether_the_node_is_healthy(changes, healthy, headline):
    summary = summarise(a_status(**changes), NOW_S)
    assert (summary.healthy, summary.headline) == (healthy, headline)


def test_errors_stand_before_warnings():
    summary = summarise(a_status(troubles=[A_WARNING, AN_ERROR]), NOW_S)
    assert summary.troubles == (AN_ERROR, A_WARNING)


@pytest.mark.parametrize(
    ("status", "name", "state", "says"),
    [
        (a_status(), "store", State.OK, "12 Services, 30 EndpointSlices and 3 Nodes, changed 3 min 10 s ago"),
        (changed("store", problems=["a.yaml:3: x"]), "store", State.WARNING, "a.yaml:3: x"),
        (changed("store", offline=True), "store", State.WARNING, "serving the copy kept on disk"),
        (changed("interception", applied=False, error="no nft"), "interception", State.BROKEN, "no nft"),
        (changed("interception", repairs=2), "interception", State.OK, "repaired 2 times"),
        (a_status(workers=[WorkerStatus("data", 1, "ready", 0)]), "dns", State.OFF, "no DNS worker"),
        (a_status(workers=[WorkerStatus("dns", 1, "down", 3)]), "dns", State.BROKEN, "down"),
        (a_status(workers=[WorkerStatus("dns", 1, "ready", 3)]), "workers", State.WARNING, "3 restarts"),
        (a_status(workers=[]), "workers", State.BROKEN, "none"),
        (a_status(), "identity", State.OK, "valid for 23 h, renewed in 15 h"),
        (changed("identity", renews_at=NOW_S - 1), "identity", State.OK, "renewal is due"),
        (changed("identity", error="issuer away"), "identity", State.WARNING, "issuer away"),
        (
            a_status(identity=IdentityStatus("expired", expires_at=NOW_S - 60)),
            "identity",
            State.BROKEN,
            "expired 1 min ago",
        ),
        (a_status(identity=IdentityStatus("revoked")), "identity", State.BROKEN, "revoked"),
        (a_status(identity=IdentityStatus("none"), peers=[]), "identity", State.OFF, "has not enrolled"),
        (a_status(identity=IdentityStatus("none")), "identity", State.WARNING, "cannot reach other nodes"),
        (
            a_status(workers=[WorkerStatus("dns", 1, "ready", 0, {"udp 10.0.0.1": "53", "tcp 10.0.0.1": "53"})]),
            "dns",
            State.OK,
            "10.0.0.1 port 53 (udp and tcp)",
        ),
        (a_status(relays=[]), "relays", State.OFF, "none configured"),
        (a_status(relays=[RelayStatus("r", "x:1", False, error="refused")]), "relays", State.BROKEN, "(refused)"),
        (a_status(peers=[]), "peers", State.OFF, "no other node"),
        (a_status(peers=[PeerStatus("n", "", "store", [])]), "peers", State.WARNING, "n: NO PATH; known from store"),
    ],
)
def test_each_subsystem_has_a_line_with_its_state_and_reason(status, name, state, says):
    got, text = lines_of(status, name)
    assert got is state and says in text


def test_peers_without_a_path_stand_first():
    peers = [PeerStatus("a", "", "store", ["direct x"]), PeerStatus("b", "", "store", [])]
    _, text = lines_of(a_status(peers=peers), "peers")
    assert text.splitlines()[1].startswith("b: NO PATH")


@pytest.mark.parametrize(("troubles", "code"), [([], 0), ([A_WARNING], 0), ([AN_ERROR], 1)])
@pytest.mark.parametrize("output", ["text", "json", "yaml"])
def test_only_errors_make_exit_code_1_in_every_form(tmp_path, troubles, code, output):
    with answering(tmp_path, {"status": a_status(troubles=troubles)}):
        assert run(["status", "-o", output, "--run-directory", str(tmp_path)]) == code


def test_json_and_yaml_carry_every_field(tmp_path, capsys):
    with answering(tmp_path, {"status": a_status()}):
        run(["status", "-o", "json", "--run-directory", str(tmp_path)])
        as_json = json.loads(capsys.readouterr().out)
        run(["status", "-o", "yaml", "--run-directory", str(tmp_path)])
        assert yaml.safe_load(capsys.readouterr().out) == as_json == msgspec.to_builtins(a_status())


def test_watch_shows_again_until_interrupted_also_when_the_agent_is_away(tmp_path):
    command = [sys.executable, "-m", "isthmus", "status", "--watch", "--interval", "0.2"]
    process = subprocess.Popen([*command, "--run-directory", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert "no agent here" in process.stdout.readline()
    with answering(tmp_path, {"status": a_status()}):
        while "healthy" not in process.stdout.readline():
            pass
    while "no agent here" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=6)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (0.25, "250 ms"),
        (59.9, "59 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (3660, "1 h 1 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations_are_written_with_their_two_largest_units(seconds, text):
    assert duration_text(seconds) == text


def test_other_quantities_are_written_one_way():
    assert [bytes_text(n) for n in (0, 1023, 1536, 1 << 30)] == ["0 B", "1023 B", "1.5 KiB", "1.0 GiB"]
    assert [join_text(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
