"""The command line as a whole: exit codes, one message an error, quick start, pipes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from answering_agent import LISTS, a_status, answering

from isthmus.cli import main
from isthmus.cli.main import COMMANDS, run
from isthmus.model.errors import IsthmusError, NotSupported, UsageError
from isthmus.wire import frames

ISTHMUS = [sys.executable, "-m", "isthmus"]


@pytest.fixture
def isthmus(capsys, tmp_path):
    def run_it(*arguments):
        code = run([*arguments])
        return code, *capsys.readouterr()

    return run_it


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "Usage: isthmus"),
        ("stats", "No such command 'stats'. Did you mean 'status'?"),
        ("status --foo", "No such option: --foo"),
        ("status more", "unexpected extra argument"),
        ("status -o xml", "'xml' is not one of 'text', 'json', 'yaml'"),
        ("status --timeout soon", "--timeout"),
        ("status --timeout 0", "--timeout"),
        ("dump", "Usage: isthmus dump"),
        ("dump pods", "'pods' is not one of 'services', 'endpoints', 'links', 'rules'"),
        ("dump links -o xml", "'xml' is not one of 'table', 'json', 'yaml'"),
        ("dump links --sort-by", "requires an argument"),
        ("trace onlyone", "DESTINATION"),
        ("trace host web:http", "“http” is no port"),
        ("trace host web -p sctp", "'sctp' is not one of 'tcp', 'udp'"),
        ("doctor -o table", "'table' is not one of 'text', 'json', 'yaml'"),
        ("uninstall --everything", "No such option: --everything"),
    ],
)
def test_wrong_use_is_told_apart_by_exit_code_2_and_one_sentence(isthmus, line, says):
    code, out, err = isthmus(*line.split())
    assert code == 2
    assert says in out + err and "Value error" not in err and "Traceback" not in err


@pytest.mark.parametrize("line", ["status", "dump links", "trace host 10.96.0.1:80"])
def test_a_missing_agent_is_a_problem_with_advice(isthmus, tmp_path, line):
    code, out, err = isthmus(*line.split(), "--run-directory", str(tmp_path))
    assert code == 1 and out == ""
    assert f"{tmp_path}/agent.sock does not exist [agent.absent]" in err and "is the agent running?" in err


def test_a_socket_left_behind_by_a_killed_agent_is_told_apart(isthmus, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "agent.sock"))
    code, _, err = isthmus("status", "--socket", str(tmp_path / "agent.sock"))
    assert code == 1 and "nothing listens on" in err and "left behind" in err


@pytest.fixture
def strange_agent(tmp_path):
    """An agent that accepts, and then sends what it is told to (nothing: stays silent)."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "agent.sock"))
        server.listen()
        yield server


def ask_strange(tmp_path, *more):
    command = [*ISTHMUS, "status", "--run-directory", str(tmp_path), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_an_agent_that_is_too_slow_is_given_up_at_the_deadline(strange_agent, tmp_path):
    started_s = time.monotonic()
    process = ask_strange(tmp_path, "--timeout", "0.3")
    _, err = process.communicate(timeout=6)
    assert process.returncode == 1 and "did not answer within 0.3 s [agent.slow]" in err
    assert 0.3 <= time.monotonic() - started_s < 3


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "agent.absent"),  # it ended before it answered
        (b"\xff\xff\xff\xff", "wire.frame"),  # not frames at all
        (frames.encode(b"garbage"), "agent.garbled"),
        (frames.encode(b'{"data": {"node": 1}}'), "agent.garbled"),  # another release
        (frames.encode(b'{"failure": {"code": "agent.busy", "message": "later"}}'), "agent.busy"),
    ],
)
def test_a_strange_answer_is_one_message_with_a_code(strange_agent, tmp_path, answer, code):
    process = ask_strange(tmp_path)
    connection, _ = strange_agent.accept()
    connection.recv(65536)
    connection.sendall(answer)
    connection.close()
    _, err = process.communicate(timeout=6)
    assert process.returncode == 1 and f"[{code}]" in err and "Traceback" not in err


