"""Interception: whether netfilter hands the connection to the proxy, and whether the kernel holds the rules for it."""

import msgspec

from isthmus.explain.hop import Flow, Held, Report, Step, Witness, place_of, service_object
from isthmus.explain.words import count_text, join_text
from isthmus.model.cluster import Protocol
from isthmus.plan.interception import TCP, UDP, Action, InterceptionPlan, Packet, decide
from isthmus.plan.serving import ServiceKind
from isthmus.plan.verdict import Verdict
from isthmus.wire.local import Facts, RuleRow

HOP = "interception"
NUMBERS = {Protocol.TCP: TCP, Protocol.UDP: UDP}


def hop(flow: Flow, facts: Facts, _witness: Witness) -> Step:
    """Decide as the kernel's rules do; what is not intercepted is routed as if Isthmus were not there."""
    if facts.planned is None:
        return Step(flow, (_not_planned(facts),), last=True)
    verdict = decide(Packet(flow.address, NUMBERS[flow.protocol]), facts.planned)
    intercepted = verdict.action is Action.INTERCEPT
    report = _report(flow, facts, facts.planned, verdict)
    return Step(msgspec.structs.replace(flow, intercepted=intercepted), (report,), last=not intercepted)


def _not_planned(facts: Facts) -> Report:
    error = facts.interception.error or "the agent has not planned it yet"
    return Report(HOP, "it cannot be said what the kernel does", "not-planned", error, passes=False)


def _report(flow: Flow, facts: Facts, planned: InterceptionPlan, verdict: Verdict[Action]) -> Report:
    because = verdict.because
    object_ = because.object or (service_object(flow.service) if flow.service else "")
    held, held_text = _held(flow, facts, verdict)
    ends = _dead_end(flow, verdict)
    return Report(
        HOP,
        _outcome(flow, planned, verdict) + (f"; {ends}" if ends else ""),
        verdict.rule,
        because.text,
        object=object_,
        place=facts.places.get(object_, "") or place_of(facts, because),
        setting=because.setting,
        held=held,
        held_text=held_text,
        passes=not ends and held is not Held.DIFFERS,
    )


def _outcome(flow: Flow, planned: InterceptionPlan, verdict: Verdict[Action]) -> str:
    where = f"{flow.address}:{flow.port}" if flow.port else flow.address
    if verdict.action is not Action.INTERCEPT:
        return f"{where} is left alone and routed as if Isthmus were not there"
    target = planned.address_v6 if ":" in flow.address else planned.address_v4
    return f"{where} is handed to the proxy at {target} port {planned.port} by {planned.backend}, {planned.handover}"


def _dead_end(flow: Flow, verdict: Verdict[Action]) -> str:
    """Why a connection that is left alone cannot arrive: its address means something to us only."""
    plan = flow.service
    if verdict.action is Action.INTERCEPT or plan is None or plan.ignored:
        return ""
    if plan.kind is ServiceKind.CLUSTER_IP:
        return "but it is the cluster address of a service, which nothing else may serve"
    if flow.member is not None and flow.member.virtual:
        return "but it is a virtual address of this node"
    return ""


def _held(flow: Flow, facts: Facts, verdict: Verdict[Action]) -> tuple[Held, str]:
    """Hold the verdict against the rules and set elements that the kernel reports."""
    rows = facts.rules
    if rows is None:
        return Held.NOT_CHECKED, "the kernel's rules could not be read"
    missing = [row.comment or row.name for row in rows if not row.present and not _is_exception(row)]
    if missing:
        return Held.DIFFERS, f"missing in the kernel: {join_text(missing)}"
    if not rows and verdict.action is not Action.LEAVE:
        return Held.DIFFERS, "nothing of ours is in the kernel"
    exception = next((row for row in rows if _is_exception(row) and flow.address in row.match.split()), None)
    if verdict.action is Action.INTERCEPT and exception is not None and exception.present:
        return Held.DIFFERS, f"the kernel returns {flow.address}: {exception.comment}"
    if verdict.action is Action.RETURN and (exception is None or not exception.present):
        return Held.DIFFERS, f"the kernel has no exception for {flow.address}"
    return (
        Held.OK,
        f"the kernel holds {count_text(len(rows), 'rule and element', 'rules and elements')} of ours, as planned",
    )


def _is_exception(row: RuleRow) -> bool:
    return row.action.lower() == "return"
