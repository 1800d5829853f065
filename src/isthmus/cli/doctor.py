"""``isthmus doctor``: checks this node, from the kernel to its peers, and says what to do."""

from typing import Annotated

import typer

from isthmus.cli.client import DEFAULT_TIMEOUT_S
from isthmus.cli.options import DEFAULT_RUN_DIRECTORY, RunDirectory, Socket, TextFormat, Timeout, agent_at
from isthmus.cli.output import print_value, print_wrapped, styled
from isthmus.explain.check import State
from isthmus.explain.doctor import Diagnosis, Result, diagnose
from isthmus.explain.examined import AskAgent, ThisNode
from isthmus.wire.local import Facts, Status

app = typer.Typer(add_completion=False)

STATE_WIDTH = 13
_STYLES = {State.OK: "good", State.WARNING: "warning", State.ERROR: "bad", State.NOT_CHECKED: "dim"}


@app.command()
def doctor(
    output: Annotated[TextFormat, typer.Option("--output", "-o", help="The form of the answer.")] = TextFormat.TEXT,
    run_directory: RunDirectory = DEFAULT_RUN_DIRECTORY,
    socket: Socket = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Check this node: agent, store, kernel, names, clock, certificate, relays, peers, limits.

    Changes nothing. A root cause hides its consequences. Exit code 1 with any error; warnings alone leave it 0.
    """
    agent = agent_at(run_directory, socket, timeout_s)
    questions = AskAgent(lambda: agent.ask("status", Status), lambda: agent.ask("facts", Facts, {"destination": ""}))
    diagnosis = diagnose(ThisNode(questions))
    if output is TextFormat.TEXT:
        print_diagnosis(diagnosis)
    else:
        print_value(diagnosis, output)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """One line a check, and what to do below those that found something; consequences share a line."""
    hidden: dict[str, list[str]] = {}
    for result in diagnosis.results:
        if result.hidden_by:
            hidden.setdefault(result.hidden_by, []).append(result.title)
    for result in diagnosis.results:
        if not result.hidden_by:
            _print_result(result, hidden.get(result.code, []))
    print()
    print(styled(diagnosis.conclusion, "good" if diagnosis.healthy else "bad"))


def _print_result(result: Result, consequences: list[str]) -> None:
    state = styled(result.state.value.ljust(STATE_WIDTH), _STYLES[result.state])
    print_wrapped(f"{result.title}: {result.text}", first=state, indent=STATE_WIDTH)
    for detail in result.details:
        print_wrapped(detail, first=" " * STATE_WIDTH + "- ", indent=STATE_WIDTH + 2)
    if result.advice:
        print_wrapped(f"what to do: {result.advice}", first=" " * STATE_WIDTH, indent=STATE_WIDTH)
    if consequences:
        print_wrapped(
            f"not checked for that reason: {', '.join(consequences)}", first=" " * STATE_WIDTH, indent=STATE_WIDTH
        )
