"""What sibling rooms need of each other, as Protocols that agent/ injects. Values only; no I/O here.

The data worker is one process with one readiness loop; all methods here are called on that loop's thread and never
block. ``proxy`` accepts intercepted connections and connects to endpoints of this node; ``link`` carries streams and
datagrams to other nodes; neither imports the other.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from socket import socket


class StreamRequest(msgspec.Struct, frozen=True):
    """What the accepting node asks the endpoint's node for. Sent in the OPEN frame of a stream, so it stays small.

    ``client_address``/``client_port`` are the pod's, carried as metadata. ``protocol`` is "TCP" or "UDP".
    """

    namespace: str
    service: str
    address: str
    port: int
    protocol: str = "TCP"
    client_address: str = ""
    client_port: int = 0
    client_node: str = ""


class Outcome(StrEnum):
    """How opening a stream to an endpoint ended."""

    OPENED = "opened"
    REFUSED = "refused"  # the endpoint refused (RST): rest it, try the next at once
    TIMED_OUT = "timed-out"  # no answer from the endpoint within the deadline
    NOT_ALLOWED = "not-allowed"  # the receiving node does not own that endpoint
    NO_PATH = "no-path"  # the node cannot be reached on any path now
    EXHAUSTED = "exhausted"  # no descriptors or ports left there


class StreamCarrier(Protocol):
    """Implemented by link/, used by proxy/: carries an accepted client connection to an endpoint of another node."""

    def carry(
        self,
        node: str,
        request: StreamRequest,
        client: "socket",
        opened: Callable[[Outcome, str], None],
        ended: Callable[[int, int], None],
    ) -> "CancelOpen":
        """Open a stream to ``node`` and, once the endpoint is connected, move bytes until both sides have ended.

        ``opened(outcome, detail)`` is called exactly once, unless the returned function is called first. With OPENED
        the carrier owns ``client`` and closes it; with anything else, and after a cancel, ``client`` is untouched and
        the caller may try another endpoint. ``ended(bytes_to_endpoint, bytes_to_client)`` follows OPENED exactly once.
        The client socket must be out of the caller's readiness loop when OPENED is reported.
        """


CancelOpen = Callable[[], None]


class DatagramCarrier(Protocol):
    """Implemented by link/, used by proxy/: carries UDP datagrams of one client session to another node."""

    def open_session(
        self,
        node: str,
        request: StreamRequest,
        received: Callable[[bytes], None],
        closed: Callable[[Outcome, str], None],
    ) -> int:
        """Return a session number (> 0). ``received`` gets each answer; ``closed`` is called at most once."""

    def send(self, session: int, payload: bytes) -> None:
        """Send one datagram; dropped and counted when the link's queue is full, as UDP is."""

    def close_session(self, session: int) -> None:
        """Forget the session on both nodes."""


class EndpointConnector(Protocol):
    """Implemented by proxy/, used by link/: reaches endpoints of this node for streams that come from other nodes."""

    def connect(self, peer: str, request: StreamRequest, done: "Callable[[Outcome, socket | None, str], None]") -> None:
        """Connect to the endpoint if the model gives it to this node (plan/admission.py), else NOT_ALLOWED, counted.

        With OPENED the caller owns the connected, non-blocking socket.
        """

    def open_datagrams(
        self, peer: str, request: StreamRequest, received: Callable[[bytes], None]
    ) -> "tuple[Outcome, DatagramEndpoint | None, str]":
        """A connected UDP socket towards the endpoint, under the same admission."""


class DatagramEndpoint(Protocol):
    """A UDP session towards a local endpoint, held by link/ for a remote client."""

    def send(self, payload: bytes) -> None:
        """Send one datagram to the endpoint; errors are counted, never raised."""

    def close(self) -> None:
        """Close the socket."""
