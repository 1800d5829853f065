"""What the topology promises for every lab file, and the rules and settings that follow from it."""

import re
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.lab.agents import agent_settings, relay_settings
from isthmus.lab.cluster import Lab
from isthmus.lab.labfile import ForeignSet, Generate, LabFile, Nat, NatType, Node, Pod, Relay, Site, StoreMode
from isthmus.lab.loader import parse_lab_file
from isthmus.lab.nat import nat_ruleset
from isthmus.lab.topology import Role, plan_topology, port_name, prefix
from isthmus.model.settings import Backend


@st.composite
def labs(draw) -> LabFile:
    sites = [Site("cloud", public=True)]
    sites += [Site(f"edge-{n}", nat=Nat(draw(st.sampled_from(NatType)))) for n in range(draw(st.integers(0, 4)))]
    nodes = [Node(f"node-{n}", draw(st.sampled_from(sites)).name) for n in range(draw(st.integers(1, 8)))]
    pods = [Pod(f"pod-{n}", draw(st.sampled_from(nodes)).name) for n in range(draw(st.integers(0, 12)))]
    return LabFile(tuple(sites), tuple(nodes), pods=tuple(pods), dual_stack=draw(st.booleans()))


@given(labs())
@settings(max_examples=60)
def test_interface_names_fit_the_kernel_and_are_unique_in_their_namespace(lab):
    topology = plan_topology(lab)
    ends = [end for veth in topology.veths for end in (veth.near, veth.far)]
    names = [(end.namespace, end.name) for end in ends] + [(b.namespace, b.name) for b in topology.bridges]
    assert len(names) == len(set(names))
    assert all(0 < len(name) <= 15 for _, name in names)


@given(labs())
@settings(max_examples=60)
def test_every_namespace_bears_the_labs_prefix_and_every_gateway_is_on_link(lab):
    topology = plan_topology(lab)
    assert len({place.namespace for place in topology.places}) == len(topology.places)
    assert all(place.namespace.startswith(prefix(lab.name)) for place in topology.places)
    on_link: dict[str, list[str]] = {}
    for each in [*topology.bridges, *(end for veth in topology.veths for end in (veth.near, veth.far))]:
        on_link.setdefault(each.namespace, []).extend(each.addresses)
    for route in topology.routes:
        networks = [ip_interface(address).network for address in on_link[route.namespace]]
        assert any(ip_address(route.gateway) in network for network in networks)


@given(labs())
@settings(max_examples=60)
def test_private_pod_ranges_overlap_and_public_ones_do_not(lab):
    topology = plan_topology(lab)
    private = [place for place in topology.of(Role.NODE) if place.site != "cloud"]
    public = [ip_network(place.pod_cidrs[0]) for place in topology.of(Role.NODE) if place.site == "cloud"]
    assert all(place.pod_cidrs[0] == "172.17.0.0/16" for place in private)
    assert not any(a.overlaps(b) for a in public for b in public if a is not b)


def test_the_same_file_gives_the_same_names():
    lab = LabFile((Site("cloud", public=True),), (Node("a", "cloud"),), pods=(Pod("p", "a"),))
    assert plan_topology(lab).veths == plan_topology(lab).veths
    assert (
        port_name("isthmus-lab-a", "eth0") == port_name("isthmus-lab-a", "eth0") != port_name("isthmus-lab-b", "eth0")
    )


def test_no_labs_prefix_begins_anothers():
    assert not prefix("labx").startswith(prefix("lab"))


def test_a_free_address_is_chosen_beside_the_given_ones():
    pods = (Pod("first", "a"), Pod("given", "a", address="172.17.0.2"), Pod("third", "a"))
    lab = LabFile((Site("c", public=True), Site("e", nat=Nat())), (Node("a", "e"),), pods=pods)
    addresses = [place.addresses[0] for place in plan_topology(lab).of(Role.POD)]
    assert addresses == ["172.17.0.3", "172.17.0.2", "172.17.0.4"]


def test_a_symmetric_nat_chooses_ports_at_random_and_a_cone_does_not_for_the_first_source():
    symmetric = nat_ruleset(Nat(NatType.SYMMETRIC), "198.51.100.11")
    cone = nat_ruleset(Nat(NatType.PORT_RESTRICTED_CONE), "198.51.100.11")
    assert "snat to 198.51.100.11 fully-random" in symmetric
    assert "@inward" not in symmetric
    assert re.search(r"snat to 198\.51\.100\.11$", cone, re.MULTILINE)


def test_only_cones_that_let_strangers_in_have_a_destination_nat():
    lets_in = {
        kind: "dnat" in nat_ruleset(Nat(kind), "198.51.100.11").split("chain postrouting")[0] for kind in NatType
    }
    assert lets_in == {
        NatType.FULL_CONE: True,
        NatType.RESTRICTED_CONE: True,
        NatType.PORT_RESTRICTED_CONE: False,
        NatType.SYMMETRIC: False,
    }


def test_every_enum_of_the_file_is_written_as_its_value():
    values = [*ForeignSet, *Generate, *StoreMode, *NatType]
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", value) for value in values)
    assert Relay("r", "h").port == 20004
    assert parse_lab_file("sites: [{name: c, public: true}]\nnodes: []\n", "f", Path()).name == "lab"


def test_settings_of_a_node_replace_the_labs_and_those_of_relays_reach_their_file():
    text = """
    sites: [{name: c, public: true}]
    hosts: [{name: h}]
    relays: [{name: first, at: h}, {name: second, at: h, port: 20005}]
    nodes: [{name: a, site: c}, {name: b, site: c, settings: {intercept: {backend: iptables}}}]
    agent: {dns: {domain: lab.test}}
    relay: {certificate-hours: 0.1}
    """
    lab = Lab(parse_lab_file(text, "f", Path()))
    made = {node.name: agent_settings(lab, node, lab.place(node.name)) for node in lab.file.nodes}
    assert (made["a"].dns.domain, made["a"].intercept.backend) == ("lab.test", Backend.AUTO)
    assert (made["b"].dns.domain, made["b"].intercept.backend) == ("cluster.local", Backend.IPTABLES)
    first, second = (relay_settings(lab, relay) for relay in lab.file.relays)
    assert (first.issuer, first.token_file, first.certificate_hours) == (True, "", 0.1)
    assert (second.issuer, second.issuer_address) == (False, "203.0.113.101:20004")
    assert second.token_file.endswith("relays/second/token")
