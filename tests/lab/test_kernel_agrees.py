"""The kernel and ``decide`` agree on random packets: what arrives at the proxy is exactly what the function says."""

import json
import os
import random
import socket
import time
from pathlib import Path

import pytest
from kernel_foreign import lay
from kernel_node import IGNORED, Node, ask_udp, child, inside, running_node, settings

from isthmus.kernel.intake import Intake
from isthmus.kernel.original_destination import Method
from isthmus.kernel.sockets import family_of
from isthmus.model.marks import FROM_CLIENT, OWN
from isthmus.model.settings import Backend
from isthmus.plan.interception import UDP, Action, Handover, Packet, decide

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

PACKETS = 400
NETWORKS = ("10.96.0.", "10.95.255.", "10.112.0.", "10.111.255.", "240.96.7.", "240.97.0.", "192.0.2.", "172.17.0.")
NETWORKS_V6 = ("fd00:10:96::", "fd00:10:96::1:", "fd00:a9fe:6011::", "fd00:a9fe:6012::", "fd00:c0::")
MARKS = (0, 0, 0, OWN, FROM_CLIENT, 0x4000, 0xE0, 0x10, 0x8)


def random_packets(rng: random.Random, *, marks: bool) -> list[Packet]:
    chosen = [*IGNORED, "169.254.96.16", "fd00:a9fe:6010::16", "10.96.0.80"]
    for _ in range(PACKETS):
        if rng.random() < 0.6:
            chosen.append(f"{rng.choice(NETWORKS)}{rng.randrange(4, 250)}")
        else:
            chosen.append(f"{rng.choice(NETWORKS_V6)}{rng.randrange(0x10, 0xFFFF):x}")
    return [Packet(address, UDP, rng.choice(MARKS) if marks else 0) for address in chosen]


def send(packets: list[Packet]) -> None:
    for number, packet in enumerate(packets):
        with socket.socket(family_of(packet.destination), socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, packet.mark)
            sock.setblocking(False)
            try:
                sock.sendto(json.dumps([number, packet.destination]).encode(), (packet.destination, 7777))
            except OSError:  # no route, no neighbour: such a packet is nobody's
                pass


def arrivals(made: Node, sender: str, packets: list[Packet]) -> dict[int, str]:
    """Number and destination of each datagram that reaches the interception sockets when ``sender`` sends them."""

    def receive() -> dict[int, str]:
        found: dict[int, str] = {}
        intakes = [Intake("169.254.96.16", 40001), Intake("fd00:a9fe:6010::16", 40001)]
        inside(sender, lambda: send(packets))
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            for intake in intakes:
                try:
                    received = intake.receive()
                except BlockingIOError:
                    continue
                if received is not None:
                    number, destination = json.loads(received[0])
                    assert received[1].destination == (destination, 7777)
                    found[number] = destination
                end = time.monotonic() + 0.5
        for intake in intakes:
            intake.close()
        return found

    result: dict[int, str] = inside(made.node, receive)
    return result


@pytest.mark.parametrize("handover", list(Handover))
@pytest.mark.parametrize("backend", [Backend.NFTABLES, Backend.IPTABLES])
def test_the_kernel_does_what_the_function_says(tmp_path: Path, backend: Backend, handover: Handover) -> None:
    how = settings(backend, handover)
    rng = random.Random(7)
    with running_node("a", tmp_path) as made:
        lay(made.node, "legacy")
        made.apply(how)
        plan = child(made.node, lambda: made.plan(how))
        for namespace, marks in ((made.client, False), (made.routed, False), (made.node, True)):
            packets = random_packets(rng, marks=marks)
            found = arrivals(made, namespace, packets)
            expected = {
                number: packet.destination
                for number, packet in enumerate(packets)
                if decide(packet, plan).action is Action.INTERCEPT
            }
            assert len(expected) > PACKETS / 10
            assert found == expected


def test_strict_reverse_path_filters_do_not_stop_interception(tmp_path: Path) -> None:
    """Red Hat's default: rp_filter 1 everywhere."""
    for handover in Handover:
        with running_node("x", tmp_path) as made:
            how = settings(Backend.NFTABLES, handover)
            child(made.node, _strict)
            made.apply(how)
            made.start_taker(Method.TPROXY if handover is Handover.TPROXY else Method.GETSOCKOPT)
            for namespace in (made.client, made.routed, made.node):
                assert ask_udp(namespace, "10.96.0.80", 53)["destination"] == ["10.96.0.80", 53]


def _strict() -> None:
    for name in Path("/proc/sys/net/ipv4/conf").iterdir():
        (name / "rp_filter").write_text("1")
