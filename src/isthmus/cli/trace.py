"""``isthmus trace POD DESTINATION[:PORT]``: what happens to a connection, hop by hop, and why."""

from enum import StrEnum
from typing import Annotated

import typer

from isthmus.cli.client import DEFAULT_TIMEOUT_S
from isthmus.cli.options import DEFAULT_RUN_DIRECTORY, RunDirectory, Socket, TextFormat, Timeout, agent_at
from isthmus.cli.output import print_value, print_wrapped, styled
from isthmus.explain.hop import Held, Report
from isthmus.explain.trace import Trace
from isthmus.explain.trace import trace as follow
from isthmus.explain.witness import DnsServer
from isthmus.model.cluster import Protocol
from isthmus.model.settings import AgentSettings
from isthmus.wire.local import Facts

app = typer.Typer(add_completion=False)

LABEL_WIDTH = 13
INDENT = 2 + LABEL_WIDTH
_HELD_STYLES = {Held.OK: "good", Held.DIFFERS: "bad", Held.NOT_CHECKED: "warning"}


class Transport(StrEnum):
    """Protocols that are intercepted."""

    TCP = "tcp"
    UDP = "udp"


class _AgentsDns:
    """The DNS server of the agent that was asked; its address is known once the agent has answered."""

    def __init__(self) -> None:
        self.server = DnsServer("")

    def resolve(self, name: str, record_type: str) -> frozenset[str] | None:
        return self.server.resolve(name, record_type)


@app.command(no_args_is_help=True)
def trace(
    pod: Annotated[
        str, typer.Argument(help="NAME, NAMESPACE/NAME, an address, or “host” for the node.", metavar="POD")
    ],
    destination: Annotated[str, typer.Argument(help="NAME[:PORT] or ADDRESS[:PORT].", metavar="DESTINATION[:PORT]")],
    protocol: Annotated[Transport, typer.Option("--protocol", "-p", help="The transport.")] = Transport.TCP,
    output: Annotated[TextFormat, typer.Option("--output", "-o", help="The form of the answer.")] = TextFormat.TEXT,
    run_directory: RunDirectory = DEFAULT_RUN_DIRECTORY,
    socket: Socket = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Say what happens to a connection of POD, hop by hop, and which rule and object decided.

    Nothing is sent to the destination; names are asked of this node's DNS server. Exit code 1 if it would not arrive.
    """
    agent, dns = agent_at(run_directory, socket, timeout_s), _AgentsDns()

    def ask(arguments: dict[str, str]) -> Facts:
        facts = agent.ask("facts", Facts, arguments)
        address = facts.interception.address_v4 or facts.interception.address_v6
        dns.server = DnsServer(address or AgentSettings().intercept.address_v4)
        return facts

    result = follow(pod, destination, Protocol(protocol.upper()), ask, dns)
    if output is TextFormat.TEXT:
        print_trace(result)
    else:
        print_value(result, output)
    if not result.arrives:
        raise typer.Exit(1)


def print_trace(result: Trace) -> None:
    """One block a hop, then the conclusion."""
    port = f":{result.port}" if result.port else ""
    print(styled(f"{result.source} to {result.destination}{port}/{result.protocol}, seen from {result.node}", "title"))
    for number, report in enumerate(result.hops, 1):
        print()
        _print_report(number, report)
    print()
    print_wrapped(styled(result.conclusion, "good" if result.arrives else "bad"))


def _print_report(number: int, report: Report) -> None:
    print_wrapped(report.outcome + _mark(report), first=styled(f"{number}. {report.hop}: ", "title"), indent=INDENT)
    _line("rule", report.rule)
    _line("because", report.because)
    if report.object:
        _line("object", f"{report.object}, {report.place}" if report.place else report.object)
    if report.setting:
        _line("setting", report.setting)
    if report.held_text or report.held is not Held.NOT_CHECKED:
        held = styled(report.held.value, _HELD_STYLES[report.held])
        _line("held against", f"{held}: {report.held_text}" if report.held_text else held)
    for text in report.alternatives:
        _line("also", text)


def _mark(report: Report) -> str:
    if report.passes:
        return ""
    return styled("  << differs from what is planned" if report.held is Held.DIFFERS else "  << ends here", "bad")


def _line(label: str, text: str) -> None:
    print_wrapped(text, first=f"   {label.ljust(LABEL_WIDTH)}", indent=INDENT + 1)
