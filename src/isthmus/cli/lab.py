"""``isthmus lab``: whole clusters on this machine, in network namespaces."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console

from isthmus.cli.options import Format
from isthmus.cli.output import Column, print_rows
from isthmus.lab.agents import wait_ready
from isthmus.lab.cluster import Lab, ProcessState
from isthmus.lab.examples import DEMO
from isthmus.lab.labfile import LabFile
from isthmus.lab.loader import check_name, load_lab_file
from isthmus.lab.removal import BASE_DIRECTORY, lab_names, take_down
from isthmus.lab.topology import Role
from isthmus.model.errors import NotPermitted, UsageError

app = typer.Typer(add_completion=False, no_args_is_help=True)

File = Annotated[Path | None, typer.Argument(help="The lab file; without one, the demo's.", metavar="FILE")]
Name = Annotated[str, typer.Option("--name", help="The lab's name; by default the file's, or the only lab there is.")]
Directory = Annotated[Path, typer.Option("--directory", help="Where the lab keeps its files.", metavar="DIR")]


@app.command()
def up(file: File = None, name: Name = "", directory: Directory = BASE_DIRECTORY) -> None:
    """Bring a lab up: sites, NATs, nodes, pods, relays, agents."""
    _need_root()
    lab = Lab(_lab_file(file, name), directory)
    console = Console(stderr=True)
    with _terminated_as_interrupted(), _down_if_interrupted(lab), console.status("") as status:
        lab.up(lambda step: status.update(f"lab {lab.name}: {step}"))
        status.update(f"lab {lab.name}: waiting for the agents")
        wait_ready(lab, lab.agent_nodes())
    running = sum(1 for process in lab.processes() if process.pid)
    nodes, pods = len(lab.topology.of(Role.NODE)), len(lab.topology.of(Role.POD))
    typer.echo(f"lab {lab.name} is up: {nodes} nodes, {pods} pods, {running} processes. Files: {lab.directory}")


@app.command()
def status(
    name: Name = "",
    output: Annotated[Format, typer.Option("--output", "-o", help="The form of the answer.")] = Format.TABLE,
) -> None:
    """Show a lab's nodes, pods and processes. Exit code 1 if a process is dead."""
    lab = _find(name)
    rows = place_rows(lab)
    print_rows(rows, COLUMNS, output, empty="The lab is empty.")
    dead = [process for process in lab.processes() if not process.pid]
    for process in dead:
        print(f"{process.kind} {process.name} is dead; its log: {process.log}", file=sys.stderr)
    if dead:
        raise typer.Exit(1)


class PlaceRow(msgspec.Struct, frozen=True):
    """``isthmus lab status``: one namespace. ``processes`` maps what runs there to its process id, 0 if it is dead."""

    role: str
    name: str
    site: str
    addresses: tuple[str, ...]
    namespace: str
    processes: dict[str, int]


COLUMNS = (
    Column[PlaceRow]("ROLE", lambda row: row.role),
    Column[PlaceRow]("NAME", lambda row: row.name),
    Column[PlaceRow]("SITE", lambda row: row.site, spare=2),
    Column[PlaceRow]("ADDRESSES", lambda row: ",".join(row.addresses)),
    Column[PlaceRow](
        "PROCESSES", lambda row: ", ".join(f"{what} {pid or 'dead'}" for what, pid in row.processes.items())
    ),
    Column[PlaceRow]("NAMESPACE", lambda row: row.namespace, spare=1),
)


def place_rows(lab: Lab) -> list[PlaceRow]:
    """Return the rows of ``isthmus lab status``."""
    running: dict[str, dict[str, int]] = {}
    for process in lab.processes():
        running.setdefault(_place_of(process, lab), {})[process.kind] = process.pid
    return [
        PlaceRow(place.role, place.label, place.site, place.addresses, place.namespace, running.get(place.label, {}))
        for place in lab.topology.places
    ]


@app.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    place: Annotated[
        str, typer.Argument(help="A node, host, pod (NAME or NAMESPACE/NAME) or SITE.router.", metavar="NODE-OR-POD")
    ],
    command: Annotated[list[str], typer.Argument(help="The command, after --.", metavar="-- COMMAND")],
    name: Name = "",
) -> None:
    """Run a command in a node or pod; its exit code is ours. In a node, `isthmus` commands find that node's agent."""
    separated = command[0] == "--"
    if not separated and command[0].startswith("-"):
        raise UsageError(f"{command[0]} stands where the command begins", hint="options go before the node or pod")
    if not command[separated:]:
        raise UsageError("there is no command after --", hint="for example: -- ip address")
    _need_root()
    lab = _find(name)
    argv = lab.command(place, command[separated:])
    _become(argv, lab.environment(place))


