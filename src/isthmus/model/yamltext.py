"""YAML text to plain values, with the line of every value at hand and hard limits on what a text can cost.

A thin layer on libyaml's parser (PyYAML's ``CParser``): it composes nodes, which carry their lines, and this module
turns them into values in one pass. Why not PyYAML's loaders: they let a later duplicate key win silently, expand
aliases without a bound, crash on deep nesting, turn ``2024-01-01`` into a date, and are slower.

Scalars follow YAML 1.1 as Kubernetes' own tools read it, except that dates and ``22:30`` stay text.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NoReturn

from yaml import MarkedYAMLError, YAMLError
from yaml._yaml import CParser
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from isthmus.model.findings import Code

MAX_DEPTH = 64
MAX_ALIASED_NODES = 100_000
"""Values that aliases may repeat in one document, all together."""

Path = tuple[str | int, ...]
Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]

_AFTER_MARKER = ("", " ", "\t", "\n")
_CONTENT = re.compile(r"^(?!---[ \t]*(?:#|$)|\.\.\.|%|[ \t]*#|[ \t]*$)", re.MULTILINE)
_PLAIN = "?"
_TAG = "tag:yaml.org,2002:"
_STR = _TAG + "str"
_SCALAR_TAGS = {_TAG + name for name in ("bool", "int", "float", "null")}
_SPECIAL = frozenset("~nNtTfFyYoO+-.0123456789=<")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_INT = re.compile(r"[-+]?(?:0b[01_]{1,64}|0o?[0-7_]{1,32}|0x[0-9a-fA-F_]{1,32}|0|[1-9][0-9_]{0,63})\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))\Z"
    r"|\.(?:nan|NaN|NAN)\Z"
)


class BadText(Exception):
    """A text that cannot be read. ``line`` counts from 1 within the text; ``path`` is the field, if it is known."""

    def __init__(self, code: Code, text: str, line: int, *, path: Path = (), expected: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.line = line
        self.path = path
        self.expected = expected


def normalise(text: str) -> str:
    """Without a byte order mark, and with ``\\n`` for every line end, so that lines count as editors count them."""
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def split(text: str) -> list[tuple[str, int]]:
    """Cut normalised text at document markers: (document, first line from 1). Those without content are left out."""
    return [(text[start:end], line + 1) for start, end, line in spans(text)]


def spans(text: str) -> list[tuple[int, int, int]]:
    """Where the documents of normalised text are: (start, end, lines before). Those without content are left out.

    A marker in the first column always ends a document, also within quotes and block scalars (YAML 1.2, 9.1.2), so no
    parsing is needed. ``---`` stands in the document that it begins, ``...`` in none.
    """
    starts = [0, *sorted(_markers(text)), len(text)]
    found = []
    line = 0
    for start, end in pairwise(starts):
        piece = text[start:end]
        if _CONTENT.search(piece):
            found.append((start + 3 if piece.startswith("...") else start, end, line))
        line += piece.count("\n")
    return found


def _markers(text: str) -> Iterator[int]:
    """Where lines start with a marker, the first line apart: ``find`` is ten times as fast as a pattern here."""
    for marker in ("\n---", "\n..."):
        at = text.find(marker)
        while at >= 0:
            if text[at + 4 : at + 5] in _AFTER_MARKER:
                yield at + 1
            at = text.find(marker, at + 4)


class _Composer(CParser):
    """libyaml's parser with a cheap resolver, and a bound on nesting: its recursion overflows the C stack otherwise."""

    def __init__(self, text: str) -> None:
        CParser.__init__(self, text)
        self._depth = 0

    def resolve(self, kind: type[Node], _value: str | None, implicit: tuple[bool, bool]) -> str:
        return _PLAIN if kind is not ScalarNode or implicit[0] else _STR

    def descend_resolver(self, parent: Node | None, _index: object) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            line = parent.start_mark.line + 1 if parent else 1
            raise BadText(
                Code.TOO_LARGE, f"values are nested deeper than {MAX_DEPTH}", line, expected="at most that depth"
            )

    def ascend_resolver(self) -> None:
        self._depth -= 1


def compose(text: str) -> Node | None:
    """The node tree of one document, None if it is empty. Raises BadText."""
    try:
        root: Node | None = _Composer(text).get_single_node()
    except MarkedYAMLError as error:
        raise _syntax(text, error) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadText(Code.SYNTAX, f"character {error.character!r} is not allowed", line) from error
    except YAMLError as error:
        raise BadText(Code.SYNTAX, str(error), 1) from error
    return root


def _syntax(text: str, error: MarkedYAMLError) -> BadText:
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    lines = text.split("\n")
    there = lines[line] if line < len(lines) else ""
    if "\t" in there[: len(there) - len(there.lstrip())]:
        return BadText(Code.SYNTAX, "a tab is used to indent", line + 1, expected="spaces")
    told = " ".join(part for part in (error.context, error.problem) if part)
    return BadText(Code.SYNTAX, told or "not YAML", line + 1)


def line_of(node: Node) -> int:
    """The line of a node within its document, from 1."""
    line: int = node.start_mark.line + 1
    return line


def plain(root: Node) -> Value:
    """The value of a node tree. Keys are text; null values are left out, as in Kubernetes. Raises BadText."""
    return _Reader().value(root, ())


