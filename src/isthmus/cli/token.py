"""``isthmus token``: tokens with which nodes and relays enrol."""

import re
import secrets
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from isthmus.cli.configuration import holder_name
from isthmus.cli.options import Format
from isthmus.cli.output import Column, print_rows
from isthmus.model.errors import UsageError
from isthmus.relay.authority import DEFAULT_DIRECTORY, Authority
from isthmus.relay.enrol import split_address
from isthmus.wire import token as tokens
from isthmus.wire.identity import Holder, Role

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Create the token with which a node enrols.")

Directory = Annotated[
    Path,
    typer.Option("--dir", envvar="ISTHMUS_CA_DIRECTORY", help="The authority's directory.", metavar="DIR"),
]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
LONGEST_TTL_S = 30 * 86_400.0


class TokenRow(msgspec.Struct, frozen=True):
    """``isthmus token list``: one token; times are seconds since the epoch."""

    id: str
    role: str
    name: str
    state: str
    created_at: float
    expires_at: float
    used_at: float


def parse_duration(text: str) -> float:
    """Seconds in ``90s``, ``30m``, ``1h`` or ``2d``; raises UsageError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd])", text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a duration", hint="write it as 90s, 30m, 1h or 2d")
    return float(match[1]) * _UNITS[match[2]]


@app.command("create")
def create(
    node: Annotated[str, typer.Option("--node", help="The node that may enrol.", metavar="NAME")] = "",
    relay: Annotated[str, typer.Option("--relay", help="The relay that may enrol.", metavar="NAME")] = "",
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is good.", metavar="DURATION")] = "1h",
    issuer: Annotated[
        str,
        typer.Option("--issuer", help="Where the issuer is reached, to put into the token.", metavar="HOST:PORT"),
    ] = "",
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Print a token. It names one node, is used once, and is a secret until then."""
    if bool(node) == bool(relay):
        raise UsageError("name either --node or --relay")
    if issuer:
        split_address(issuer)
    ttl_s = parse_duration(ttl)
    if not 0 < ttl_s <= LONGEST_TTL_S:
        raise UsageError(f"a token lives longer than no time, and at most {LONGEST_TTL_S / 86_400:.0f} days")
    holder = Holder(Role.NODE, holder_name(node)) if node else Holder(Role.RELAY, holder_name(relay))
    made = Authority(directory).create_token(
        holder, ttl_s=ttl_s, address=issuer, now_s=time.time(), secret=secrets.token_bytes(tokens.SECRET_BYTES)
    )
    print(tokens.encode(made))


@app.command("list")
def list_tokens(
    output: Annotated[Format, typer.Option("--output", "-o", help="The form of the answer.")] = Format.TABLE,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """List the tokens on record; their secrets are not."""
    now_s = time.time()
    rows = [
        TokenRow(
            record.id,
            record.holder.role,
            record.holder.name,
            record.state(now_s),
            record.created_s,
            record.expires_s,
            record.used_s,
        )
        for record in Authority(directory).tokens()
    ]
    print_rows(rows, COLUMNS, output, empty="No tokens: make one with `isthmus token create --node NAME`.")


def moment(at_s: float) -> str:
    """A time for a table, in UTC; '' for none."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at_s)) if at_s else ""


COLUMNS = (
    Column[TokenRow]("ID", lambda row: row.id, spare=3),
    Column[TokenRow]("FOR", lambda row: f"{row.role} {row.name}"),
    Column[TokenRow]("STATE", lambda row: row.state),
    Column[TokenRow]("EXPIRES", lambda row: moment(row.expires_at), spare=1),
    Column[TokenRow]("USED", lambda row: moment(row.used_at), spare=2),
)
