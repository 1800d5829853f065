"""`isthmus ca`, `token`, `node` and `relay --status` from the command line: what they print, and their exit codes."""

import json
from pathlib import Path

import pytest

from isthmus.cli.main import run
from isthmus.wire import token


def isthmus(*arguments: str) -> int:
    return run(list(arguments))


@pytest.fixture
def directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """An authority."""
    assert isthmus("ca", "init", "--dir", str(tmp_path / "ca")) == 0
    capsys.readouterr()
    return str(tmp_path / "ca")


def test_a_second_init_is_refused(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert isthmus("ca", "init", "--dir", directory) == 1
    assert "[identity.authority]" in capsys.readouterr().err


def test_a_token_is_one_line_and_is_listed_without_its_secret(
    directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        isthmus("token", "create", "--node", "edge-1", "--ttl", "30m", "--issuer", "r:20004", "--dir", directory) == 0
    )
    text = capsys.readouterr().out
    made = token.decode(text)
    assert (made.name, made.address, text.count("\n")) == ("edge-1", "r:20004", 1)
    assert isthmus("token", "list", "-o", "json", "--dir", directory) == 0
    listed = capsys.readouterr().out
    (row,) = json.loads(listed)
    assert (row["role"], row["name"], row["state"]) == ("node", "edge-1", "waiting")
    assert row["expires_at"] - row["created_at"] == pytest.approx(1800)
    assert made.secret.hex() not in listed


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--node", "a", "--relay", "b"],
        ["--node", "Not A Name"],
        ["--node", "a", "--ttl", "5"],
        ["--node", "a", "--ttl", "31d"],
        ["--node", "a", "--ttl", "0s"],
    ],
)
def test_wrong_use_of_token_create_is_said_with_exit_code_2(
    directory: str, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert isthmus("token", "create", "--dir", directory, *wrong) == 2
    assert "[usage]" in capsys.readouterr().err


def test_nobody_is_revoked_who_has_nothing_and_a_waiting_token_can_be(
    directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isthmus("node", "revoke", "edge-1", "--dir", directory) == 1
    assert isthmus("token", "create", "--node", "edge-1", "--dir", directory) == 0
    assert isthmus("node", "revoke", "edge-1", "--dir", directory) == 0
    capsys.readouterr()
    assert isthmus("token", "list", "--dir", directory) == 0
    assert "No tokens" in capsys.readouterr().out


def test_a_missing_authority_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["token", "list"], ["node", "list"], ["ca", "show"]):
        assert isthmus(*command, "--dir", str(tmp_path / "none")) == 1
        assert "isthmus ca init" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 65])
def test_a_clusters_name_is_one_line_that_fits_into_a_certificate(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isthmus("ca", "init", "--dir", str(tmp_path / "ca"), "--cluster", name) == 2
    assert "[usage]" in capsys.readouterr().err
    assert not (tmp_path / "ca").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: relay\nlisten: [", "not YAML"),
        ("nmae: relay\n", "nmae"),
        ("streams-per-node: many\n", "streams-per-node"),
        ("name: Not A Name\n", "not a name"),
    ],
)
def test_a_wrong_setting_names_the_file_or_field(
    tmp_path: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text(text)
    assert isthmus("relay", "--config", str(path)) in (1, 2)
    assert reason in capsys.readouterr().err


def test_no_relay_is_a_problem_not_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text(f"run-directory: {tmp_path}\n")
    assert isthmus("relay", "--config", str(path), "--status") == 1
    assert "[relay.not-running]" in capsys.readouterr().err
