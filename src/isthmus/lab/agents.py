"""Relays and agents of a lab: their configuration files, their identity, their processes. Real commands throughout."""

import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import yaml

from isthmus.lab.labfile import Node, Relay
from isthmus.lab.processes import in_namespace, wait_until
from isthmus.lab.topology import Place, prefix
from isthmus.model.errors import IsthmusError
from isthmus.model.settings import AgentSettings, RelayAddress, RelaySettings

if TYPE_CHECKING:
    from isthmus.lab.cluster import Lab

TOKEN_TTL = "12h"  # a lab may be up for a working day before a node is started for the first time  # noqa: S105
READY_S = 20.0
_LOG_LINES = 8


class LabProcessDied(IsthmusError):
    """A relay or an agent ended by itself, or is not ready in time."""

    code = "lab.process-died"


def isthmus(*arguments: str) -> list[str]:
    """Return the command line of our own command."""
    return [sys.executable, "-m", "isthmus", *arguments]


# identity


class Identities:
    """The authority and one token each, made with the real commands while the networks are being built.

    They run in the lab's own namespace, so that ``lab down`` finds them, too.
    """

    def __init__(self, lab: "Lab", pool: ThreadPoolExecutor) -> None:
        self._lab = lab
        self._pool = pool
        self._authority = pool.submit(self._run, "ca", "init", "--dir", str(lab.authority_directory))
        self._tokens: list[Future[None]] = []

    def make_tokens(self) -> None:
        """Wait for the authority, then begin to make the tokens. Raises LabProcessDied."""
        self._authority.result()
        for node in self._lab.file.nodes:
            self._begin(f"--node={node.name}", token_file(self._lab.node_directory(node.name)))
        for relay in self._lab.file.relays[1:]:
            self._begin(f"--relay={relay.name}", token_file(self._lab.relay_directory(relay.name)))

    def wait(self) -> None:
        """Wait for all tokens. Raises LabProcessDied."""
        for token in self._tokens:
            token.result()

    def _begin(self, holder: str, path: Path) -> None:
        self._tokens.append(self._pool.submit(self._make_token, holder, path))

    def _make_token(self, holder: str, path: Path) -> None:
        directory, ttl = str(self._lab.authority_directory), f"--ttl={TOKEN_TTL}"
        text = self._run("token", "create", holder, ttl, "--issuer", issuer_address(self._lab), "--dir", directory)
        path.touch(0o600)
        path.write_text(text)

    def _run(self, *arguments: str) -> str:
        command = in_namespace(prefix(self._lab.name) + "internet", isthmus(*arguments))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabProcessDied(f"isthmus {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout


def socket_path(directory: Path) -> Path:
    """Where the local API of the agent or relay is whose files are in ``directory``."""
    return directory / "run" / "agent.sock"


def token_file(directory: Path) -> Path:
    """Where a node's or relay's token is."""
    return directory / "token"


def issuer_address(lab: "Lab") -> str:
    """HOST:PORT of the lab's issuer, its first relay; '' in a lab without relays."""
    return relay_address(lab, lab.file.relays[0]).address if lab.file.relays else ""


# settings


def agent_settings(lab: "Lab", node: Node, place: Place) -> AgentSettings:
    """Return the settings of a node's agent: what the lab file overrides, and what follows from the topology."""
    directory, overrides = lab.node_directory(node.name), node.settings or lab.file.agent
    settings = AgentSettings(
        node=node.name,
        site=node.site,
        store=str(lab.store_directory),
        state_directory=str(directory / "state"),
        run_directory=str(directory / "run"),
        boot_id_file=str(directory / "boot_id"),
        addresses=place.addresses,
        pod_cidrs=place.pod_cidrs,
        relays=tuple(relay_address(lab, relay) for relay in lab.file.relays),
        issuer=issuer_address(lab),
        token_file=str(token_file(directory)) if lab.file.relays else "",
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
    """Return a relay's settings; the first relay of a lab is the issuer, the others enrol with it."""
    directory, issuer = lab.relay_directory(relay.name), relay is lab.file.relays[0]
    overrides = lab.file.relay
    return RelaySettings(
        name=relay.name,
        listen=f"0.0.0.0:{relay.port}",
        state_directory=str(directory / "state"),
        run_directory=str(directory / "run"),
        issuer=issuer,
        ca_directory=str(lab.authority_directory),
        issuer_address="" if issuer else issuer_address(lab),
        token_file="" if issuer else str(token_file(directory)),
        service_cidrs=lab.file.agent.intercept.service_cidrs,
        streams_per_node=overrides.streams_per_node,
        pairing_timeout_s=overrides.pairing_timeout_s,
        waiting_bytes=overrides.waiting_bytes,
        certificate_hours=overrides.certificate_hours,
    )


def write_settings(lab: "Lab") -> None:
    """Write every agent.yaml and relay.yaml as a user would: YAML with the fields' own names."""
    for node in lab.file.nodes:
        _write(lab.node_directory(node.name) / "agent.yaml", agent_settings(lab, node, lab.place(node.name)))
    for relay in lab.file.relays:
        _write(lab.relay_directory(relay.name) / "relay.yaml", relay_settings(lab, relay))


def _write(path: Path, settings: AgentSettings | RelaySettings) -> None:
    for part in ("state", "run"):
        (path.parent / part).mkdir(parents=True, mode=0o700)
    path.write_text(yaml.safe_dump(msgspec.to_builtins(settings), sort_keys=False))


# processes


def start_relay(lab: "Lab", name: str) -> int:
    """Start a relay and return its process id."""
    relay = next(relay for relay in lab.file.relays if relay.name == name)
    configuration = lab.relay_directory(name) / "relay.yaml"
    return lab.start("relay", name, relay.at, isthmus("relay", "--config", str(configuration)))


def start_agent(lab: "Lab", node: str) -> int:
    """Start a node's agent and return its process id."""
    return lab.start("agent", node, node, isthmus("agent", "--config", str(lab.node_directory(node) / "agent.yaml")))


def wait_ready(lab: "Lab", nodes: Iterable[str], deadline_s: float = READY_S) -> None:
    """Wait until the agents of ``nodes`` answer on their sockets. Raises LabProcessDied with the end of the log."""
    for node in nodes:
        socket = socket_path(lab.node_directory(node))
        process = next(each for each in lab.processes() if (each.kind, each.name) == ("agent", node))

        def settled(socket: Path = socket, node: str = node) -> bool:
            return socket.exists() or not lab.alive("agent", node)

        if not wait_until(settled, deadline_s) or not lab.alive("agent", node):
            tail = "\n".join(process.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            problem = "is not ready" if lab.alive("agent", node) else "has ended"
            raise LabProcessDied(
                f"the agent of {node} {problem}. The end of its log:\n{tail}", hint=f"see {process.log}"
            )
