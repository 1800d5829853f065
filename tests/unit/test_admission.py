"""A peer reaches the endpoints that the model places on this node, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from isthmus.model.cluster import Protocol
from isthmus.model.ports import StreamRequest
from isthmus.plan.admission import Admission, admit, own_endpoints
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

PLAN = ServicePlan(
    "shop",
    "web",
    ServiceKind.CLUSTER_IP,
    ports=(PortPlan(80, "http"), PortPlan(53, "dns", Protocol.UDP)),
    members=(
        Member("me", "172.17.0.2", Distance.SAME_NODE, {"http": 8080, "dns": 5353}),
        Member("other", "172.17.0.2", Distance.ANYWHERE, {"http": 8080}),
        Member("other", "172.17.0.3", Distance.ANYWHERE, {"http": 8080}),
    ),
)
ASKED = StreamRequest("shop", "web", "172.17.0.2", 8080)


@pytest.mark.parametrize(
    ("request_", "plan", "rule"),
    [
        (ASKED, PLAN, "own-endpoint"),
        (structs.replace(ASKED, protocol="UDP", port=5353), PLAN, "own-endpoint"),
        (structs.replace(ASKED, protocol="UDP"), PLAN, "no-such-port"),  # the port is TCP's
        (structs.replace(ASKED, port=22), PLAN, "no-such-port"),  # the pod is ours, its ssh is not the service's
        (structs.replace(ASKED, address="172.17.0.3"), PLAN, "other-node"),  # the same range, another site
        (structs.replace(ASKED, address="127.0.0.1"), PLAN, "not-a-member"),  # the node's own services
        (structs.replace(ASKED, address="169.254.169.254", port=80), PLAN, "not-a-member"),
        (ASKED, None, "unknown-service"),
        (ASKED, structs.replace(PLAN, ignored="noproxy=edgemesh"), "opted-out"),
    ],
)
def test_the_rule_that_decides_is_named(request_: StreamRequest, plan: ServicePlan | None, rule: str) -> None:
    own = own_endpoints(plan, "me") if plan else frozenset()
    verdict = admit(request_, plan, own, "me")
    assert verdict.rule == rule
    assert (verdict.action is Admission.ADMIT) is (rule == "own-endpoint")
    assert verdict.because.object == "shop/web"


@given(
    st.sampled_from(["172.17.0.2", "172.17.0.3", "10.0.0.1"]),
    st.integers(0, 65535) | st.sampled_from([8080, 5353]),
    st.sampled_from(["TCP", "UDP", ""]),
    st.sampled_from(["me", "other", "third"]),
)
def test_whatever_is_admitted_is_an_endpoint_of_that_node(address: str, port: int, protocol: str, node: str) -> None:
    request = StreamRequest("shop", "web", address, port, protocol)
    if admit(request, PLAN, own_endpoints(PLAN, node), node).action is Admission.ADMIT:
        names = {each.name for each in PLAN.ports if each.protocol.value == protocol}
        assert any(
            each.node == node and each.address == address and port in {each.ports.get(name) for name in names}
            for each in PLAN.members
        )
