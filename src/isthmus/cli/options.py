"""Options that several commands share, so that they are spelled and described the same everywhere."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.client import DEFAULT_TIMEOUT_S, LocalAgent
from isthmus.model.settings import AgentSettings
from isthmus.wire.local import SOCKET_NAME

RUN_DIRECTORY_VARIABLE = "ISTHMUS_RUN_DIRECTORY"


class Format(StrEnum):
    """What a command prints."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


class TextFormat(StrEnum):
    """The same for commands whose reading form is not a table."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


RunDirectory = Annotated[
    Path,
    typer.Option("--run-directory", envvar=RUN_DIRECTORY_VARIABLE, help="The agent's run directory.", metavar="DIR"),
]
Socket = Annotated[
    Path | None,
    typer.Option("--socket", help=f"The agent's socket, if it is not {SOCKET_NAME} there.", metavar="FILE"),
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait for the agent.", min=0.1, metavar="S")]

DEFAULT_RUN_DIRECTORY = Path(AgentSettings().run_directory)


def agent_at(run_directory: Path, socket: Path | None, timeout_s: float = DEFAULT_TIMEOUT_S) -> LocalAgent:
    """The agent that the options name."""
    return LocalAgent(socket or run_directory / SOCKET_NAME, timeout_s)