@app.command()
def logs(
    node: Annotated[str, typer.Argument(help="A node, host, relay or pod.", metavar="NODE")],
    name: Name = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is logged.")] = False,
) -> None:
    """Print what the processes of a node, host, relay or pod have logged."""
    lab = _find(name)
    names = (
        {node, lab.place(node).label} if any(node in _names(place.label) for place in lab.topology.places) else {node}
    )
    found = [each for each in lab.processes() if {each.name, _place_of(each, lab)} & names]
    if not found:
        raise UsageError(f"no process of lab '{lab.name}' is called '{node}'", hint="isthmus lab status")
    files = [str(process.log) for process in found]
    if follow:
        _become(["tail", "-n", "+1", "-f", *files], dict(os.environ))
    for process in found:
        if len(found) > 1:
            typer.echo(f"==> {process.kind} {process.name}")
        sys.stdout.write(process.log.read_text(errors="replace"))


@app.command()
def down(
    name: Name = "",
    every: Annotated[bool, typer.Option("--all", help="Every lab on this machine.")] = False,
) -> None:
    """Remove a lab: processes, namespaces, files; also what a crash left. Safe to repeat."""
    _need_root()
    names = lab_names() if every else [check_name(name) if name else _only(default=DEMO_NAME)]
    for each in names:
        existed = take_down(each)
        typer.echo(f"lab {each} is down" if existed else f"there was no lab {each}")


@app.command()
def demo(name: Name = "", directory: Directory = BASE_DIRECTORY) -> None:
    """Watch an edge pod behind a NAT call a cloud service by its name, step by step. Exit code 0 if all went well."""
    _need_root()
    from isthmus.lab.demo import run_demo

    lab = Lab(_lab_file(None, name), directory)
    with _terminated_as_interrupted(), _down_if_interrupted(lab):
        if not run_demo(lab, _Console()):
            raise typer.Exit(1)


DEMO_NAME = "demo"


class _Console(Console):
    """A console whose reader may go away: that ends the command as it ends every other of ours."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise BrokenPipeError from None


def _become(argv: list[str], environment: dict[str, str]) -> NoReturn:
    """Run ``argv`` in place of this process, with signals as a shell would have left them."""
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored stays so across exec
    os.execvpe(argv[0], argv, environment)  # noqa: S606 - no shell is the point


def _lab_file(file: Path | None, name: str) -> LabFile:
    lab = load_lab_file(file or DEMO)
    return msgspec.structs.replace(lab, name=check_name(name)) if name else lab


def _find(name: str) -> Lab:
    return Lab.find(check_name(name) if name else _only())


def _only(default: str = "") -> str:
    """Return the name of the only lab. Raises UsageError where there are none (without ``default``) or several."""
    names = lab_names()
    if len(names) > 1:
        raise UsageError(f"there are several labs: {', '.join(names)}", hint="choose one with --name")
    if not names and not default:
        raise UsageError("no lab is up", hint="isthmus lab up")
    return names[0] if names else default


def _place_of(process: ProcessState, lab: Lab) -> str:
    if process.kind == "relay":
        return next((relay.at for relay in lab.file.relays if relay.name == process.name), "")
    return process.name.replace(".", "/", 1) if process.kind == "pod" else process.name


def _names(label: str) -> tuple[str, str]:
    """What a place may be called by: its label, and a pod's name without its namespace."""
    return label, label.rpartition("/")[2]


def _need_root() -> None:
    if os.geteuid() != 0:
        raise NotPermitted("a lab is made of network namespaces, which needs root", hint="run it with sudo")


@contextmanager
def _down_if_interrupted(lab: Lab) -> Iterator[None]:
    """Ctrl-C leaves nothing: neither half a lab nor one whose agents nobody has waited for."""
    try:
        yield
    except KeyboardInterrupt:
        if lab.made:
            lab.down()
        typer.echo(f"interrupted: what was made of lab {lab.name} is removed", err=True)
        raise


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and a closed terminal clean up as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
