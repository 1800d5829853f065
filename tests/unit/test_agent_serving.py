"""What is served follows from what the store holds, not from the way it came there, and only differences are sent."""

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.agent.serving import Serving
from isthmus.model.cluster import Endpoint, EndpointPort, EndpointSlice, Key, Node, Object, Service, ServicePort
from isthmus.model.settings import AgentSettings
from isthmus.plan.nodes import NodeFacts
from isthmus.plan.serving import Distance, ServicePlan
from isthmus.wire.worker import DropService, PutService

ME = AgentSettings(node="n1", site="east", pod_cidrs=("172.17.0.0/16",))


class Sent:
    """What a worker would hold after all messages."""

    def __init__(self) -> None:
        self.plans: dict[str, ServicePlan] = {}
        self.messages = 0

    def __call__(self, message: PutService | DropService) -> None:
        self.messages += 1
        if isinstance(message, PutService):
            self.plans[message.plan.full_name] = message.plan
        else:
            del self.plans[f"{message.namespace}/{message.name}"]


def services() -> st.SearchStrategy[Object]:
    return st.builds(
        lambda name, headless, labels: Service(
            "shop",
            name,
            cluster_ips=() if headless else (f"10.96.0.{ord(name)}",),
            headless=headless,
            ports=(ServicePort(80, "http"),),
            labels=labels,
        ),
        st.sampled_from("abc"),
        st.booleans(),
        st.sampled_from([{}, {"noproxy": "edgemesh"}]),
    )


def slices() -> st.SearchStrategy[Object]:
    endpoint = st.builds(
        lambda node, last: Endpoint(f"172.17.0.{last}", node=node),
        st.sampled_from(["n1", "n2", "n3"]),
        st.integers(2, 5),
    )
    return st.builds(
        lambda name, endpoints: EndpointSlice(
            "shop", f"{name}-1", name, ports=(EndpointPort(8080, "http"),), endpoints=tuple(endpoints)
        ),
        st.sampled_from("abc"),
        st.lists(endpoint, max_size=4, unique_by=lambda one: (one.node, one.address)),
    )


def nodes() -> st.SearchStrategy[Object]:
    return st.builds(
        lambda name, site: Node(name, site=site, pod_cidrs=("172.17.0.0/16",), internal_ips=("192.168.0.9",)),
        st.sampled_from(["n1", "n2", "n3"]),
        st.sampled_from(["east", "west"]),
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(services(), slices(), nodes()), st.booleans()), max_size=25))
def test_any_order_of_changes_leads_to_what_the_final_state_says(steps: list[tuple[Object, bool]]) -> None:
    sent, final = Sent(), dict[Key, Object]()
    serving = Serving(ME, sent, lambda: 0.0)
    for thing, stays in steps:
        if stays:
            serving.change((thing,), ())
            final[thing.key] = thing
        else:
            serving.change((), (thing.key,))
            final.pop(thing.key, None)
    fresh = Serving(ME, lambda _: None, lambda: 0.0, serving.pool.records())
    fresh.change(final.values(), ())
    assert serving.plans == fresh.plans
    assert sent.plans == {plan.full_name: plan for plan in serving.plans.values()}
    assert serving.exceptional == {key: plan for key, plan in serving.plans.items() if plan.ignored}


def test_a_change_that_changes_nothing_is_not_sent() -> None:
    sent = Sent()
    serving = Serving(ME, sent, lambda: 0.0)
    service = Service("shop", "web", cluster_ips=("10.96.0.1",), ports=(ServicePort(80),))
    serving.change((service,), ())
    serving.change((service,), ())
    assert sent.messages == 1


def test_an_announcement_tells_how_far_a_node_is_and_its_end_takes_that_back() -> None:
    serving = Serving(ME, Sent(), lambda: 0.0)
    service = Service("shop", "web", cluster_ips=("10.96.0.1",), ports=(ServicePort(80),))
    piece = EndpointSlice(
        "shop", "web-1", "web", ports=(EndpointPort(80),), endpoints=(Endpoint("10.1.1.1", node="n2"),)
    )
    serving.change((service, piece), ())

    def distance() -> Distance:
        return serving.plans[service.key].members[0].distance

    assert distance() is Distance.ANYWHERE
    assert serving.announce("n2", NodeFacts("east", ("10.1.1.0/24",), ("192.168.0.2",)))
    assert distance() is Distance.SAME_SITE
    assert serving.announce("n2", None)
    assert distance() is Distance.ANYWHERE


def test_an_announcement_that_claims_the_service_range_is_not_believed() -> None:
    serving = Serving(ME, Sent(), lambda: 0.0)
    assert not serving.announce("n2", NodeFacts("east", ("10.96.0.0/16",), ()))
    assert "n2" not in serving.nodes


def test_a_cluster_address_outside_the_service_ranges_is_reported_until_it_is_mended() -> None:
    serving = Serving(ME, Sent(), lambda: 0.0)
    wrong = Service("shop", "web", cluster_ips=("10.200.0.1",), ports=(ServicePort(80),))
    serving.change((wrong,), ())
    assert [str(finding.code) for finding in serving.findings[wrong.key]] == ["service.not-in-range"]
    serving.change((Service("shop", "web", cluster_ips=("10.96.0.1",), ports=(ServicePort(80),)),), ())
    assert not serving.findings
