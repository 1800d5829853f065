"""The endpoint: which members of the service a connection may reach, in which order, and why others are passed over."""

from collections.abc import Iterable

import msgspec

from isthmus.explain.hop import Endpoint, Flow, Held, Report, Step, Witness, place_of, service_object
from isthmus.explain.owner import served
from isthmus.explain.words import count_text
from isthmus.plan.balance import Candidate, Standing, explain
from isthmus.plan.verdict import Verdict
from isthmus.proxy.table import Served
from isthmus.wire.local import EndpointState, Facts

HOP = "endpoint"
SHOWN = 8


def hop(flow: Flow, facts: Facts, _witness: Witness) -> Step:
    """Choose among the endpoints as the data worker would; a connection that is not intercepted has no such hop."""
    if not flow.intercepted:
        return Step(flow)
    found = served(flow, facts)
    if found is None:
        return Step(flow, (_nothing_there(flow, facts),), last=True)
    states = [state for state in facts.endpoints or () if _is_of(state, flow, found)]
    verdict = explain(found.plan, found.port, flow.source.address_towards(flow.address), _resting(states, found))
    firsts = first_choices(verdict)
    endpoints = tuple(Endpoint(one.node, one.address, one.port) for one in firsts)
    report = _report(flow, facts, verdict, firsts, states)
    return Step(msgspec.structs.replace(flow, endpoints=endpoints), (report,), last=not firsts)


def first_choices(verdict: Verdict[tuple[Standing, ...]]) -> list[Standing]:
    """The endpoints of which one is tried first: the nearest tier with one at hand, or all that rest, or the hashed."""
    able = [one for one in verdict.action if one.tier]
    ready = [one for one in able if not one.passed_over] or able
    nearest = [one for one in ready if one.tier == ready[0].tier]
    return nearest[:1] if verdict.rule == "client-hash" else nearest


def _nothing_there(flow: Flow, facts: Facts) -> Report:
    where = f"{flow.address}:{flow.port}/{flow.protocol}"
    plan = flow.service
    if plan is None:
        text = f"no service has the address {flow.address}"
        return Report(
            HOP, "the connection is reset", "no-such-service", text, setting="intercept.service-cidrs", passes=False
        )
    name = service_object(plan)
    ports = ", ".join(f"{port.port}/{port.protocol}" for port in plan.ports) or "none"
    because = f"{plan.full_name} has no port {flow.port}/{flow.protocol}; its ports: {ports}"
    return Report(
        HOP,
        f"the connection to {where} is reset",
        "no-such-port",
        because,
        object=name,
        place=facts.places.get(name, ""),
        setting="spec.ports",
        passes=False,
    )


def _is_of(state: EndpointState, flow: Flow, found: Served) -> bool:
    plan, port = found.plan, found.port
    return (state.service, state.protocol) == (plan.full_name, flow.protocol.value) and state.service_port == port.port


def _resting(states: Iterable[EndpointState], found: Served) -> dict[Candidate, float]:
    distances = {(member.node, member.address): member.distance for member in found.plan.members}
    return {
        Candidate(one.node, one.address, one.port, distances[one.node, one.address]): one.rest_s
        for one in states
        if one.rest_s > 0 and (one.node, one.address) in distances
    }


def _report(
    flow: Flow,
    facts: Facts,
    verdict: Verdict[tuple[Standing, ...]],
    firsts: list[Standing],
    states: list[EndpointState],
) -> Report:
    assert flow.service is not None
    name = service_object(flow.service)
    chosen = [f"{one.address}:{one.port} on {one.node}" for one in firsts]
    count = len(firsts)
    outcome = {0: "no endpoint can be tried; the connection is reset", 1: "".join(chosen)}.get(
        count, f"one of {count} endpoints: {'; '.join(chosen[:SHOWN])}{'; …' if count > SHOWN else ''}"
    )
    others = [one for one in verdict.action if one not in firsts]
    known = facts.endpoints is not None
    busy = sum(state.connections for state in states)
    return Report(
        HOP,
        outcome,
        verdict.rule,
        verdict.because.text,
        object=name,
        place=facts.places.get(name, "") or place_of(facts, verdict.because),
        setting=verdict.because.setting,
        held=Held.OK if known else Held.NOT_CHECKED,
        held_text=f"the data worker has {count_text(busy, 'connection')} open to its endpoints, {_rests(states)}"
        if known
        else "the data worker did not say which endpoints rest",
        alternatives=tuple(_other(one) for one in others),
        passes=bool(firsts),
    )


def _rests(states: list[EndpointState]) -> str:
    resting = sum(state.rest_s > 0 for state in states)
    return f"{count_text(resting, 'endpoint')} at rest" if resting else "no endpoint at rest"


def _other(standing: Standing) -> str:
    where = f"{standing.address}:{standing.port} on {standing.node}" if standing.port else _bare(standing)
    if standing.passed_over:
        return f"passed over: {where}, {standing.passed_over}"
    return f"tried next: {where}"


def _bare(standing: Standing) -> str:
    return f"{standing.address} on {standing.node}"
