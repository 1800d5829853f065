"""The four NATs behave as RFC 4787 (UDP) and RFC 5382 (TCP) call it, judged by packets alone.

inside ── lan ── router (NAT) ── access ── internet ── public ── out-1, out-2
"""

import socket
import time

import pytest
from labkit import LabMaker, eventually

from isthmus.lab.cluster import Lab
from isthmus.lab.labfile import NatType
from isthmus.lab.natprobe import Behaviour, Outside, observe_tcp, observe_udp
from isthmus.lab.resident import open_socket

EI, AD, APD = Behaviour.ENDPOINT_INDEPENDENT, Behaviour.ADDRESS_DEPENDENT, Behaviour.ADDRESS_AND_PORT_DEPENDENT

TYPES = [
    (NatType.FULL_CONE, EI, EI),
    (NatType.RESTRICTED_CONE, EI, AD),
    (NatType.PORT_RESTRICTED_CONE, EI, APD),
    (NatType.SYMMETRIC, APD, APD),
]
CONES = [NatType.FULL_CONE, NatType.RESTRICTED_CONE, NatType.PORT_RESTRICTED_CONE]

FILE = """
dual-stack: true
sites:
  - {name: out, public: true}
  - {name: full-cone, nat: {type: full-cone, hairpin: true}}
  - {name: restricted-cone, nat: {type: restricted-cone}}
  - {name: port-restricted-cone, nat: {type: port-restricted-cone}}
  - {name: symmetric, nat: {type: symmetric}}
  - {name: brief, nat: {type: full-cone, udp-timeout-s: 1}}
hosts: [{name: out-1}, {name: out-2}]
nodes:
  - {name: full-cone-1, site: full-cone, agent: false}
  - {name: full-cone-2, site: full-cone, agent: false}
  - {name: restricted-cone-1, site: restricted-cone, agent: false}
  - {name: port-restricted-cone-1, site: port-restricted-cone, agent: false}
  - {name: port-restricted-cone-2, site: port-restricted-cone, agent: false}
  - {name: symmetric-1, site: symmetric, agent: false}
  - {name: brief-1, site: brief, agent: false}
"""


@pytest.fixture(scope="module")
def lab(make_module_lab: LabMaker) -> Lab:
    return make_module_lab(FILE, name="nat")


def outside(lab: Lab, family: int) -> Outside:
    places = lab.place("out-1"), lab.place("out-2")
    return Outside(
        (places[0].namespace, places[1].namespace), (places[0].addresses[family], places[1].addresses[family])
    )


def udp(lab: Lab, label: str, port: int, timeout_s: float = 3.0) -> socket.socket:
    opened = open_socket(lab.place(label).namespace, socket.SOCK_DGRAM)
    opened.bind(("", port))
    opened.settimeout(timeout_s)
    return opened


def tcp(lab: Lab, label: str, port: int) -> socket.socket:
    opened = open_socket(lab.place(label).namespace, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("", port))
    opened.settimeout(3.0)
    return opened


def silent(receiver: socket.socket) -> bool:
    receiver.settimeout(0.3)
    try:
        receiver.recv(64)
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize(("kind", "mapping", "filtering"), TYPES)
@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_udp_mapping_and_filtering_are_those_of_the_type(lab, kind, mapping, filtering, family):
    seen = observe_udp(lab.place(f"{kind}-1").namespace, outside(lab, family), 4000)
    assert (seen.mapping, seen.filtering) == (mapping, filtering)


@pytest.mark.parametrize(("kind", "mapping", "filtering"), TYPES)
@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_tcp_mapping_and_filtering_are_those_of_the_type(lab, kind, mapping, filtering, family):
    seen = observe_tcp(lab.place(f"{kind}-1").namespace, outside(lab, family), 5000)
    assert (seen.mapping, seen.filtering) == (mapping, filtering)


@pytest.mark.parametrize("kind", [row[0] for row in TYPES])
def test_uninvited_input_does_not_change_the_mapping_that_follows(lab, kind):
    """A packet from X to port P of the NAT must not take the tuple that a flow from inside port P to X needs."""
    port = 4100
    router, inner = lab.place(f"{kind}.router"), f"{kind}-1"
    with udp(lab, "out-1", port) as one, udp(lab, "out-2", port) as two, udp(lab, inner, port) as client:
        for outer in (one, two):
            for _ in range(3):
                outer.sendto(b"uninvited", (router.addresses[0], port))
        assert silent(client)
        client.sendto(b"to one", (lab.place("out-1").addresses[0], port))
        first = one.recvfrom(64)[1]
        if kind is not NatType.SYMMETRIC:
            assert first[1] == port, "the port that was free inside is kept outside"
        two.sendto(b"uninvited", first)
        client.sendto(b"again", (lab.place("out-1").addresses[0], port))
        assert one.recvfrom(64)[1] == first


