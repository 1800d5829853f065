"""``isthmus agent``: run this node's agent."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from isthmus import logs
from isthmus.agent.agent import Agent
from isthmus.cli.configuration import load_settings
from isthmus.loop.process import raise_descriptor_limit
from isthmus.model.errors import IsthmusError, NotPermitted
from isthmus.model.settings import AgentSettings
from isthmus.model.settings_text import parse_agent_settings

app = typer.Typer(add_completion=False)

DEFAULT_CONFIG = Path("/etc/isthmus/agent.yaml")


@app.command()
def agent(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Settings, see docs/settings.md.", metavar="FILE")
    ] = DEFAULT_CONFIG,
    token: Annotated[
        str, typer.Option("--token", help="Enrol with this token.", envvar="ISTHMUS_TOKEN", show_envvar=True)
    ] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run this node's agent until SIGTERM; a clean stop takes the interception out."""
    settings = load_settings(config, parse_agent_settings)
    if os.geteuid() != 0:
        raise NotPermitted("the agent changes netfilter and routes", hint="run it as root, or with CAP_NET_ADMIN")
    logs.configure(verbose=verbose, node=settings.node)
    raise_descriptor_limit()
    try:
        asyncio.run(_serve(settings, token))
    except BaseExceptionGroup as group:
        known, _ = group.split(IsthmusError)
        while known is not None and isinstance(known, BaseExceptionGroup):
            known = known.exceptions[0]  # type: ignore[assignment]
        if known is not None:
            raise known from group
        raise


async def _serve(settings: AgentSettings, token: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Agent(settings, token).run(stop)
