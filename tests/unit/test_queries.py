"""The few services that the agent sends for a trace give the same answers as all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.plan.names import Names, RecordType
from isthmus.plan.queries import canonical, relevant
from isthmus.plan.serving import Distance, Member, PortPlan, ServiceKind, ServicePlan

DOMAIN = "cluster.local"
labels = st.sampled_from(["a", "b", "shop", "web", "svc"])


@st.composite
def services(draw):
    kind = draw(st.sampled_from(list(ServiceKind)))
    plan = ServicePlan(draw(labels), draw(labels), kind, ports=(PortPlan(80),))
    if kind is ServiceKind.EXTERNAL_NAME:
        target = draw(st.sampled_from(["example.org", f"{draw(labels)}.{draw(labels)}.svc.{DOMAIN}"]))
        return ServicePlan(plan.namespace, plan.name, kind, external_name=target)
    address = f"10.96.0.{draw(st.integers(1, 9))}"
    member = Member("n", "10.1.0.1", Distance.ANYWHERE, {"": 80}, visible_address=address, hostname=draw(labels))
    ips = (address,) if kind is ServiceKind.CLUSTER_IP else ()
    return ServicePlan(plan.namespace, plan.name, kind, cluster_ips=ips, ports=plan.ports, members=(member,))


def answers(plans, name):
    names = Names(DOMAIN, local_networks=["10.96.0.0/12"])
    for plan in plans:
        names.put(plan)
    return [names.lookup(name, rtype) for rtype in (RecordType.A, RecordType.SRV)]


@given(
    st.lists(services(), max_size=12, unique_by=lambda plan: plan.full_name), st.lists(labels, min_size=1, max_size=4)
)
def test_a_name_is_answered_as_by_all_services(plans, parts):
    for name in (".".join(parts), f"{'.'.join(parts)}.svc.{DOMAIN}."):
        assert answers(relevant(plans, name), name) == answers(plans, name)


@given(st.lists(services(), max_size=12, unique_by=lambda plan: plan.full_name), st.integers(1, 9))
def test_an_address_finds_every_service_that_has_it(plans, last):
    address = f"10.96.0.{last}"
    expected = [
        plan for plan in plans if address in plan.cluster_ips or any(m.visible_address == address for m in plan.members)
    ]
    assert list(relevant(plans, address)) == expected


@given(st.lists(services(), max_size=12, unique_by=lambda plan: plan.full_name), labels, labels)
def test_a_short_name_is_answered_as_by_all_services(plans, name, namespace):
    few = relevant(plans, name, namespace)
    for suffix in (f"{namespace}.svc.{DOMAIN}", f"svc.{DOMAIN}", DOMAIN):
        assert answers(few, f"{name}.{suffix}") == answers(plans, f"{name}.{suffix}")


@given(st.text(max_size=40))
def test_any_text_is_a_question(text):
    assert relevant([], text) == ()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("[FD00::1]", "fd00::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("web", None),
        ("10.0.0", None),
        ("", None),
    ],
)
def test_addresses_are_told_from_names(text, address):
    assert canonical(text) == address