@pytest.mark.parametrize("kind", CONES)
def test_an_uninvited_syn_does_not_take_the_tuple_that_a_connection_needs(lab, kind):
    port, router, far = 4150, lab.place(f"{kind}.router").addresses[0], lab.place("out-1").addresses[0]
    with tcp(lab, "out-1", port) as stranger:
        stranger.settimeout(0.2)
        with pytest.raises(TimeoutError):  # dropped without an answer; a RST would tell that somebody is there
            stranger.connect((router, port))
    with tcp(lab, "out-1", port) as server, tcp(lab, f"{kind}-1", port) as client:
        server.listen()
        client.connect((far, port))
        assert server.accept()[1] == (router, port)


@pytest.mark.parametrize("kind", [NatType.FULL_CONE, NatType.PORT_RESTRICTED_CONE])
def test_two_sources_with_one_port_get_two_mappings(lab, kind):
    """No port overloading (RFC 4787 REQ-3), and each keeps its own mapping to every destination."""
    port = 4200
    with (
        udp(lab, "out-1", port) as one,
        udp(lab, "out-2", port) as two,
        udp(lab, f"{kind}-1", port) as first,
        udp(lab, f"{kind}-2", port) as second,
    ):
        seen = {}
        for name, client in (("first", first), ("second", second)):
            for outer, label in ((one, "out-1"), (two, "out-2")):
                client.sendto(name.encode(), (lab.place(label).addresses[0], port))
                seen.setdefault(name, set()).add(outer.recvfrom(64)[1])
        assert len(seen["first"]) == len(seen["second"]) == 1
        assert seen["first"] != seen["second"]
        if kind is NatType.FULL_CONE:
            two.sendto(b"for the second", seen["second"].pop())
            assert second.recv(64) == b"for the second"


def test_a_mapping_ends_after_its_time_without_outward_packets(lab):
    port, router = 4300, lab.place("brief.router").addresses[0]
    with udp(lab, "out-1", port) as one, udp(lab, "brief-1", port) as client:
        client.sendto(b"open", (lab.place("out-1").addresses[0], port))
        mapped = one.recvfrom(64)[1]
        assert mapped == (router, port)

        def closed() -> bool:
            with udp(lab, "out-2", 0) as stranger:  # each time another: a known one keeps its own flow alive
                stranger.sendto(b"uninvited", mapped)
                return silent(client)

        assert not closed()
        eventually(closed, what="the mapping ends")


def test_outward_packets_keep_a_mapping_alive(lab):
    """RFC 4787 REQ-6: the NAT refreshes outbound. Twice the timeout passes, a packet each quarter of it."""
    port = 4400
    with udp(lab, "out-1", port) as one, udp(lab, "out-2", port) as two, udp(lab, "brief-1", port) as client:
        sources = set()
        end = time.monotonic() + 2.2
        while time.monotonic() < end:
            client.sendto(b"open", (lab.place("out-1").addresses[0], port))
            sources.add(one.recvfrom(64)[1])
            two.settimeout(0.25)
            with pytest.raises(TimeoutError):
                two.recv(64)
        assert len(sources) == 1
        two.sendto(b"uninvited", sources.pop())
        assert client.recv(64) == b"uninvited"


def test_hairpin_reaches_a_neighbour_by_its_outside_address_where_it_is_set(lab):
    """RFC 4787 REQ-9: the neighbour sees the sender's outside address, too."""
    port, router = 4500, lab.place("full-cone.router").addresses[0]
    with (
        udp(lab, "out-1", port) as one,
        udp(lab, "full-cone-1", port) as first,
        udp(lab, "full-cone-2", port + 1) as second,
    ):
        first.sendto(b"open", (lab.place("out-1").addresses[0], port))
        assert one.recvfrom(64)[1] == (router, port)
        second.sendto(b"neighbour", (router, port))
        assert first.recvfrom(64) == (b"neighbour", (router, port + 1))
        first.sendto(b"answer", (router, port + 1))
        assert second.recvfrom(64) == (b"answer", (router, port))


def test_without_hairpin_a_neighbour_is_not_reached_by_its_outside_address(lab):
    port, router = 4600, lab.place("port-restricted-cone.router").addresses[0]
    with (
        udp(lab, "out-1", port) as one,
        udp(lab, "port-restricted-cone-1", port) as first,
        udp(lab, "port-restricted-cone-2", port + 1) as second,
    ):
        first.sendto(b"open", (lab.place("out-1").addresses[0], port))
        assert one.recvfrom(64)[1] == (router, port)
        second.sendto(b"neighbour", (router, port))
        assert silent(first)


def test_private_addresses_cannot_be_reached_from_outside_even_by_who_knows_the_way(lab):
    router = lab.place("full-cone.router").addresses[0]
    lab.run("internet", ["ip", "route", "add", "192.168.1.0/24", "via", router], check=True)
    with udp(lab, "full-cone-1", 4700) as inner, udp(lab, "out-1", 4700) as outer:
        outer.sendto(b"hello", (lab.place("full-cone-1").addresses[0], 4700))
        assert silent(inner)
