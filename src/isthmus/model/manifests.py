"""Manifests: text to objects and findings. Pure; the same text always gives the same result.

``parse_document`` knows nothing of files: its lines count from the document's first line. ``placed`` puts a result
where it stands, so that a document that only moved need not be read again.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
from yaml.nodes import MappingNode, Node

from isthmus.model import checks
from isthmus.model.cluster import Key, Object, Source
from isthmus.model.findings import Code, Finding, Severity
from isthmus.model.manifest_endpoints import read_endpoints, read_slice
from isthmus.model.manifest_meta import Meta, read_meta
from isthmus.model.manifest_nodes import read_namespace, read_node, read_pod
from isthmus.model.manifest_services import read_service
from isthmus.model.reading import Reading, Unusable, from_bad_text
from isthmus.model.yamltext import BadText, Path, Value, compose, find, normalise, plain, split

MAX_TEXT_BYTES = 64 * 1024 * 1024

Reader = Callable[[Value, Meta, Reading], tuple[Object, ...]]


class Kind(NamedTuple):
    """How objects of a kind are read."""

    read: Reader
    namespaced: bool
    name: Callable[[str], str]


KINDS = {
    ("v1", "Service"): Kind(read_service, True, checks.label),
    ("discovery.k8s.io/v1", "EndpointSlice"): Kind(read_slice, True, checks.subdomain),
    ("v1", "Endpoints"): Kind(read_endpoints, True, checks.subdomain),
    ("v1", "Node"): Kind(read_node, False, checks.subdomain),
    ("v1", "Pod"): Kind(read_pod, True, checks.subdomain),
    ("v1", "Namespace"): Kind(read_namespace, False, checks.label),
}
"""By apiVersion and kind."""


class Item(msgspec.Struct, frozen=True):
    """One object of a document, and what it became: legacy Endpoints become several slices, an FQDN slice none."""

    identity: Key
    line: int
    objects: tuple[Object, ...] = ()


class Parsed(msgspec.Struct, frozen=True):
    """One document. ``broken`` are objects that could not be used; ``unknown_loss``: more may be lost than these."""

    items: tuple[Item, ...] = ()
    findings: tuple[Finding, ...] = ()
    broken: tuple[Key, ...] = ()
    unknown_loss: bool = False


def parse_text(text: str, file: str = "") -> list[Parsed]:
    """All documents of a text, placed in ``file``."""
    return [placed(parse_document(piece), file, line) for piece, line in split(normalise(text))]


def parse_document(text: str) -> Parsed:
    """One document, its lines relative to itself. Never raises for bad input: findings say what is wrong."""
    try:
        root = compose(text)
        value = plain(root) if root is not None else None
    except BadText as error:
        return Parsed(findings=(from_bad_text(error),), unknown_loss=True)
    if root is None or value is None:
        return Parsed()
    document = _Document()
    document.add(root, value, ())
    return document.parsed()


def placed(parsed: Parsed, file: str, first_line: int) -> Parsed:
    """The result with file and line of the document's place; ``first_line`` counts from 1."""
    shift = first_line - 1
    return Parsed(
        tuple(_placed_item(item, file, shift) for item in parsed.items),
        tuple(place_finding(finding, file, shift) for finding in parsed.findings),
        parsed.broken,
        parsed.unknown_loss,
    )


def _placed_item(item: Item, file: str, shift: int) -> Item:
    source = Source(file, item.line + shift)
    objects = tuple(msgspec.structs.replace(one, source=source) for one in item.objects)
    return Item(item.identity, source.line, objects)


def place_finding(finding: Finding, file: str, shift: int) -> Finding:
    """The finding, in ``file``, ``shift`` lines further down."""
    return msgspec.structs.replace(finding, file=file, line=finding.line + shift)


class _Document:
    """What one document gives, collected object by object."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._findings: list[Finding] = []
        self._broken: list[Key] = []
        self._unknown_loss = False

    def parsed(self) -> Parsed:
        return Parsed(tuple(self._items), tuple(self._findings), tuple(self._broken), self._unknown_loss)

    def add(self, node: Node, value: Value, base: Path, list_kind: str = "", list_version: str = "") -> None:
        """Read one object, or the objects of a list. In a list of one kind, ``list_kind``, items need not repeat it."""
        reading = Reading(node, base)
        if not isinstance(value, dict) or not isinstance(node, MappingNode):
            reading.fail((), "it is not an object", "a mapping with apiVersion, kind and metadata")
            self._lost(reading)
            return
        version = value.get("apiVersion", list_version)
        kind = value.get("kind", list_kind)
        for name, found in (("apiVersion", version), ("kind", kind)):
            if not isinstance(found, str) or not found:
                reading.fail((name,), "it is missing" if found in (None, "") else f"{found!r} is not text", "text")
        if not isinstance(version, str) or not isinstance(kind, str) or reading.failed:
            self._lost(reading)
        elif kind.endswith("List") and "items" in value:
            self._add_list(node, value["items"], base, reading, kind.removesuffix("List"), version)
        else:
            self._add_object(value, version, kind, reading)

    def _add_list(self, node: Node, items: Value, base: Path, reading: Reading, kind: str, version: str) -> None:
        if not isinstance(items, list):
            reading.fail(("items",), "it is not a list", "a list of objects")
            self._lost(reading)
            return
        for index, item in enumerate(items):
            child, _ = find(node, ("items", index))
            self.add(child, item, (*base, "items", index), kind, version if kind else "")

    def _add_object(self, value: dict[str, Value], version: str, kind: str, reading: Reading) -> None:
        known = KINDS.get((version, kind))
        if known is None:
            self._unknown(version, kind, value, reading)
            return
        identity = _identity(kind, value, known.namespaced)
        reading.object = str(identity) if identity else kind
        try:
            meta = read_meta(value, reading, known.name, namespaced=known.namespaced)
            reading.stop_if_failed()
            objects = known.read(value, meta, reading)
        except Unusable:
            self._lost(reading, identity)
            return
        self._items.append(Item(Key(kind, meta.namespace, meta.name), reading.line, objects))
        self._findings += reading.findings

    def _unknown(self, version: str, kind: str, value: Value, reading: Reading) -> None:
        identity = _identity(kind, value, namespaced=True)
        reading.object = str(identity) if identity else kind
        versions = [known for known, name in KINDS if name == kind]
        if versions and version.rpartition("/")[0] == versions[0].rpartition("/")[0]:
            text = f"{kind} of {version} is not read"
            reading.warn(("apiVersion",), text, versions[0], Code.NOT_SERVED)
        else:
            reading.note(("kind",), f"{kind} of {version} is not read", Code.UNKNOWN_KIND)
        self._findings += reading.findings

    def _lost(self, reading: Reading, identity: Key | None = None) -> None:
        self._findings += reading.findings
        if identity:
            self._broken.append(identity)
        else:
            self._unknown_loss = True


def _identity(kind: str, value: Value, namespaced: bool) -> Key | None:
    """Whose text this is, as far as it can be told from a text that may be wrong elsewhere."""
    meta = value.get("metadata") if isinstance(value, dict) else None
    if not isinstance(meta, dict):
        return None
    name, namespace = meta.get("name"), meta.get("namespace", "default")
    if not isinstance(name, str) or not isinstance(namespace, str):
        return None
    return Key(kind, namespace if namespaced else "", name)


def unreadable(code: Code, text: str, file: str, expected: str = "") -> Parsed:
    """The result of a file that could not be read at all."""
    return Parsed(findings=(Finding(Severity.ERROR, code, text, file, expected=expected),), unknown_loss=True)
