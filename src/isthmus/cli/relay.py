"""``isthmus relay``: run a relay, or ask a running one how it is."""

import asyncio
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from isthmus.agent.metrics import Metrics
from isthmus.cli.configuration import holder_name, load_settings
from isthmus.cli.options import TextFormat
from isthmus.cli.output import print_value
from isthmus.cli.service import run_service
from isthmus.model.errors import IsthmusError
from isthmus.model.settings import RelaySettings
from isthmus.model.settings_text import parse_relay_settings
from isthmus.relay.run import Service, open_authority
from isthmus.relay.status import RelayReport, read_report

app = typer.Typer(add_completion=False)


class RelayNotRunning(IsthmusError):
    """No relay answers in the run directory."""

    code = "relay.not-running"


@app.command()
def relay(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings, see docs/settings.md.", metavar="FILE")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Ask the running relay instead.")] = False,
    output: Annotated[TextFormat, typer.Option("--output", "-o", help="The form of --status.")] = TextFormat.TEXT,
) -> None:
    """Run a relay, where nodes behind NATs meet, until SIGTERM."""
    settings = load_settings(config, parse_relay_settings) if config else RelaySettings()
    holder_name(settings.name)
    if status:
        _show(settings, output)
        return
    serve(settings)


def serve(settings: RelaySettings, *, relays: bool = True) -> None:
    """Run until SIGTERM or SIGINT."""
    service = Service(settings, authority=open_authority(settings), relays=relays)

    async def run(stop: asyncio.Event) -> None:
        async def relay_until_it_ends() -> None:
            try:
                await service.run(stop)
            finally:
                stop.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(relay_until_it_ends(), name="relay")
            if settings.metrics:
                tasks.create_task(Metrics(settings.metrics, service.metrics).run(stop), name="metrics")

    run_service(run)


def _show(settings: RelaySettings, output: TextFormat) -> None:
    try:
        report = asyncio.run(read_report(Path(settings.run_directory)))
    except (OSError, msgspec.DecodeError) as error:
        raise RelayNotRunning(
            f"no relay answers in {settings.run_directory}: {error}", hint="start it with `isthmus relay`"
        ) from error
    if output is TextFormat.TEXT:
        _print(report)
    else:
        print_value(report, output)
    if report.state != "valid":
        raise typer.Exit(1)


def _print(report: RelayReport) -> None:
    hours = (report.expires_at - time.time()) / 3600
    print(f"relay {report.name} on {report.listen}, issuer {'inside' if report.issuer else 'elsewhere'}")
    print(f"certificate {report.state}, {hours:.1f} h left" + (f": {report.error}" if report.error else ""))
    print(f"nodes here {len(report.nodes)}, announced {report.announced}, revoked certificates {report.revoked}")
    print(f"streams joined {report.joined}, waiting {report.pending}; strangers {report.strangers}")
    for node in sorted(report.nodes, key=lambda row: row.node):
        print(f"  {node.node:24} from {node.observed:24} streams {node.streams}")
    for name, count in report.counters.items():
        print(f"  {name:32} {count}")
