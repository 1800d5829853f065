"""``isthmus uninstall``: removes everything of Isthmus from this node, whatever state it is in; safe to repeat."""

import os
import shutil
import signal
import socket as sockets
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from isthmus.cli.configuration import load_settings
from isthmus.cli.options import RUN_DIRECTORY_VARIABLE, TextFormat
from isthmus.cli.output import print_value, print_wrapped, styled
from isthmus.kernel.interception import STATE_FILE, Interception, Reading
from isthmus.kernel.original_destination import TRIAL_FILE
from isthmus.kernel.probe import PROBE_FILE
from isthmus.kernel.sysctls import STATE_FILE as SYSCTLS_FILE
from isthmus.model.errors import IsthmusError, KernelError
from isthmus.model.settings import AgentSettings
from isthmus.model.settings_text import decode
from isthmus.wire.local import SOCKET_NAME

app = typer.Typer(add_completion=False)

STOP_S = 15.0
POLL_S = 0.05
# The last five are the agent's, which is not imported here: what removes it must work where it does not.
STATE_ENTRIES = (
    STATE_FILE,
    SYSCTLS_FILE,
    TRIAL_FILE,
    PROBE_FILE,
    "virtual.msgpack",
    "store.msgpack",
    "identity",
    "token",
    "lock",
)


class AgentRunning(IsthmusError):
    """An agent runs: what is removed under it, it would put back."""

    code = "uninstall.agent-running"


class NotRemoved(IsthmusError):
    """Something of ours could not be removed; everything else was."""

    code = "uninstall.incomplete"


class Outcome(msgspec.Struct):
    """``isthmus uninstall -o json``. ``kept`` is what was left, and why."""

    dry_run: bool
    removed: list[str] = []
    kept: list[str] = []
    failed: list[str] = []


@app.command()
def uninstall(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The agent's settings file.", metavar="FILE")
    ] = None,
    run_directory: Annotated[
        Path | None,
        typer.Option(
            "--run-directory", envvar=RUN_DIRECTORY_VARIABLE, help="In place of the settings' own.", metavar="DIR"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be removed.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="Keys, certificate and the offline copy as well.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Stop a running agent first.")] = False,
    output: Annotated[TextFormat, typer.Option("--output", "-o", help="The form of the answer.")] = TextFormat.TEXT,
) -> None:
    """Remove everything of Isthmus from this node: rules, device, routes, kernel settings, run directory.

    What others have made stays as it is. Without --config the settings' defaults say where things are.
    """
    settings = _settings(config)
    if run_directory is not None:
        settings = msgspec.structs.replace(settings, run_directory=str(run_directory))
    outcome = Outcome(dry_run)
    before = [] if dry_run else _present(settings)
    stop_agent(Path(settings.run_directory) / SOCKET_NAME, outcome, force)
    if outcome.removed and not dry_run:
        left = _present(settings)
        outcome.removed += [f"{what}, by the agent as it stopped" for what in before if what not in left]
    _remove_interception(settings, outcome)
    remove_files(settings, outcome, purge)
    _print(outcome, output)
    if outcome.failed:
        raise NotRemoved(f"not everything was removed: {'; '.join(outcome.failed)}", hint="run it again as root")


def _settings(config: Path | None) -> AgentSettings:
    """The settings, unchecked: a node whose settings are wrong must be cleaned as well."""
    if config is None:
        return AgentSettings()
    return load_settings(config, lambda text, file: decode(text, AgentSettings, file))


def stop_agent(path: Path, outcome: Outcome, force: bool) -> None:
    """Stop the agent that listens on ``path``, if one does. Raises AgentRunning where that was not asked for."""
    pid = listener_of(path)
    if pid is None:
        return
    if outcome.dry_run:
        outcome.removed.append(f"agent, process {pid}, stopped (with --force)")
        return
    if not force:
        raise AgentRunning(
            f"an agent runs here, process {pid}, and would put back what is removed",
            hint="stop it first, or let --force do it",
        )
    outcome.removed.append(f"agent, process {pid}, {_end(pid)}")


