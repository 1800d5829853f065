"""What ``isthmus doctor`` is made of: one check a file, each with a stable code and what it depends on.

A check is a file ``check_NAME.py`` with a value ``CHECK``, named in the list of explain/doctor.py. It looks at an
Examined node and returns a Finding. It changes nothing, and says "not checked" rather than guess.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from isthmus.explain.hop import Witness
from isthmus.model.errors import IsthmusError
from isthmus.wire.local import Facts, RuleRow, Status


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    NOT_CHECKED = "not checked"


class Finding(msgspec.Struct, frozen=True):
    """What a check found. ``advice`` is what to do, '' where there is nothing to do."""

    state: State
    text: str
    advice: str = ""
    details: tuple[str, ...] = ()


class Descriptors(NamedTuple):
    """Open files of a process, and how many it may have."""

    used: int
    limit: int


class Hooked(NamedTuple):
    """A foreign chain that the kernel calls by itself.

    ``text`` is its rules as the tool lists them, ``table_text`` those of its whole table. ``drops``: what no rule
    accepts is dropped.
    """

    name: str
    kind: str
    hook: str
    priority: int
    drops: bool
    text: str
    table_text: str = ""


class Examined(Protocol):
    """What a check may look at. The real one is explain/examined.py; in tests it is a table.

    ``error`` is why the agent did not answer (then ``status`` and ``facts`` are None). Methods return None where the
    thing cannot be known here.
    """

    now_s: float
    error: IsthmusError | None
    status: Status | None
    facts: Facts | None
    dns: Witness

    def rules(self) -> tuple[RuleRow, ...] | None:
        """What the kernel holds of ours."""

    def local_addresses(self) -> frozenset[str] | None:
        """The addresses of this node's devices."""

    def ask_upstream(self, server: str) -> str:
        """Ask a resolver for the root's name servers; '' where it answered, else why not."""

    def descriptors(self, pid: int) -> Descriptors | None:
        """Of a process of this node."""

    def sysctl(self, name: str) -> str | None:
        """A kernel setting, by its name with slashes."""

    def hooked(self) -> tuple[Hooked, ...] | None:
        """The chains of others that packets pass."""

    def clock_error_s(self) -> float | None:
        """How far this node's clock may be off, by the kernel's estimate; infinity where nothing keeps it right."""

    def certificate_from_s(self) -> float | None:
        """When this node's certificate begins to be valid."""


class Check(NamedTuple):
    """One check. ``depends_on`` names checks whose failure explains this one's."""

    code: str
    title: str
    run: Callable[[Examined], Finding]
    depends_on: tuple[str, ...] = ()


def ok(text: str, *details: str) -> Finding:
    """Nothing is wrong."""
    return Finding(State.OK, text, details=details)


def not_checked(text: str) -> Finding:
    """It cannot be known here."""
    return Finding(State.NOT_CHECKED, text)
