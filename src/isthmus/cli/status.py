"""``isthmus status``: is this node's agent healthy, and what to do if not."""

import sys
import time
from typing import Annotated

import typer

from isthmus.cli.client import DEFAULT_TIMEOUT_S, LocalAgent
from isthmus.cli.options import DEFAULT_RUN_DIRECTORY, RunDirectory, Socket, TextFormat, Timeout, agent_at
from isthmus.cli.output import print_value, print_wrapped, styled
from isthmus.explain.summary import State, Summary, advice_of, summarise
from isthmus.model.errors import IsthmusError
from isthmus.wire.local import Status

app = typer.Typer(add_completion=False)

NAME_WIDTH = 14
STATE_WIDTH = 9
INDENT = NAME_WIDTH + STATE_WIDTH
_STATE_STYLES = {State.OK: "good", State.WARNING: "warning", State.BROKEN: "bad", State.OFF: "dim"}
CLEAR_SCREEN = "\x1b[H\x1b[2J"


@app.command()
def status(
    output: Annotated[TextFormat, typer.Option("--output", "-o", help="The form of the answer.")] = TextFormat.TEXT,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every --interval.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.2, metavar="S", help="Seconds for --watch.")] = 2.0,
    run_directory: RunDirectory = DEFAULT_RUN_DIRECTORY,
    socket: Socket = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Say whether this node's agent is healthy, and what to do if not. Exit code 1 if it is not."""
    agent = agent_at(run_directory, socket, timeout_s)
    if watch:
        _watch(agent, output, interval_s)
    if not _show(agent, output):
        raise typer.Exit(1)


def _show(agent: LocalAgent, output: TextFormat) -> bool:
    answer = agent.ask("status", Status)
    summary = summarise(answer, time.time())
    if output is TextFormat.TEXT:
        print_summary(summary)
    else:
        print_value(answer, output)
    return summary.healthy


def _watch(agent: LocalAgent, output: TextFormat, interval_s: float) -> None:
    """Until interrupted; an agent that is away is part of what is watched, so it does not end the watch."""
    while True:
        if sys.stdout.isatty():
            sys.stdout.write(CLEAR_SCREEN)
        try:
            _show(agent, output)
        except IsthmusError as error:
            print(styled(error.message, "bad"))
        sys.stdout.flush()
        time.sleep(interval_s)


def print_summary(summary: Summary) -> None:
    """Headline, troubles with what to do, one line a subsystem."""
    print(styled(summary.headline, "good" if summary.healthy else "bad"))
    print(styled(summary.about, "dim"))
    for trouble in summary.troubles:
        style = "bad" if trouble.severity == "error" else "warning"
        print()
        print_wrapped(f"{trouble.text} [{trouble.code}]", first=f"{styled(trouble.severity, style)}: ", indent=2)
        if advice := advice_of(trouble):
            print_wrapped(f"what to do: {advice}", first="  ", indent=2)
    print()
    for subsystem in summary.subsystems:
        state = styled(subsystem.state.value.ljust(STATE_WIDTH), _STATE_STYLES[subsystem.state])
        print_wrapped(subsystem.text, first=f"{subsystem.name.ljust(NAME_WIDTH)}{state}", indent=INDENT)
        for line in subsystem.more:
            print_wrapped(line, first=" " * INDENT, indent=INDENT)
