"""Reading one object: typed decode, and findings that name the line and the field. Pure."""

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec
from yaml.nodes import MappingNode, Node, ScalarNode

from isthmus.model.findings import Code, Finding, Severity
from isthmus.model.yamltext import BadText, Path, Value, find, line_of, plain, show

MAX_FINDINGS = 20
"""Findings listed for one object; how many more there are is said in the last."""

Raw = TypeVar("Raw")
Checked = TypeVar("Checked", str, int)

_MESSAGE = re.compile(r"(?P<text>.*?)(?: - at `(?P<key>key in )?\$?(?P<path>[^`]*)`)?\Z", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])")
_WANTED = re.compile(r"Expected `(?P<wanted>[^`]*)`(?:, got `(?P<got>[^`]*)`)?(?P<more>.*)")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")
_WORDS = {"str": "text", "int": "a whole number", "object": "a mapping", "array": "a list", "bool": "true or false"}


class Unusable(Exception):
    """The object cannot be used; its findings say why."""


class Reading:
    """One object being read: where it stands, and what was found. ``base`` leads from the document to the object."""

    def __init__(self, root: Node, base: Path = ()) -> None:
        self._root = root
        self._base = base
        self._dropped = 0
        self._findings: list[Finding] = []
        self.object = ""
        self.failed = False

    @property
    def line(self) -> int:
        """The first line of the object."""
        return line_of(self._root)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found, the last saying how many more there were."""
        if not self._dropped:
            return tuple(self._findings)
        last = self._findings[-1]
        return (*self._findings[:-1], msgspec.structs.replace(last, text=f"{last.text} (and {self._dropped} more)"))

    def fail(self, path: Path, text: str, expected: str = "", code: Code = Code.FIELD) -> None:
        """The object is not usable because of the field at ``path``."""
        self.failed = True
        self._add(Severity.ERROR, code, path, text, expected)

    def warn(self, path: Path, text: str, expected: str = "", code: Code = Code.BAD_VALUE) -> None:
        """The object is used without what ``path`` asks for."""
        self._add(Severity.WARNING, code, path, text, expected)

    def note(self, path: Path, text: str, code: Code = Code.NOT_SERVED) -> None:
        """Nothing is wrong, but something is not served."""
        self._add(Severity.NOTE, code, path, text, "")

    def check(self, path: Path, value: Checked, check: Callable[[Checked], Checked]) -> Checked:
        """The canonical value; a refusal is recorded, and the value returned as it is."""
        try:
            return check(value)
        except ValueError as error:
            self.fail(path, f"{value!r} is not allowed" if value != "" else "it is empty", str(error))
            return value

    def one_of(self, path: Path, value: str, allowed: tuple[str, ...]) -> None:
        """Record a failure unless ``value`` is one of ``allowed``."""
        if value not in allowed:
            self.fail(path, f"{value!r} is not known", f"one of {', '.join(allowed)}")

    def decode(self, value: Value, into: type[Raw]) -> Raw:
        """Typed decode. Raises Unusable after recording what did not fit, where, and what was expected."""
        try:
            return msgspec.convert(value, into)
        except msgspec.ValidationError as error:
            self._misfit(str(error))
            raise Unusable from error

    def stop_if_failed(self) -> None:
        """Raise Unusable once anything failed."""
        if self.failed:
            raise Unusable

    def _add(self, severity: Severity, code: Code, path: Path, text: str, expected: str) -> None:
        if len(self._findings) >= MAX_FINDINGS:
            self._dropped += 1
            return
        node, _ = find(self._root, path)
        field = show(self._base + path)
        finding = Finding(severity, code, text, line=line_of(node), field=field, expected=expected, object=self.object)
        self._findings.append(finding)

    def _misfit(self, message: str) -> None:
        match = _MESSAGE.match(message)
        told, where = (match["text"], match["path"] or "") if match else (message, "")
        path = self._path(where)
        missing = _MISSING.match(told)
        if missing:
            self.fail((*path, missing["field"]), "it is missing", "a value")
            return
        wanted = _WANTED.match(told)
        if not wanted:
            self.fail(path, told)
            return
        expected = " or ".join(_WORDS.get(word, word) for word in wanted["wanted"].split(" | ") if word != "null")
        self.fail(path, self._seen(path, wanted["got"] or ""), expected + wanted["more"])

    def _seen(self, path: Path, got: str) -> str:
        node, exact = find(self._root, path)
        if exact and isinstance(node, ScalarNode):
            return (
                f"{_shorten(node.value)} is {_WORDS.get(got, got)}" if got else f"{_shorten(node.value)} does not fit"
            )
        return f"it is {_WORDS.get(got, got)}"

    def _path(self, text: str) -> Path:
        """msgspec's path. ``[...]`` stands for some value of a mapping to text: the first that is not text is meant."""
        path: Path = ()
        for name, index, anything in _STEP.findall(text):
            if anything:
                path = (*path, *self._not_text(path))
            else:
                path = (*path, int(index) if index else name)
        return path

    def _not_text(self, path: Path) -> Path:
        node, exact = find(self._root, path)
        if exact and isinstance(node, MappingNode):
            for key, value in node.value:
                if not isinstance(value, ScalarNode) or not _is_text(value):
                    return (key.value,)
        return ()


def _is_text(node: ScalarNode) -> bool:
    value = plain(node)
    return value is None or isinstance(value, str)


def _shorten(text: str) -> str:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return f"{shown!r}"


def from_bad_text(error: BadText) -> Finding:
    """The finding of a text that could not be read at all."""
    return Finding(
        Severity.ERROR, error.code, error.text, line=error.line, field=show(error.path), expected=error.expected
    )
