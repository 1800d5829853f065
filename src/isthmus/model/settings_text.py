"""From the text of a settings file to its typed value; every error names file, line and field. Pure."""

import re
from ipaddress import ip_address, ip_network
from typing import ClassVar, TypeVar

import msgspec
import yaml

from isthmus.model.errors import IsthmusError
from isthmus.model.settings import AgentSettings, RelaySettings

T = TypeVar("T")
Path = tuple[str | int, ...]


class SettingsError(IsthmusError):
    """A settings file that cannot be used; nothing was started."""

    code: ClassVar[str] = "settings.invalid"


def parse_agent_settings(text: str, file: str) -> AgentSettings:
    """The settings of an agent, checked. Raises SettingsError."""
    settings = decode(text, AgentSettings, file)
    check = _Checker(text, file)
    if not settings.node:
        check.fail(("node",), "the node's name is missing; it is the name of its Node object")
    for index, relay in enumerate(settings.relays):
        check.endpoint(("relays", index, "address"), relay.address)
    for index, text_range in enumerate(settings.virtual_cidrs):
        check.network(("virtual-cidrs", index), text_range)
    for index, text_range in enumerate(settings.pod_cidrs):
        check.network(("pod-cidrs", index), text_range)
    for index, text_range in enumerate(settings.intercept.service_cidrs):
        check.network(("intercept", "service-cidrs", index), text_range)
    check.address(("intercept", "address-v4"), settings.intercept.address_v4, 4)
    check.address(("intercept", "address-v6"), settings.intercept.address_v6, 6)
    check.port(("intercept", "port"), settings.intercept.port)
    check.port(("link-port",), settings.link_port)
    for index, upstream in enumerate(settings.dns.upstreams):
        check.upstream(("dns", "upstreams", index), upstream)
    return settings


def parse_relay_settings(text: str, file: str) -> RelaySettings:
    """The settings of a relay, checked. Raises SettingsError."""
    settings = decode(text, RelaySettings, file)
    _Checker(text, file).endpoint(("listen",), settings.listen)
    return settings


def decode(text: str, wanted: type[T], file: str) -> T:
    """Decode YAML ``text``; an empty file is all defaults. Raises SettingsError with file, line and field."""
    try:
        data = yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        raise SettingsError(f"{file}:{mark.line + 1 if mark else 1}: not YAML: {problem}") from error
    except (ValueError, RecursionError) as error:  # a date that does not exist, nesting without end
        raise SettingsError(f"{file}:1: cannot be read: {error}") from error
    try:
        return msgspec.convert({} if data is None else data, wanted, strict=True)
    except msgspec.ValidationError as error:
        message, at = explain(str(error))
        raise SettingsError(f"{file}:{line_of(text, at)}: {field_name(at)}: {message}") from error


def explain(message: str) -> tuple[str, Path]:
    """Take msgspec's ``... - at `$.sites[1].nat` `` apart; an unknown field is added to the path, for its own line."""
    found = re.fullmatch(r"(.*?)(?: - at `\$(.*)`)?", message, re.DOTALL)
    text, where = (found.group(1), found.group(2) or "") if found else (message, "")
    path: list[str | int] = [name or int(index) for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", where)]
    unknown = re.search(r"contains unknown field `([^`]+)`", text)
    if unknown:
        return "there is no such field", (*path, unknown.group(1))
    return text[:1].lower() + text[1:], tuple(path)


def field_name(at: Path) -> str:
    """A path as people write it: ``relays[0].address``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".") or "the file"


def line_of(text: str, at: Path) -> int:
    """Line (from 1) of the deepest node on the path ``at`` that stands in ``text``, which is valid YAML."""
    node, line = yaml.compose(text, Loader=yaml.CSafeLoader), 1
    for step in at:
        found: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = (node.value[step], node.value[step])
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


class _Checker:
    """Checks of single fields that types cannot express."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file

    def fail(self, at: Path, message: str) -> None:
        raise SettingsError(f"{self._file}:{line_of(self._text, at)}: {field_name(at)}: {message}")

    def network(self, at: Path, value: str) -> None:
        try:
            ip_network(value)
        except ValueError as error:
            self.fail(at, f"{error}; expected a range like 10.96.0.0/12")

    def address(self, at: Path, value: str, version: int) -> None:
        try:
            good = not value or ip_address(value).version == version
        except ValueError:
            good = False
        if not good:
            self.fail(at, f"{value!r} is not an IPv{version} address")

    def port(self, at: Path, value: int) -> None:
        if not 0 < value < 65_536:
            self.fail(at, f"{value} is not a port (1 to 65535)")

    def endpoint(self, at: Path, value: str) -> None:
        host, separator, port = value.rpartition(":")
        if not separator or not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
            self.fail(at, f"{value!r} is not HOST:PORT (an IPv6 host stands in brackets)")

    def upstream(self, at: Path, value: str) -> None:
        try:
            ip_address(value)
        except ValueError:
            self.endpoint(at, value)
