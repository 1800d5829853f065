"""``isthmus agent``: run this node's agent."""

import os
from pathlib import Path
from typing import Annotated

import typer

from isthmus import logs
from isthmus.agent.agent import Agent
from isthmus.cli.configuration import load_settings
from isthmus.cli.service import run_service
from isthmus.loop.process import raise_descriptor_limit
from isthmus.model.errors import NotPermitted
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
    run_service(Agent(settings, token).run)
