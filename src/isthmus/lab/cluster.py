"""A lab as a whole: up, down, status, commands in its nodes and pods.

Everything it makes is in the registry first, and lies in one directory, in namespaces of its prefix and in
/etc/netns under the same names. ``down`` works from these alone: it needs no lab file and no memory of ``up``.
"""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from isthmus.lab import agents, store
from isthmus.lab.foreign import Listing, install_foreign, take_listing
from isthmus.lab.labfile import LabFile
from isthmus.lab.nat import nat_ruleset, nat_sysctls
from isthmus.lab.network import build, etc_directory, run_in, write_sysctls
from isthmus.lab.processes import in_namespace, read_pid, spawn, stop
from isthmus.lab.registry import Kind, Registry
from isthmus.lab.removal import (
    BASE_DIRECTORY,
    REGISTRY,
    LabExists,
    claim,
    find_directory,
    forget,
    locked,
    remove,
    take_down,
    undisturbed,
)
from isthmus.lab.resident import create_namespace
from isthmus.lab.topology import Place, Role, plan_topology
from isthmus.model.errors import UsageError

RUN_DIRECTORY_VARIABLE = "ISTHMUS_RUN_DIRECTORY"  # as cli/options.py reads it
_PARALLEL = 4
_SOCKET_PATH_BYTES = 107

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ProcessState:
    """A process the lab started: what it is, where, its id (0: dead), its log."""

    kind: str
    name: str
    pid: int
    log: Path