class _Reader:
    """One pass over a node tree. Collections that aliases repeat are shared, and counted against the bound."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Value, int]] = {}
        self._open: set[int] = set()
        self._nodes = 0
        self._aliased = 0

    def value(self, node: Node, path: Path) -> Value:
        self._nodes += 1
        if isinstance(node, ScalarNode):
            return _scalar(node, path)
        known = self._done.get(id(node))
        if known:
            return self._again(node, known, path)
        if id(node) in self._open:
            raise BadText(Code.TOO_LARGE, "an alias stands within the value it repeats", line_of(node), path=path)
        self._open.add(id(node))
        before = self._nodes
        value = self._mapping(node, path) if isinstance(node, MappingNode) else self._sequence(node, path)
        self._open.discard(id(node))
        self._done[id(node)] = (value, self._nodes - before + 1)
        return value

    def _again(self, node: Node, known: tuple[Value, int], path: Path) -> Value:
        value, size = known
        self._nodes += size
        self._aliased += size
        if self._aliased > MAX_ALIASED_NODES:
            text = f"aliases repeat more than {MAX_ALIASED_NODES:,} values"
            raise BadText(Code.TOO_LARGE, text, line_of(node), path=path, expected="fewer aliases")
        return value

    def _sequence(self, node: Node, path: Path) -> Value:
        _check_tag(node, _TAG + "seq", path)
        return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]

    def _mapping(self, node: Node, path: Path) -> Value:
        _check_tag(node, _TAG + "map", path)
        values: dict[str, Value] = {}
        lines: dict[str, int] = {}
        merges: list[Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise BadText(Code.SYNTAX, "a list or mapping is used as a key", line_of(key_node), path=path)
            key = key_node.value
            if key == "<<" and key_node.tag == _PLAIN:
                merges.append(value_node)
                continue
            if key in lines:
                _duplicate(key, lines[key], key_node, path)
            lines[key] = line_of(key_node)
            value = self.value(value_node, (*path, key))
            if value is not None:
                values[key] = value
        for merge in merges:
            self._merge(values, lines, merge, (*path, "<<"))
        return values

    def _merge(self, values: dict[str, Value], own: dict[str, int], node: Node, path: Path) -> None:
        """Keys that stand in the mapping itself win over merged ones, earlier merged mappings over later ones."""
        merged = self.value(node, path)
        for source in merged if isinstance(merged, list) else [merged]:
            if not isinstance(source, dict):
                raise BadText(Code.SYNTAX, "only mappings can be merged", line_of(node), path=path)
            for key, value in source.items():
                if key not in own:
                    values.setdefault(key, value)


def _check_tag(node: Node, expected: str, path: Path) -> None:
    if node.tag not in (_PLAIN, expected):
        _bad_tag(node, path)


def _bad_tag(node: Node, path: Path) -> NoReturn:
    raise BadText(Code.SYNTAX, f"tag {node.tag} is not supported", line_of(node), path=path)


def _duplicate(key: str, first_line: int, node: Node, path: Path) -> NoReturn:
    text = f"the key stands twice in one mapping, first {line_of(node) - first_line} lines above"
    raise BadText(Code.DUPLICATE_KEY, text, line_of(node), path=(*path, key), expected="each key once")


def _scalar(node: ScalarNode, path: Path) -> Value:
    text: str = node.value
    if node.tag == _PLAIN:
        return text if text and text[0] not in _SPECIAL else _resolve(text)
    if node.tag == _STR:
        return text
    if node.tag in _SCALAR_TAGS:
        return _resolve(text)
    _bad_tag(node, path)


@lru_cache(maxsize=16_384)
def _resolve(text: str) -> bool | int | float | str | None:
    """What a plain scalar means."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return _integer(text)
    if _FLOAT.match(text):
        number = text.replace("_", "").lower()
        return float(number.replace(".", "") if number.endswith(("inf", "nan")) else number)
    return text


def _integer(text: str) -> int | str:
    digits = text.replace("_", "").lower()
    body = digits.lstrip("+-")
    try:
        if len(body) > 1 and body[0] == "0" and body[1].isdigit():
            return int(digits, 8)
        return int(digits, 0)
    except ValueError:  # underscores alone, or "08"
        return text


def find(root: Node, path: Path) -> tuple[Node, bool]:
    """The node at ``path``; where the path ends early, the last node on the way, and False."""
    found: Node = root
    for step in path:
        child = _child(found, step)
        if child is None:
            return found, False
        found = child
    return found, True


def _child(node: Node, step: str | int) -> Node | None:
    if isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
        item: Node = node.value[step]
        return item
    if not isinstance(node, MappingNode) or not isinstance(step, str):
        return None
    merges: list[Node] = []
    for key_node, value_node in node.value:
        if isinstance(key_node, ScalarNode) and key_node.value == step:
            value: Node = value_node
            return value
        if isinstance(key_node, ScalarNode) and key_node.value == "<<":
            merges += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
    for merge in merges:
        inherited = _child(merge, step)
        if inherited is not None:
            return inherited
    return None


def show(path: Path) -> str:
    """A path as people write it: ``spec.ports[0].port``, ``metadata.labels[isthmus.dev/proxy]``."""
    text = ""
    for step in path:
        if isinstance(step, int) or not re.fullmatch(r"[A-Za-z0-9_-]+", step):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text
