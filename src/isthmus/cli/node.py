"""``isthmus node``: who has certificates of the authority, and who shall have them no longer."""

import time
from typing import Annotated

import msgspec
import typer

from isthmus.cli.configuration import holder_name
from isthmus.cli.options import Format
from isthmus.cli.output import Column, print_rows
from isthmus.cli.token import Directory, moment
from isthmus.relay.authority import DEFAULT_DIRECTORY, Authority, HolderRecord
from isthmus.wire.identity import Holder, Role

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List nodes, revoke a node.")


class NodeRow(msgspec.Struct, frozen=True):
    """``isthmus node list``: one holder of certificates; times are seconds since the epoch."""

    role: str
    name: str
    state: str
    serial: str
    issued_at: float
    expires_at: float
    revoked_at: float


@app.command("list")
def list_nodes(
    output: Annotated[Format, typer.Option("--output", "-o", help="The form of the answer.")] = Format.TABLE,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """List who has a certificate, until when, and who is revoked."""
    now_s = time.time()
    rows = [_row(record, now_s) for record in Authority(directory).holders()]
    print_rows(rows, COLUMNS, output, empty="Nobody has a certificate of this authority yet.")


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="The node's name.", metavar="NAME")],
    relay: Annotated[bool, typer.Option("--relay", help="NAME is a relay, not a node.")] = False,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Put a node out: its certificates and tokens end, on every relay and agent within a minute.

    Run it on the machine that holds the authority. To let the node in again, create a new token for it.
    """
    holder = Holder(Role.RELAY if relay else Role.NODE, holder_name(name))
    count = Authority(directory).revoke(holder, now_s=time.time())
    print(f"{holder} revoked: {count} certificate{'' if count == 1 else 's'}")


def _row(record: HolderRecord, now_s: float) -> NodeRow:
    newest = record.certificates[-1] if record.certificates else None
    if record.revoked_s:
        state = "revoked"
    elif newest is None or newest.expires_s < now_s:
        state = "expired"
    else:
        state = "valid"
    return NodeRow(
        record.holder.role,
        record.holder.name,
        state,
        newest.serial if newest else "",
        newest.issued_s if newest else 0.0,
        newest.expires_s if newest else 0.0,
        record.revoked_s,
    )


COLUMNS = (
    Column[NodeRow]("NAME", lambda row: row.name),
    Column[NodeRow]("ROLE", lambda row: row.role),
    Column[NodeRow]("STATE", lambda row: row.state),
    Column[NodeRow]("EXPIRES", lambda row: moment(row.expires_at), spare=1),
    Column[NodeRow]("REVOKED", lambda row: moment(row.revoked_at), spare=2),
    Column[NodeRow]("SERIAL", lambda row: row.serial, spare=3),
)
