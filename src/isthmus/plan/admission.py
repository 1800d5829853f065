"""Whether a stream that comes from another node may go on to an endpoint here. Pure.

A peer is trusted to speak for its own pods, not to choose where this node connects: only endpoints that the model
places on this node, in the service the peer names, are reached.
"""

from enum import StrEnum

from isthmus.model.ports import StreamRequest
from isthmus.plan.serving import ServicePlan
from isthmus.plan.verdict import Because, Verdict

OwnEndpoints = frozenset[tuple[str, int, str]]


class Admission(StrEnum):
    """What happens to the stream."""

    ADMIT = "admit"
    REFUSE = "refuse"


def own_endpoints(plan: ServicePlan, node: str) -> OwnEndpoints:
    """(address, endpoint port, "TCP" or "UDP") of the members that live on ``node``."""
    protocols: dict[str, list[str]] = {}
    for port in plan.ports:
        protocols.setdefault(port.name, []).append(port.protocol.value)
    return frozenset(
        (member.address, number, protocol)
        for member in plan.members
        if member.node == node
        for name, number in member.ports.items()
        for protocol in protocols.get(name, ())
    )


def admit(request: StreamRequest, plan: ServicePlan | None, own: OwnEndpoints, node: str) -> Verdict[Admission]:
    """``plan`` is that of the service the request names, None where there is none; ``own`` its endpoints here."""
    service = f"{request.namespace}/{request.service}"
    if plan is None:
        return _refuse("unknown-service", f"this node knows no service {service}", service)
    if plan.ignored:
        return _refuse("opted-out", f"{service} is not proxied: {plan.ignored}", service)
    if (request.address, request.port, request.protocol) in own:
        return Verdict(Admission.ADMIT, "own-endpoint", Because(f"an endpoint of {service} on {node}", service))
    holders = sorted({member.node for member in plan.members if member.address == request.address})
    if node in holders:
        text = f"{request.address} has no {request.protocol} port {request.port} in {service}"
        return _refuse("no-such-port", text, service)
    if holders:
        text = f"{request.address} is an endpoint of {service} on {', '.join(holders)}, not on {node}"
        return _refuse("other-node", text, service)
    return _refuse("not-a-member", f"{request.address} is no endpoint of {service}", service)


def _refuse(rule: str, text: str, service: str) -> Verdict[Admission]:
    return Verdict(Admission.REFUSE, rule, Because(text, service))
