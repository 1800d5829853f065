"""What a trace is made of: a connection as far as it is known, and hops that each learn the next thing about it.

A hop is one file ``hop_NAME.py`` with a function of the type ``Hop``, named in the list of explain/trace.py. It gets
the connection as the hops before left it and returns a Step. It decides nothing: it calls the function of plan/ that
the agent calls, and holds the verdict against what the agent, its workers or the kernel report.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Protocol as Interface

import msgspec

from isthmus.model.cluster import Protocol
from isthmus.plan.serving import Member, PortPlan, ServicePlan
from isthmus.plan.verdict import Because
from isthmus.wire.local import Facts


class Held(StrEnum):
    """How a verdict compares with what is reported."""

    OK = "ok"
    DIFFERS = "differs"
    NOT_CHECKED = "not checked"


class Report(msgspec.Struct, frozen=True):
    """One hop as it is printed. ``fields`` are documented in docs/commands/trace.md.

    ``passes`` is false where the connection ends here. ``place`` is FILE:LINE of ``object``.
    """

    hop: str
    outcome: str
    rule: str
    because: str
    object: str = ""
    place: str = ""
    setting: str = ""
    held: Held = Held.NOT_CHECKED
    held_text: str = ""
    alternatives: tuple[str, ...] = ()
    passes: bool = True


class Source(msgspec.Struct, frozen=True):
    """Who connects. ``namespace`` decides the search path of names; '' is the node itself, which has none."""

    name: str
    node: str
    addresses: tuple[str, ...] = ()
    namespace: str = ""

    def address_towards(self, destination: str) -> str:
        """The source's address of the family of ``destination``, '' where it has none."""
        version6 = ":" in destination
        return next((one for one in self.addresses if (":" in one) == version6), "")


class Endpoint(msgspec.Struct, frozen=True):
    """An endpoint that may be tried first."""

    node: str
    address: str
    port: int


class NodePath(msgspec.Struct, frozen=True):
    """How an endpoint's node is reached, in a few words.

    ``proven``: it is known to work. ``otherwise``: the way of another kind that serves if it does not.
    """

    node: str
    text: str
    proven: bool
    otherwise: str = ""


class Flow(msgspec.Struct, frozen=True):
    """The connection as known so far.

    ``destination`` is what the user typed; ``address`` is '' until a name is resolved, ``port`` 0 until it is known.
    ``service``, ``service_port`` and ``member`` (of a headless service) say what the address belongs to.
    """

    source: Source
    protocol: Protocol
    destination: str
    address: str = ""
    port: int = 0
    service: ServicePlan | None = None
    service_port: PortPlan | None = None
    member: Member | None = None
    intercepted: bool = False
    endpoints: tuple[Endpoint, ...] = ()
    paths: tuple[NodePath, ...] = ()


class Step(msgspec.Struct, frozen=True):
    """What a hop found: the connection as it goes on, and what is printed. ``last``: no further hop is asked."""

    flow: Flow
    reports: tuple[Report, ...] = ()
    last: bool = False


class Witness(Interface):
    """What is asked while tracing, beside the agent. In tests it is a table."""

    def resolve(self, name: str, record_type: str) -> frozenset[str] | None:
        """Ask this node's DNS server; the addresses it answers, none for NODATA and NXDOMAIN, None without answer."""


Hop = Callable[[Flow, Facts, Witness], Step]


def place_of(facts: Facts, because: Because) -> str:
    """FILE:LINE of the object that a verdict names, '' where it is not known."""
    return facts.places.get(because.object, "")


def service_object(plan: ServicePlan) -> str:
    """The service as ``Facts.places`` names it."""
    return f"Service {plan.full_name}"
