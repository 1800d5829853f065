"""From the text of a lab file to a checked LabFile; every error names file, line and field."""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath

import msgspec

from isthmus.lab.labfile import LAB_NAME, OBJECT_NAME, Generate, Host, LabFile, NatType, Node, Relay, Site, StoreMode
from isthmus.lab.topology import DoesNotFit, plan_topology
from isthmus.model.errors import IsthmusError, UsageError
from isthmus.model.settings_text import Path, SettingsError, decode, field_name, line_of

NAME_RULE = "1 to 12 lower-case letters and digits"


class LabFileError(IsthmusError):
    """A lab file that cannot be read or does not fit together."""

    code = "lab.file"


def load_lab_file(path: FilePath) -> LabFile:
    """Read and check ``path``; ``manifests`` comes back absolute. Raises LabFileError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LabFileError(f"cannot read lab file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabFileError(f"cannot read lab file {path}: it is not UTF-8 text") from error
    return parse_lab_file(text, str(path), path.resolve().parent)


def check_name(name: str) -> str:
    """Return ``name`` if it can be a lab's. Raises UsageError."""
    if not re.match(LAB_NAME, name):
        raise UsageError(f"'{name}' cannot be a lab's name", hint=NAME_RULE)
    return name


def parse_lab_file(text: str, file: str, directory: FilePath) -> LabFile:
    """Parse ``text``. ``file`` is what errors call it, ``directory`` what ``manifests`` is relative to."""
    try:
        lab = decode(text, LabFile, file)
    except SettingsError as error:
        raise LabFileError(error.message) from error
    for at, problem in _problems(lab):
        raise _error(file, text, at, problem)
    try:
        plan_topology(lab)
    except DoesNotFit as error:
        raise _error(file, text, error.path, str(error)) from error
    if lab.manifests:
        lab = msgspec.structs.replace(lab, manifests=str((directory / lab.manifests).resolve()))
    return lab


def _error(file: str, text: str, at: Path, message: str) -> LabFileError:
    return LabFileError(f"{file}:{line_of(text, at)}: {field_name(at)}: {message}")


def _problems(lab: LabFile) -> Iterator[tuple[Path, str]]:
    """Yield what does not fit together, as (path of the field, what is wrong)."""
    if not re.match(LAB_NAME, lab.name):
        yield ("name",), f"'{lab.name}' cannot be a lab's name: {NAME_RULE}"
    yield from _duplicates(lab)
    yield from _site_problems(lab)
    yield from _reference_problems(lab)
    yield from _address_problems(lab)
    if lab.store is StoreMode.LINK and (lab.generate or not lab.manifests):
        yield ("store",), "'link' needs 'manifests', and leaves no room for 'generate'"


def _duplicates(lab: LabFile) -> Iterator[tuple[Path, str]]:
    # Nodes, hosts and pods become namespaces of one name space, and `exec` takes either.
    taken: dict[str, str] = {"internet": "the network between the sites"}
    named: dict[str, Sequence[Site | Node | Host | Relay]] = {
        "nodes": lab.nodes,
        "hosts": lab.hosts,
        "sites": lab.sites,
        "relays": lab.relays,
    }
    for kind, objects in named.items():
        own = taken if kind in ("nodes", "hosts") else {}
        for index, each in enumerate(objects):
            if not re.match(OBJECT_NAME, each.name):
                yield (kind, index, "name"), f"'{each.name}' must be lower-case letters, digits and '-'"
            if each.name in own:
                yield (kind, index, "name"), f"'{each.name}' is already the name of {own[each.name]}"
            own[each.name] = f"{kind}[{index}]"
    pods: set[tuple[str, str]] = set()
    for index, pod in enumerate(lab.pods):
        if not re.match(OBJECT_NAME, pod.name) or not re.match(OBJECT_NAME, pod.namespace):
            yield ("pods", index, "name"), "names of pods must be lower-case letters, digits and '-'"
        if (pod.namespace, pod.name) in pods:
            yield ("pods", index, "name"), f"there are two pods {pod.namespace}/{pod.name}"
        pods.add((pod.namespace, pod.name))


def _site_problems(lab: LabFile) -> Iterator[tuple[Path, str]]:
    public = [index for index, site in enumerate(lab.sites) if site.public]
    if len(public) != 1:
        yield ("sites",), f"exactly one site must be public, here are {len(public)}"
    for index, site in enumerate(lab.sites):
        if site.public and (site.nat or site.lan or site.wan_address):
            yield ("sites", index), "a public site has no NAT, no LAN and no WAN address"
        if not site.public and site.nat is None:
            yield ("sites", index), "a private site needs 'nat', for example 'nat: {type: symmetric}'"
        if site.nat and site.nat.hairpin and site.nat.type is NatType.SYMMETRIC:
            yield (
                ("sites", index, "nat", "hairpin"),
                "a symmetric NAT has no mapping that a neighbour could come back by",
            )


def _reference_problems(lab: LabFile) -> Iterator[tuple[Path, str]]:
    sites = {site.name: site for site in lab.sites}
    nodes = {node.name: node for node in lab.nodes}
    for index, node in enumerate(lab.nodes):
        if node.site not in sites:
            yield ("nodes", index, "site"), f"there is no site '{node.site}'"
    for index, pod in enumerate(lab.pods):
        if pod.node not in nodes:
            yield ("pods", index, "node"), f"there is no node '{pod.node}'"
        if pod.serve and pod.command:
            yield ("pods", index, "command"), "a pod either serves or runs a command"
    hosts = {host.name for host in lab.hosts}
    for index, relay in enumerate(lab.relays):
        relay_node = nodes.get(relay.at)
        if relay.at not in hosts and not (relay_node and relay_node.site in sites and sites[relay_node.site].public):
            yield ("relays", index, "at"), f"'{relay.at}' is neither a host nor a node of the public site"
    if Generate.PODS in lab.generate and Generate.NODES not in lab.generate:
        yield ("generate",), "'pods' needs 'nodes'"


def _address_problems(lab: LabFile) -> Iterator[tuple[Path, str]]:
    for index, site in enumerate(lab.sites):
        yield from _check(("sites", index, "lan"), site.lan, ipaddress.IPv4Network)
        yield from _check(("sites", index, "wan-address"), site.wan_address, ipaddress.IPv4Address)
    for index, node in enumerate(lab.nodes):
        yield from _check(("nodes", index, "address"), node.address, ipaddress.IPv4Address)
        yield from _check(("nodes", index, "pod-cidr"), node.pod_cidr, ipaddress.IPv4Network)
    for index, pod in enumerate(lab.pods):
        yield from _check(("pods", index, "address"), pod.address, ipaddress.IPv4Address)
    for index, host in enumerate(lab.hosts):
        yield from _check(("hosts", index, "address"), host.address, ipaddress.IPv4Address)


def _check(
    at: Path, text: str, form: type[ipaddress.IPv4Address] | type[ipaddress.IPv4Network]
) -> Iterator[tuple[Path, str]]:
    if not text:
        return
    try:
        form(text)
    except ValueError as error:
        yield at, str(error)
