"""``isthmus trace``: asks each hop in turn what happens to a connection, and says in one line how it ends."""

from collections.abc import Callable, Sequence

import msgspec

from isthmus.explain import hop_admission, hop_dns, hop_endpoint, hop_interception, hop_path
from isthmus.explain.hop import Flow, Held, Hop, NodePath, Report, Source, Witness
from isthmus.explain.owner import with_owner
from isthmus.explain.source import find_source
from isthmus.explain.words import count_text
from isthmus.model.cluster import Protocol
from isthmus.model.errors import UsageError
from isthmus.plan.queries import canonical
from isthmus.wire.local import Facts

# In the order in which a packet meets them. Masquerade and encryption will stand behind the path.
HOPS: tuple[Hop, ...] = (
    hop_dns.hop,
    hop_interception.hop,
    hop_endpoint.hop,
    hop_path.hop,
    hop_admission.hop,
)

SHOWN = 4

AskFacts = Callable[[dict[str, str]], Facts]


class Trace(msgspec.Struct, frozen=True):
    """``isthmus trace -o json``. ``arrives`` decides the exit code."""

    node: str
    source: str
    destination: str
    protocol: str
    address: str
    port: int
    service: str
    arrives: bool
    conclusion: str
    hops: tuple[Report, ...]


def trace(source: str, destination: str, protocol: Protocol, ask: AskFacts, witness: Witness) -> Trace:
    """Follow a connection of ``source`` (a pod) to ``destination`` (``NAME[:PORT]``, ``ADDRESS[:PORT]``).

    ``ask`` puts the question "facts" to the agent. Raises UsageError for a source or destination that cannot be meant.
    """
    name, port = split_destination(destination)
    # A second question is needed only where the namespace, which decides what a short name means, is not in the first.
    namespace = source.rpartition("/")[0]
    facts = ask({"destination": name, "namespace": namespace})
    who = find_source(source, facts)
    if who.namespace != namespace:
        facts = ask({"destination": name, "namespace": who.namespace})
    return follow(Flow(who, protocol, name, port=port), facts, witness)


def follow(flow: Flow, facts: Facts, witness: Witness, hops: Sequence[Hop] = HOPS) -> Trace:
    """Ask ``hops`` until one says that it is the last."""
    reports: list[Report] = []
    for hop in hops:
        step = hop(flow, facts, witness)
        flow = step.flow
        reports += step.reports
        if step.last:
            break
        if flow.address and flow.service is None:
            flow = with_owner(flow, facts)
    return _concluded(flow, facts, tuple(reports))


def split_destination(text: str) -> tuple[str, int]:
    """``NAME:PORT``, ``10.0.0.1:80``, ``[fd00::1]:80`` or any of them without a port (0). Raises UsageError."""
    if canonical(text) is not None:
        return canonical(text) or text, 0
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, ""
    if colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise UsageError(f"“{port}” is no port", hint="a port is a number from 1 to 65535")
    if not host or "/" in host or any(character.isspace() for character in host):
        raise UsageError(f"“{text}” is no destination", hint="a name or an address, and :PORT if you like")
    return canonical(host) or host, int(port or 0)


def _concluded(flow: Flow, facts: Facts, reports: tuple[Report, ...]) -> Trace:
    # Of several paths one that passes is enough, for the others' endpoints are passed over.
    broken = [report for report in reports if not report.passes and not _another_passes(report, reports)]
    arrives = not broken
    return Trace(
        node=facts.me.node,
        source=flow.source.name,
        destination=flow.destination,
        protocol=flow.protocol.value,
        address=flow.address,
        port=flow.port,
        service=flow.service.full_name if flow.service else "",
        arrives=arrives,
        conclusion=_success(flow, reports) if arrives else _failure(flow, broken[0]),
        hops=reports,
    )


def _another_passes(report: Report, reports: tuple[Report, ...]) -> bool:
    return report.hop == hop_path.HOP and any(one.passes for one in reports if one.hop == report.hop)


def _where(source: Source, flow: Flow) -> str:
    port = f":{flow.port}" if flow.port else ""
    return f"{source.name} to {flow.destination}{port}/{flow.protocol}"


def _success(flow: Flow, reports: tuple[Report, ...]) -> str:
    way = f"{_where(flow.source, flow)} arrives"
    if not flow.intercepted:
        return f"{way} if the network routes it: Isthmus leaves it alone"
    if len(flow.endpoints) == 1:
        end, path = flow.endpoints[0], flow.paths[0]
        return f"{way} at {end.address}:{end.port} on {path.node}, {_path(path)}"
    rule = next(report.rule for report in reports if report.hop == hop_endpoint.HOP)
    where = " or ".join(f"{path.node} ({_path(path)})" for path in flow.paths[:SHOWN])
    more = f" or {count_text(len(flow.paths) - SHOWN, 'other node')}" if len(flow.paths) > SHOWN else ""
    return f"{way} at one of {len(flow.endpoints)} endpoints by {rule}, on {where}{more}"


def _path(path: NodePath) -> str:
    if path.proven:
        return path.text
    if path.otherwise:
        return f"{path.text} if that answers, else {path.otherwise}"
    return f"{path.text}, if that answers: it was not tried lately"


def _failure(flow: Flow, broken: Report) -> str:
    cause = broken.held_text if broken.held is Held.DIFFERS else broken.because
    return f"{_where(flow.source, flow)} does NOT arrive: {cause} ({broken.hop})"
