"""The command ``isthmus``: finds the command's file, runs it, and turns every error into one message and an exit code.

Exit codes: 0 fine, 1 found a problem, 2 wrong use, 130 interrupted, 141 the reader of our output went away (as a shell
reports SIGPIPE). A command's module is imported when that command is invoked, so that ``isthmus status`` does not pay
for the agent's imports.
"""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from isthmus import __version__
from isthmus.model.errors import IsthmusError, UsageError

DEBUG_VARIABLE = "ISTHMUS_DEBUG"
EXIT_PROBLEM = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Entry(NamedTuple):
    """A command: the line it has in ``isthmus --help``, and whether it has commands of its own."""

    help: str
    group: bool = False


COMMANDS = {
    "status": Entry("Say whether this node is healthy, and what to do if not."),
    "dump": Entry("List services, endpoints, links or rules."),
    "trace": Entry("Say what happens to a connection, hop by hop, and why."),
    "doctor": Entry("Check this node, from the kernel to its peers."),
    "agent": Entry("Run this node's agent."),
    "relay": Entry("Run a relay, where nodes behind NATs meet."),
    "ca": Entry("Make the certificate authority, or serve it.", group=True),
    "token": Entry("Create the token with which a node enrols.", group=True),
    "node": Entry("Revoke a node.", group=True),
    "lab": Entry("Whole clusters on this machine, in network namespaces.", group=True),
    "uninstall": Entry("Remove everything of Isthmus from this node."),
}
"""Every command NAME is the file ``cli/NAME.py``, which holds a typer application called ``app``."""


def load(name: str) -> Any:
    """Import the file of a command and return its click command."""
    application: typer.Typer = import_module(f"isthmus.cli.{name}").app
    application.rich_markup_mode = None
    build = typer.main.get_group if COMMANDS[name].group else typer.main.get_command
    command = build(application)
    command.name = name
    command.help = command.help or COMMANDS[name].help
    return command


class LazyGroup(TyperGroup):
    """Lists commands from ``COMMANDS`` without importing them; imports the one that is invoked."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help, rich_markup_mode=None))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """As in click, but with the real command in place of the line that stands for it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"isthmus {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show where an error arose.")] = False,
) -> None:
    """Isthmus: a service name works from any site of a cluster that stretches from the cloud to the edge."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def exit_code_of(error: BaseException) -> int:
    """The exit code an error ends the process with."""
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_PROBLEM


def describe(error: Exception) -> str:
    """One message for a person: what failed, the stable code, what to do."""
    if isinstance(error, IsthmusError):
        message, code, hint = error.message, getattr(error, "reason", error.code), error.hint
    elif isinstance(error, OSError):
        message, code, hint = str(error), "system", ""
    else:
        message, code = f"{type(error).__name__}: {error}", "internal"
        hint = "this is a fault of isthmus itself; `isthmus --debug …` shows where it arose"
    first = f"isthmus: {message} [{code}]"
    return f"{first}\n  {hint}" if hint else first


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; prints errors, never a traceback (unless asked to).

    Raises BrokenPipeError, which only the owner of the process can deal with.
    """
    group = typer.main.get_command(app)
    try:
        with group.make_context("isthmus", list(arguments)) as context:
            group.invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except typer.TyperException as error:
        _show_wrong_use(error)
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE, "").lower() not in ("", "0", "false", "no"):
            raise
        sys.stdout.flush()
        print(describe(error), file=sys.stderr)
        return exit_code_of(error)
    return 0


def _show_wrong_use(error: Any) -> None:
    # The types of options are checked by pydantic, which begins its sentences in its own way.
    error.message = error.message.replace("Value error, ", "")
    error.show()


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a ✓ on a terminal without one is a ?, not a crash
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer must not raise again when the interpreter flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    sys.exit(code)