def listener_of(path: Path) -> int | None:
    """The process that listens on a Unix socket, None where none does."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return None
        credentials = connection.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid


def _end(pid: int) -> str:
    """Stop a process gently, then not; how it ended."""
    descriptor = os.pidfd_open(pid)  # the number alone may mean another process by the time we signal
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if _ended(pid, STOP_S):
            return "stopped"
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return "killed, for it did not stop" if _ended(pid, STOP_S) else "does not end: the kernel holds it"
    finally:
        os.close(descriptor)


def _ended(pid: int, within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if not _alive(pid):
            return True
        time.sleep(POLL_S)
    return False


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def _interception(settings: AgentSettings) -> Interception:
    boot_id = Path(settings.boot_id_file).read_text().strip()
    return Interception(settings.intercept, Path(settings.state_directory), boot_id)


def _remove_interception(settings: AgentSettings, outcome: Outcome) -> None:
    try:
        interception = _interception(settings)
        if outcome.dry_run:
            outcome.removed += present(interception.read(), settings.intercept.device)
        else:
            outcome.removed += interception.remove().changed
    except (KernelError, OSError) as error:
        outcome.failed.append(str(error))


def _present(settings: AgentSettings) -> list[str]:
    """What is in the kernel now; what cannot be read is told when it cannot be removed."""
    try:
        return present(_interception(settings).read(), settings.intercept.device)
    except (KernelError, OSError):
        return []


def present(reading: Reading, device: str) -> list[str]:
    """What is there of ours, in words."""
    found = [f"{name} rules" for name in reading.rules]
    if reading.routes:
        found.append("routes for marked packets")
    if reading.device is not None and reading.device.ours:
        found.append(f"device {device}")
    return found + [f"sysctl {change.name}: {change.ours} -> {change.before}" for change in reading.sysctls]


def remove_files(settings: AgentSettings, outcome: Outcome, purge: bool) -> None:
    """Remove the run directory, and with ``purge`` what we made in the state directory."""
    _remove_entries(Path(settings.run_directory), (SOCKET_NAME,), outcome)
    if purge:
        _remove_entries(Path(settings.state_directory), STATE_ENTRIES, outcome)
    elif Path(settings.state_directory).exists():
        outcome.kept.append(f"{settings.state_directory}: keys and the offline copy; --purge removes them")


def _remove_entries(directory: Path, names: tuple[str, ...], outcome: Outcome) -> None:
    """Remove what we made in ``directory``, and the directory if nothing else is in it."""
    if not directory.is_dir():
        return
    ours = [directory / name for name in names if os.path.lexists(directory / name)]
    for path in ours:
        _attempt(lambda path=path: _delete(path), str(path), outcome)  # type: ignore[misc]
    left = [path.name for path in directory.iterdir() if path not in ours]
    if left:
        outcome.kept.append(f"{directory}: not ours: {', '.join(sorted(left))}")
    else:
        _attempt(directory.rmdir, str(directory), outcome)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _attempt(remove: Callable[[], None], what: str, outcome: Outcome) -> None:
    try:
        if not outcome.dry_run:
            remove()
        outcome.removed.append(what)
    except OSError as error:
        outcome.failed.append(f"{what}: {error.strerror}")


def _print(outcome: Outcome, output: TextFormat) -> None:
    if output is not TextFormat.TEXT:
        print_value(outcome, output)
        return
    for text in outcome.removed:
        print_wrapped(text, first="would remove: " if outcome.dry_run else "removed: ", indent=2)
    for text in outcome.kept:
        print_wrapped(text, first=styled("kept: ", "dim"), indent=2)
    if not outcome.removed and not outcome.failed:
        print("Nothing of Isthmus is in this node's kernel or run directory.")
