"""Admission: whether the endpoint's node will connect to it for us, by the function that node calls."""

from isthmus.explain.hop import Endpoint, Flow, Held, Report, Step, Witness, service_object
from isthmus.model.ports import StreamRequest
from isthmus.plan.admission import Admission, admit, own_endpoints
from isthmus.wire.local import Facts

HOP = "admission"


def hop(flow: Flow, facts: Facts, _witness: Witness) -> Step:
    """One report, on the first endpoint that is on another node; the others of the service are judged alike."""
    remote = next((one for one in flow.endpoints if one.node != facts.me.node), None)
    return Step(flow) if remote is None else Step(flow, (_report(flow, remote, facts),))


def _report(flow: Flow, endpoint: Endpoint, facts: Facts) -> Report:
    plan = flow.service
    assert plan is not None
    request = StreamRequest(plan.namespace, plan.name, endpoint.address, endpoint.port, flow.protocol.value)
    verdict = admit(request, plan, own_endpoints(plan, endpoint.node), endpoint.node)
    admitted = verdict.action is Admission.ADMIT
    name = service_object(plan)
    where = f"{endpoint.node} {'connects' if admitted else 'refuses to connect'} to {endpoint.address}:{endpoint.port}"
    return Report(
        HOP,
        where,
        verdict.rule,
        verdict.because.text,
        object=name,
        place=facts.places.get(name, ""),
        held=Held.NOT_CHECKED,
        held_text=f"{endpoint.node} decides by its own store, which is not asked",
        passes=admitted,
    )