def test_the_agents_own_failure_is_shown_with_its_code_and_hint(isthmus, tmp_path):
    with answering(tmp_path, {"status": NotSupported("no nftables here", hint="use iptables")}):
        code, _, err = isthmus("status", "--run-directory", str(tmp_path))
    assert code == 1
    assert err == "isthmus: the agent cannot answer: no nftables here [kernel.not-supported]\n  use iptables\n"


def test_a_question_the_agent_does_not_know_is_wrong_use(isthmus, tmp_path):
    with answering(tmp_path, {"links": []}):
        code, _, err = isthmus("status", "--run-directory", str(tmp_path))
    assert code == 2 and "it answers links" in err


def test_the_run_directory_may_come_from_the_environment(isthmus, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_RUN_DIRECTORY", str(tmp_path))
    with answering(tmp_path, LISTS):
        assert isthmus("dump", "links")[0] == 0


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("no"), 2), (IsthmusError("no"), 1), (OSError("no"), 1), (KeyError("no"), 1)]
)
def test_errors_become_exit_codes_and_no_traceback(isthmus, monkeypatch, error, code):
    def fail(name):
        raise error

    monkeypatch.setattr(main, "load", fail)
    got, _, err = isthmus("status")
    assert got == code and err.startswith("isthmus: ") and "Traceback" not in err


def test_debug_shows_where_an_error_arose(tmp_path):
    process = subprocess.run(
        [*ISTHMUS, "--debug", "status", "--run-directory", str(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == 1 and "Traceback" in process.stderr and "AgentAbsent" in process.stderr


def test_interrupted_is_130_and_quiet(strange_agent, tmp_path):
    process = ask_strange(tmp_path)
    connection, _ = strange_agent.accept()
    connection.recv(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=6)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_goes_away_is_quiet(tmp_path):
    with answering(tmp_path, LISTS):
        process = subprocess.Popen(
            [*ISTHMUS, "dump", "links", "--run-directory", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(6) == 141 and err == b""


def test_a_terminal_without_our_signs_shows_others_and_no_traceback():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "isthmus", "trace", "pod", "web:http"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, "?http? is no port" in done.stderr) == (2, True)


def test_the_version_is_printed():
    assert subprocess.run([*ISTHMUS, "--version"], capture_output=True, text=True).stdout.startswith("isthmus 0.")


def test_every_command_fits_on_its_line_of_the_help(isthmus):
    _, out, _ = isthmus("--help")
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.help)}$", out, re.MULTILINE)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_a_file_and_help(isthmus, name):
    code, out, _ = isthmus(name, "--help")
    assert code == 0 and f"Usage: isthmus {name}" in out


def test_help_and_status_start_at_once(tmp_path):
    """Processor time, for wall time belongs to whatever else runs on the machine; 0.25 s is what a person notices."""
    with answering(tmp_path, {"status": a_status()}):
        for arguments in (["--help"], ["status", "--run-directory", str(tmp_path)]):
            taken_s = min(_cpu_seconds(arguments) for _ in range(2))
            assert taken_s < 0.4, arguments


def _cpu_seconds(arguments: list[str]) -> float:
    pid = subprocess.Popen([*ISTHMUS, *arguments], stdout=subprocess.DEVNULL).pid
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_the_agents_modules_are_not_imported_for_status():
    code = (
        "import sys; from isthmus.cli.main import load; load('status'); "
        "print(sorted(m for m in sys.modules if m.startswith(('isthmus.agent', 'isthmus.kernel', 'asyncio', 'rich.'))))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_commands_are_the_files_of_the_room():
    files = {path.stem for path in Path(main.__file__).parent.glob("*.py")}
    assert set(COMMANDS) <= files
