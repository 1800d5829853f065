"""``isthmus dump services|endpoints|links|rules``: what the agent has, as a table, JSON or YAML."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import typer

from isthmus.cli.client import DEFAULT_TIMEOUT_S
from isthmus.cli.options import DEFAULT_RUN_DIRECTORY, Format, RunDirectory, Socket, Timeout, agent_at
from isthmus.cli.output import Column, print_rows, sort_rows
from isthmus.explain.words import bytes_text, duration_text
from isthmus.wire.local import EndpointRow, LinkRow, RuleRow, ServiceRow

app = typer.Typer(add_completion=False)


class Listing(NamedTuple):
    """One kind of thing that can be listed."""

    row: type[Any]
    columns: Sequence[Column[Any]]
    sort_by: tuple[str, ...]
    empty: str


class What(StrEnum):
    """The things that can be listed; each is a question of the local API by the same name."""

    SERVICES = "services"
    ENDPOINTS = "endpoints"
    LINKS = "links"
    RULES = "rules"


def _full_name(row: ServiceRow | EndpointRow) -> str:
    return f"{row.namespace}/{row.name}"


def _endpoint_state(row: EndpointRow) -> str:
    if not row.ready:
        return "not ready"
    return "resting" if row.resting else "ready"


LISTINGS: dict[What, Listing] = {
    What.SERVICES: Listing(
        ServiceRow,
        (
            Column[ServiceRow]("SERVICE", _full_name),
            Column[ServiceRow]("KIND", lambda row: row.kind, spare=4),
            Column[ServiceRow]("ADDRESSES", lambda row: ",".join(row.addresses)),
            Column[ServiceRow]("PORTS", lambda row: ",".join(row.ports)),
            Column[ServiceRow]("READY", lambda row: f"{row.ready}/{row.endpoints}", right=True),
            Column[ServiceRow]("BALANCE", lambda row: row.balance, spare=3),
            Column[ServiceRow]("STATE", lambda row: row.state),
            Column[ServiceRow]("FROM", lambda row: row.origin.rpartition(" in ")[2], spare=5),
        ),
        ("namespace", "name"),
        "No services: the store holds none (`isthmus status` says what was read from where).",
    ),
    What.ENDPOINTS: Listing(
        EndpointRow,
        (
            Column[EndpointRow]("SERVICE", _full_name),
            Column[EndpointRow]("NODE", lambda row: row.node),
            Column[EndpointRow]("ADDRESS", lambda row: row.address),
            Column[EndpointRow](
                "SEEN AS", lambda row: row.visible_address if row.visible_address != row.address else "", spare=3
            ),
            Column[EndpointRow]("PORTS", lambda row: ",".join(row.ports)),
            Column[EndpointRow]("DISTANCE", lambda row: row.distance, spare=1),
            Column[EndpointRow]("STATE", _endpoint_state),
            Column[EndpointRow]("CONNECTIONS", lambda row: str(row.connections), right=True, spare=2),
            Column[EndpointRow]("POD", lambda row: row.pod, spare=5),
        ),
        ("namespace", "name", "node", "address"),
        "No endpoints: no service has one.",
    ),
    What.LINKS: Listing(
        LinkRow,
        (
            Column[LinkRow]("NODE", lambda row: row.node),
            Column[LinkRow]("PATH", lambda row: row.path),
            Column[LinkRow]("ADDRESS", lambda row: row.address),
            Column[LinkRow]("RELAY", lambda row: row.relay, spare=2),
            Column[LinkRow]("STATE", lambda row: row.state),
            Column[LinkRow]("STREAMS", lambda row: str(row.streams), right=True),
            Column[LinkRow]("SENT", lambda row: bytes_text(row.bytes_out), right=True, spare=3),
            Column[LinkRow]("RECEIVED", lambda row: bytes_text(row.bytes_in), right=True, spare=3),
            Column[LinkRow]("AGE", lambda row: duration_text(row.age_s), right=True, spare=4),
            Column[LinkRow]("TLS", lambda row: row.tls, spare=5),
        ),
        ("node", "path", "address"),
        "No links: no other node is known, and no connection to one is open.",
    ),
    What.RULES: Listing(
        RuleRow,
        (
            Column[RuleRow]("NAME", lambda row: row.name),
            Column[RuleRow]("HOOK", lambda row: row.hook, spare=1),
            Column[RuleRow]("MATCH", lambda row: row.match),
            Column[RuleRow]("ACTION", lambda row: row.action),
            Column[RuleRow]("IN KERNEL", lambda row: "yes" if row.present else "MISSING"),
            Column[RuleRow]("COMMENT", lambda row: row.comment, spare=4),
        ),
        (),
        "No rules: nothing of ours is in this node's kernel.",
    ),
}


@app.command(no_args_is_help=True)
def dump(
    what: Annotated[What, typer.Argument(help="What to list.", metavar="services|endpoints|links|rules")],
    output: Annotated[Format, typer.Option("--output", "-o", help="The form of the list.")] = Format.TABLE,
    sort_by: Annotated[str, typer.Option("--sort-by", help="A field of the JSON form.", metavar="FIELD")] = "",
    run_directory: RunDirectory = DEFAULT_RUN_DIRECTORY,
    socket: Socket = None,
    timeout_s: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List services, endpoints, links or rules as this node's agent has them."""
    listing = LISTINGS[what]
    if sort_by:
        sort_rows([], listing.row, sort_by)  # a wrong field is said before anything is asked
    rows = agent_at(run_directory, socket, timeout_s).rows(what.value, listing.row)
    for field in [sort_by] if sort_by else reversed(listing.sort_by):
        rows = sort_rows(rows, listing.row, field)
    print_rows(rows, listing.columns, output, empty=listing.empty)
