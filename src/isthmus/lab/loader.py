"""From the text of a lab file to a checked LabFile; every error names file, line and field."""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import yaml

from isthmus.lab.labfile import LAB_NAME, OBJECT_NAME, Generate, Host, LabFile, NatType, Node, Relay, Site, StoreMode
from isthmus.lab.topology import DoesNotFit, plan_topology
from isthmus.model.errors import IsthmusError, UsageError

NAME_RULE = "1 to 12 lower-case letters and digits"

_Path = tuple[str | int, ...]


class LabFileError(IsthmusError):
    """A lab file that cannot be read or does not fit together."""

    code = "lab.file"


def load_lab_file(path: Path) -> LabFile:
    """Read and check ``path``; ``manifests`` comes back absolute. Raises LabFileError."""
    try:
        text = path.read_text()
    except OSError as error:
        raise LabFileError(f"cannot read lab file {path}: {error.strerror}") from error
    return parse_lab_file(text, str(path), path.resolve().parent)


def check_name(name: str) -> str:
    """Return ``name`` if it can be a lab's. Raises UsageError."""
    if not re.match(LAB_NAME, name):
        raise UsageError(f"'{name}' cannot be a lab's name", hint=NAME_RULE)
    return name


def parse_lab_file(text: str, file: str, directory: Path) -> LabFile:
    """Parse ``text``. ``file`` is what errors call it, ``directory`` what ``manifests`` is relative to."""
    try:
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
        data = yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise LabFileError(f"{file}:{line}: not YAML: {getattr(error, 'problem', error)}") from error
    try:
        lab = msgspec.convert(data, LabFile, strict=True)
    except msgspec.ValidationError as error:
        message, at = _split(str(error))
        raise _error(file, root, at, message) from error
    for at, problem in _problems(lab):
        raise _error(file, root, at, problem)
    try:
        plan_topology(lab)
    except DoesNotFit as error:
        raise _error(file, root, error.path, str(error)) from error
    if lab.manifests:
        lab = msgspec.structs.replace(lab, manifests=str((directory / lab.manifests).resolve()))
    return lab


def _error(file: str, root: "yaml.Node | None", at: _Path, message: str) -> LabFileError:
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".") or "the file"
    return LabFileError(f"{file}:{_line(root, at)}: {field}: {message}")


def _split(message: str) -> tuple[str, _Path]:
    """Take msgspec's ``... - at `$.sites[1].nat` `` apart; an unknown field is added to the path, for its own line."""
    found = re.fullmatch(r"(.*?)(?: - at `\$(.*)`)?", message, re.DOTALL)
    text, where = (found.group(1), found.group(2) or "") if found else (message, "")
    path: list[str | int] = []
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", where):
        path.append(name or int(index))
    unknown = re.search(r"contains unknown field `([^`]+)`", text)
    if unknown:
        return "there is no such field", (*path, unknown.group(1))
    return text[:1].lower() + text[1:], tuple(path)


def _line(root: "yaml.Node | None", path: _Path) -> int:
    """Line (from 1) of the deepest node on ``path`` that exists."""
    node, line = root, 1
    for step in path:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == step), None)
            if found:
                line = found[0].start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = (None, node.value[step])
            line = node.value[step].start_mark.line + 1
        if found is None:
            break
        node = found[1]
    return line


def _problems(lab: LabFile) -> Iterator[tuple[_Path, str]]:
    """Yield what does not fit together, as (path of the field, what is wrong)."""
    if not re.match(LAB_NAME, lab.name):
        yield ("name",), f"'{lab.name}' cannot be a lab's name: {NAME_RULE}"
    yield from _duplicates(lab)
    yield from _site_problems(lab)
    yield from _reference_problems(lab)
    yield from _address_problems(lab)
    if lab.store is StoreMode.LINK and (lab.generate or not lab.manifests):
        yield ("store",), "'link' needs 'manifests', and leaves no room for 'generate'"


def _duplicates(lab: LabFile) -> Iterator[tuple[_Path, str]]:
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


def _site_problems(lab: LabFile) -> Iterator[tuple[_Path, str]]:
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


def _reference_problems(lab: LabFile) -> Iterator[tuple[_Path, str]]:
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


def _address_problems(lab: LabFile) -> Iterator[tuple[_Path, str]]:
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
    at: _Path, text: str, form: type[ipaddress.IPv4Address] | type[ipaddress.IPv4Network]
) -> Iterator[tuple[_Path, str]]:
    if not text:
        return
    try:
        form(text)
    except ValueError as error:
        yield at, str(error)