class Lab:
    """One lab, made from a lab file or found again by its name."""

    def __init__(self, file: LabFile, base: Path = BASE_DIRECTORY) -> None:
        self.file = file
        self.name = file.name
        self.directory = base.absolute() / file.name
        self.topology = plan_topology(file)
        self._registry = Registry(self.directory / REGISTRY)
        self.made = False
        """Whether it was this object's ``up`` that made the lab, so that whoever called it may take it down again."""

    @classmethod
    def find(cls, name: str) -> "Lab":
        """Return the lab that is up under ``name``. Raises UsageError."""
        directory = find_directory(name)
        try:
            return cls(msgspec.json.decode((directory / "lab.json").read_bytes(), type=LabFile), directory.parent)
        except (FileNotFoundError, msgspec.DecodeError):
            raise UsageError(f"there is no lab '{name}'", hint=f"isthmus lab up --name {name}") from None

    @property
    def store_directory(self) -> Path:
        """The directory that all agents of the lab watch."""
        return self.directory / "store"

    def node_directory(self, node: str) -> Path:
        """Where a node's agent.yaml, boot id, state, sockets and log are."""
        return self.directory / "nodes" / node

    def relay_directory(self, relay: str) -> Path:
        """Where a relay's relay.yaml, state and sockets are."""
        return self.directory / "relays" / relay

    @property
    def authority_directory(self) -> Path:
        """Where the lab's certificate authority is."""
        return self.directory / "ca"

    # up

    def up(self, progress: Progress = lambda _: None) -> None:
        """Make everything; whatever goes wrong in the middle, Ctrl-C included, is taken down again before it is raised.

        What a crashed ``up`` of this name left is removed first. Raises LabExists, LabBusy, LabNetworkError,
        KernelError.
        """
        self._check_socket_paths()
        claim(self.directory)
        with locked(self.directory):
            if self._registry.complete:
                raise LabExists(f"lab '{self.name}' is up already", hint=f"isthmus lab down --name {self.name}")
            remove(self.directory)
            try:
                self._make(progress)
            except BaseException:
                with undisturbed():
                    remove(self.directory)
                    forget(self.directory)
                raise

    def _check_socket_paths(self) -> None:
        """A Unix socket's path has room for 107 bytes (unix(7)): said here, it is no riddle in an agent's log."""
        runs = [self.node_directory(name) for name in self.agent_nodes()]
        runs += [self.relay_directory(relay.name) for relay in self.file.relays]
        longest = max((len(bytes(agents.socket_path(directory))) for directory in runs), default=0)
        if longest > _SOCKET_PATH_BYTES:
            raise UsageError(
                f"{self.directory} is too long a path: sockets in it would have paths of {longest} bytes, "
                f"and the kernel takes {_SOCKET_PATH_BYTES}",
                hint="choose a shorter --directory",
            )

    def _make(self, progress: Progress) -> None:
        (self.directory / "lab.json").write_bytes(msgspec.json.encode(self.file))
        progress("namespaces")
        for place in self.topology.places:
            self._registry.note(Kind.NAMESPACE, place.namespace)
            create_namespace(place.namespace)
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="lab") as pool:
            identities = agents.Identities(self, pool) if self.file.relays else None
            progress("networks and NATs")
            build(self.topology)
            self._build_nats()
            progress("nodes and pods")
            self._write_files()
            if identities:
                identities.make_tokens()
            for place in self.topology.of(Role.NODE):
                node = next(node for node in self.file.nodes if node.name == place.label)
                install_foreign(place, node.foreign, node.iptables)
                self._listing_file(place.label).write_bytes(msgspec.json.encode(take_listing(place.namespace)))
            self._start_pods_and_hosts()
            progress("relays and agents")
            for relay in self.file.relays[:1]:
                agents.start_relay(self, relay.name)
            if identities:
                identities.wait()
        for relay in self.file.relays[1:]:
            agents.start_relay(self, relay.name)
        for name in self.agent_nodes():
            agents.start_agent(self, name)
        self._registry.note(Kind.UP, self.name)
        self.made = True

    def agent_nodes(self) -> list[str]:
        """Return the nodes that have an agent."""
        return [node.name for node in self.file.nodes if node.agent]

    def _build_nats(self) -> None:
        for place in self.topology.of(Role.ROUTER):
            nat = next(site.nat for site in self.file.sites if site.name == place.site)
            if nat:
                write_sysctls(place.namespace, nat_sysctls(nat))
                run_in(place.namespace, ["nft", "-f", "-"], nat_ruleset(nat, *place.addresses))

    def _write_files(self) -> None:
        store.write(self.file, self.topology, self.store_directory)
        agents.write_settings(self)
        for place in self.topology.of(Role.NODE):
            # Namespaces share the kernel's boot id; to its peers each node has booted by itself.
            (self.node_directory(place.label) / "boot_id").write_text(f"{uuid.uuid4()}\n")
        for place in self.topology.places:
            text = self._resolv_conf(place)
            if text:
                self._registry.note(Kind.ETC, place.namespace)
                etc_directory(place.namespace).mkdir(parents=True, exist_ok=True)
                (etc_directory(place.namespace) / "resolv.conf").write_text(text)

    def _resolv_conf(self, place: Place) -> str:
        """What kubelet writes for a pod; nodes ask the agent as well, without the search path."""
        settings = self.file.agent
        server = f"nameserver {settings.intercept.address_v4}\n"
        if place.role is Role.POD:
            namespace, domain = place.label.split("/")[0], settings.dns.domain
            return f"search {namespace}.svc.{domain} svc.{domain} {domain}\n{server}options ndots:5\n"
        return server if place.role is Role.NODE else ""

    def _start_pods_and_hosts(self) -> None:
        for pod in self.file.pods:
            label = f"{pod.namespace}/{pod.name}"
            command = list(pod.command)
            if pod.serve:
                command = [sys.executable, "-m", "isthmus.lab.server", "--pod", label, "--node", pod.node]
                for kind, ports in (("http", pod.serve.http), ("tcp", pod.serve.tcp), ("udp", pod.serve.udp)):
                    command += [f"--{kind}", *map(str, ports)] if ports else []
            if command:
                self.start("pod", label, label, command)
        for host in self.file.hosts:
            if host.command:
                self.start("host", host.name, host.name, list(host.command))

    def foreign_changes(self, node: str) -> str:
        """Return a diff of a node's netfilter rules from before its agent first ran to now, ours left out."""
        before = msgspec.json.decode(self._listing_file(node).read_bytes(), type=Listing)
        return before.foreign().difference(take_listing(self.place(node).namespace).foreign())

    def _listing_file(self, node: str) -> Path:
        return self.node_directory(node) / "netfilter-before.json"

    # processes

    def start(self, kind: str, name: str, place: str, command: Sequence[str]) -> int:
        """Start ``command`` in ``place`` under the name ``kind``/``name``, and return its process id."""
        pid_file = self._pid_file(kind, name)
        pid_file.parent.mkdir(exist_ok=True)
        return spawn(self.place(place).namespace, command, pid_file.with_suffix(".log"), pid_file, self.directory)

    def stop(self, kind: str, name: str, number: signal.Signals = signal.SIGTERM, deadline_s: float = 10.0) -> bool:
        """Send a signal to a process of the lab and wait for its end; False if it outlives ``deadline_s``."""
        return stop(self._pid_file(kind, name), number, deadline_s)

    def alive(self, kind: str, name: str) -> bool:
        """Whether a process of the lab lives."""
        return bool(read_pid(self._pid_file(kind, name)))

    def log(self, kind: str, name: str) -> str:
        """Return what a process of the lab has printed so far."""
        return self._pid_file(kind, name).with_suffix(".log").read_text(errors="replace")

    def _pid_file(self, kind: str, name: str) -> Path:
        return self.directory / "processes" / f"{kind}.{name.replace('/', '.')}.pid"

    def processes(self) -> list[ProcessState]:
        """Return every process the lab has started, dead or alive, by name."""
        found = []
        for pid_file in sorted((self.directory / "processes").glob("*.pid")):
            kind, _, name = pid_file.stem.partition(".")
            found.append(ProcessState(kind, name, read_pid(pid_file), pid_file.with_suffix(".log")))
        return found

    # commands

    def place(self, label: str) -> Place:
        """Return the node, host, pod (NAME or NAMESPACE/NAME) or SITE.router called ``label``. Raises UsageError."""
        places = self.topology.places
        exact = [place for place in places if place.label == label]
        by_name = [place for place in places if place.role is Role.POD and place.label.split("/")[1] == label]
        found = exact or by_name
        if len(found) != 1:
            known = ", ".join(place.label for place in places)
            problem = f"several pods are called '{label}'" if found else f"there is no '{label}' in lab '{self.name}'"
            raise UsageError(problem, hint=f"there are {known}")
        return found[0]

    def command(self, label: str, command: Sequence[str]) -> list[str]:
        """Return ``command`` as it is run in the place called ``label``."""
        return in_namespace(self.place(label).namespace, command)

    def environment(self, label: str) -> dict[str, str]:
        """Return the environment for commands in ``label``: `isthmus` is this very one, and finds the node's agent."""
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"}
        place = self.place(label)
        if place.role is Role.NODE:
            environment[RUN_DIRECTORY_VARIABLE] = str(self.node_directory(place.label) / "run")
        return environment

    def run(
        self,
        label: str,
        command: Sequence[str],
        *,
        timeout_s: float = 30.0,
        stdin: str | None = None,
        check: bool = False,
    ) -> "subprocess.CompletedProcess[str]":
        """Run ``command`` to its end in ``label``; a non-zero exit raises CalledProcessError only with ``check``."""
        return subprocess.run(
            self.command(label, command),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=check,
            env=self.environment(label),
        )

    # down

    def down(self) -> None:
        """Remove all of the lab: processes, namespaces, files. Safe to repeat. Raises LabBusy, ProcessesRemain."""
        take_down(self.name)
