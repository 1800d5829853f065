"""Relays and agents of a lab: their configuration files, their identity, their processes. Real commands throughout."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import yaml

from isthmus.lab.labfile import Node, Relay
from isthmus.lab.topology import Place
from isthmus.model.settings import AgentSettings, RelayAddress, RelaySettings

if TYPE_CHECKING:
    from isthmus.lab.cluster import Lab


def isthmus(*arguments: str) -> list[str]:
    """Return the command line of our own command."""
    return [sys.executable, "-m", "isthmus", *arguments]


def agent_settings(lab: "Lab", node: Node, place: Place) -> AgentSettings:
    """Return the settings of a node's agent: what the lab file overrides, and what follows from the topology."""
    directory, overrides = lab.node_directory(node.name), lab.file.agent
    relays = tuple(relay_address(lab, relay) for relay in lab.file.relays)
    settings = AgentSettings(
        node=node.name,
        site=node.site,
        store=str(lab.store_directory),
        state_directory=str(directory / "state"),
        run_directory=str(directory / "run"),
        boot_id_file=str(directory / "boot_id"),
        addresses=place.addresses,
        pod_cidrs=place.pod_cidrs,
        relays=relays,
        issuer=relays[0].address if relays else "",
        intercept=overrides.intercept,
        dns=overrides.dns,
        proxy=overrides.proxy,
    )
    if overrides.virtual_cidrs:
        settings = msgspec.structs.replace(settings, virtual_cidrs=overrides.virtual_cidrs)
    return settings


def relay_address(lab: "Lab", relay: Relay) -> RelayAddress:
    """Return where a relay is reached."""
    place = lab.place(relay.at)
    return RelayAddress(relay.name, f"{place.addresses[0]}:{relay.port}", place.site)


def relay_settings(lab: "Lab", relay: Relay) -> RelaySettings:
    """Return a relay's settings; the first relay of a lab is the issuer."""
    directory = lab.directory / "relays" / relay.name
    return RelaySettings(
        name=relay.name,
        listen=f"0.0.0.0:{relay.port}",
        state_directory=str(directory / "state"),
        run_directory=str(directory / "run"),
        issuer=relay is lab.file.relays[0],
    )


def start(lab: "Lab") -> None:
    """Write every configuration, then start relays and agents."""
    for node in lab.file.nodes:
        write_settings(lab.node_directory(node.name) / "agent.yaml", agent_settings(lab, node, lab.place(node.name)))
    for relay in lab.file.relays:
        directory = lab.directory / "relays" / relay.name
        for part in ("state", "run"):
            (directory / part).mkdir(parents=True, mode=0o700)
        write_settings(directory / "relay.yaml", relay_settings(lab, relay))
    if importlib.util.find_spec("isthmus.cli.relay"):
        for relay in lab.file.relays:
            start_relay(lab, relay)
    if importlib.util.find_spec("isthmus.cli.agent"):
        for node in lab.file.nodes:
            if node.agent:
                start_agent(lab, node.name)


def start_relay(lab: "Lab", relay: Relay) -> int:
    """Start a relay and return its process id."""
    configuration = lab.directory / "relays" / relay.name / "relay.yaml"
    return lab.start("relay", relay.name, relay.at, isthmus("relay", "--config", str(configuration)))


def start_agent(lab: "Lab", node: str) -> int:
    """Start a node's agent and return its process id."""
    configuration = lab.node_directory(node) / "agent.yaml"
    return lab.start("agent", node, node, isthmus("agent", "--config", str(configuration)))


def write_settings(path: Path, settings: AgentSettings | RelaySettings) -> None:
    """Write a settings file as a user would: YAML with the fields' own names."""
    path.write_text(yaml.safe_dump(msgspec.to_builtins(settings), sort_keys=False))
