"""Finds out from packets how a NAT behaves, in the terms of RFC 4787, as a STUN client would (RFC 5780).

One socket inside sends to two addresses outside, two ports each. What source the outside sees tells the mapping. Then
each of the outside's sockets answers to the mapping of the first, uninvited, and what comes in tells the filtering.
"""

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from isthmus.lab.resident import open_socket

_QUIET_S = 0.25
_ARRIVE_S = 3.0

Source = tuple[str, int]


class Behaviour(StrEnum):
    """On what a mapping, or a filter, depends (RFC 4787 sections 4.1 and 5)."""

    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"


@dataclass(frozen=True)
class Observation:
    """What was seen: the mapped sources by destination (address index, port index), and who was let in uninvited."""

    sources: Mapping[tuple[int, int], Source]
    let_in: frozenset[tuple[int, int]]

    @property
    def mapping(self) -> Behaviour:
        """Mapping behaviour."""
        same_address = self.sources[0, 0] == self.sources[0, 1]
        if same_address and self.sources[0, 0] == self.sources[1, 0] == self.sources[1, 1]:
            return Behaviour.ENDPOINT_INDEPENDENT
        return Behaviour.ADDRESS_DEPENDENT if same_address else Behaviour.ADDRESS_AND_PORT_DEPENDENT

    @property
    def filtering(self) -> Behaviour:
        """Filtering behaviour, seen by an inside socket that has contacted destination (0, 0) only."""
        if (1, 1) in self.let_in:
            return Behaviour.ENDPOINT_INDEPENDENT
        return Behaviour.ADDRESS_DEPENDENT if (0, 1) in self.let_in else Behaviour.ADDRESS_AND_PORT_DEPENDENT


@dataclass(frozen=True)
class Outside:
    """Two hosts outside: their namespaces and addresses."""

    namespaces: tuple[str, str]
    addresses: tuple[str, str]

    @property
    def family(self) -> int:
        """The family of the addresses."""
        return socket.AF_INET6 if ":" in self.addresses[0] else socket.AF_INET


def observe_udp(inside: str, outside: Outside, port: int) -> Observation:
    """Probe with UDP from a socket bound to ``port`` in ``inside``; outside, ``port`` and ``port`` + 1 answer."""
    with contextlib.ExitStack() as stack:
        servers = {place: stack.enter_context(each) for place, each in _udp_servers(outside, port)}
        client = stack.enter_context(_bound(inside, socket.SOCK_DGRAM, "", port, outside.family))
        sources = {}
        for place, server in servers.items():
            client.sendto(b"probe", _address(outside, place, port))
            server.settimeout(_ARRIVE_S)
            sources[place] = server.recvfrom(64)[1][:2]
        # A second socket, which has contacted one destination only, is asked who gets through to it.
        lonely = stack.enter_context(_bound(inside, socket.SOCK_DGRAM, "", port + 7, outside.family))
        lonely.sendto(b"probe", _address(outside, (0, 0), port))
        mapped = servers[0, 0].recvfrom(64)[1]
        for (address, number), server in servers.items():
            server.sendto(bytes((address, number)), mapped)
        return Observation(sources, frozenset(_arrivals(lonely)))


def observe_tcp(inside: str, outside: Outside, port: int) -> Observation:
    """The same with TCP: a listener inside shares the port with the connection that opened the mapping."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for place in _places():
            address, number = place
            server = _bound(
                outside.namespaces[address],
                socket.SOCK_STREAM,
                outside.addresses[address],
                port + number,
                outside.family,
            )
            servers[place] = stack.enter_context(server)
            server.listen()
            server.settimeout(_ARRIVE_S)
        sources = {}
        for place, server in servers.items():
            client = stack.enter_context(_bound(inside, socket.SOCK_STREAM, "", port, outside.family))
            client.settimeout(_ARRIVE_S)
            client.connect(_address(outside, place, port))
            accepted, source = server.accept()
            stack.enter_context(accepted)
            sources[place] = source[:2]
        lonely = stack.enter_context(_bound(inside, socket.SOCK_STREAM, "", port + 7, outside.family))
        lonely.settimeout(_ARRIVE_S)
        lonely.connect(_address(outside, (0, 0), port))
        accepted, mapped = servers[0, 0].accept()
        stack.enter_context(accepted)
        listener = stack.enter_context(_bound(inside, socket.SOCK_STREAM, "", port + 7, outside.family))
        listener.listen()
        let_in = {(0, 0)}  # its own connection
        for place in _places()[1:]:
            if _connects(outside, place, port, mapped):
                let_in.add(place)
        return Observation(sources, frozenset(let_in))


def _connects(outside: Outside, place: tuple[int, int], port: int, target: Source) -> bool:
    # From another port than the one the client contacted: for a filter by address that must be good enough.
    address, number = place
    bound = _bound(
        outside.namespaces[address], socket.SOCK_STREAM, outside.addresses[address], port + 20 + number, outside.family
    )
    with bound as client:
        client.settimeout(_QUIET_S)
        try:
            client.connect(target)
        except TimeoutError:
            return False
        return True


def _places() -> list[tuple[int, int]]:
    return [(address, number) for address in (0, 1) for number in (0, 1)]


def _address(outside: Outside, place: tuple[int, int], port: int) -> Source:
    return outside.addresses[place[0]], port + place[1]


def _udp_servers(outside: Outside, port: int) -> Iterator[tuple[tuple[int, int], socket.socket]]:
    for address, number in _places():
        text = outside.addresses[address]
        yield (
            (address, number),
            _bound(outside.namespaces[address], socket.SOCK_DGRAM, text, port + number, outside.family),
        )


def _bound(namespace: str, kind: socket.SocketKind, address: str, port: int, family: int) -> socket.socket:
    opened = open_socket(namespace, kind, family)
    if kind is socket.SOCK_STREAM:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    opened.bind((address, port))
    return opened


def _arrivals(client: socket.socket) -> Iterator[tuple[int, int]]:
    """Yield who got through, until it has been quiet for a while; the one that was contacted must."""
    client.settimeout(_ARRIVE_S)
    end = time.monotonic() + _ARRIVE_S
    while time.monotonic() < end:
        try:
            data = client.recv(64)
        except TimeoutError:
            return
        yield data[0], data[1]
        client.settimeout(_QUIET_S)
