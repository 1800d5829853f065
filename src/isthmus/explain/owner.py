"""Whose address a destination is, and which port of that service is meant, by the proxy's own table."""

import msgspec

from isthmus.explain.hop import Flow
from isthmus.plan.queries import canonical
from isthmus.plan.serving import Member, PortPlan, ServiceKind, ServicePlan
from isthmus.proxy.table import Served, Table
from isthmus.wire.local import Facts


def with_owner(flow: Flow, facts: Facts) -> Flow:
    """``flow`` with the service that ``flow.address`` belongs to, if it does to any, and with a port.

    Without a port in the question it is the service's first port of the flow's protocol.
    """
    owner = _owner_of(flow.address, facts.services)
    if owner is None:
        return flow
    plan, member = owner
    port = _port(plan, member, flow)
    number = flow.port or (_number(port, member) if port else 0)
    return msgspec.structs.replace(flow, service=plan, service_port=port, member=member, port=number)


def served(flow: Flow, facts: Facts) -> Served | None:
    """What the data worker finds in its table for this destination, None where it serves nothing there."""
    table = Table(facts.me.node)
    for plan in facts.services:
        table.put(plan)
    return table.find(flow.address, flow.port, flow.protocol.value)


def _owner_of(address: str, plans: tuple[ServicePlan, ...]) -> tuple[ServicePlan, Member | None] | None:
    """As in the proxy, the first by name has an address that several claim."""
    ordered = sorted(plans, key=lambda plan: plan.full_name)
    for plan in ordered:
        if address in {canonical(one) for one in plan.cluster_ips}:
            return plan, None
    for plan in ordered:
        if plan.kind is ServiceKind.HEADLESS:
            for member in plan.members:
                if member.visible_address == address:
                    return plan, member
    return None


def _port(plan: ServicePlan, member: Member | None, flow: Flow) -> PortPlan | None:
    ports = [port for port in plan.ports if port.protocol is flow.protocol]
    if not flow.port:
        return ports[0] if ports else None
    return next((port for port in ports if _number(port, member) == flow.port), None)


def _number(port: PortPlan, member: Member | None) -> int:
    """The number a client connects to: a member of a headless service is reached on its own port."""
    return port.port if member is None else member.ports.get(port.name, 0)
