"""What the proxy counts: by service, and by reason for whatever was refused. Plain data for ``status`` and metrics."""

from enum import StrEnum

from isthmus.loop.splice import End

Tree = dict[str, "int | Tree"]


class Reason(StrEnum):
    """Why a connection, a datagram or a stream was not carried; documented in docs/proxy.md."""

    UNKNOWN_DESTINATION = "unknown-destination"  # no service of this node has that address, port and protocol
    NOT_INTERCEPTED = "not-intercepted"  # the kernel has no original destination for it
    NO_ENDPOINT = "no-endpoint"  # the service has no endpoint that may be tried
    ENDPOINTS_FAILED = "endpoints-failed"  # every endpoint refused or could not be reached
    CONNECT_TIMEOUT = "connect-timeout"  # no endpoint answered within connect-timeout-s
    NO_PORTS = "no-ports"  # no local port was free towards the endpoint within connect-timeout-s
    NO_DESCRIPTORS = "no-descriptors"  # the limit on open files is reached
    DRAINING = "draining"  # the proxy is stopping
    SESSION_EVICTED = "session-evicted"  # UDP: the number of sessions is bounded; the longest idle one went
    REPLY_FAILED = "reply-failed"  # UDP: an answer could not be sent from the service's address


class ServiceCounters:
    """One service. Goes when the service goes, so the number of these is bounded by the model."""

    __slots__ = ("active", "connections", "ends", "from_endpoint", "refused_endpoints", "slow_endpoints", "to_endpoint")

    def __init__(self) -> None:
        self.connections = 0
        self.active = 0
        self.to_endpoint = 0
        self.from_endpoint = 0
        self.refused_endpoints = 0
        self.slow_endpoints = 0
        self.ends: dict[str, int] = {}

    def ended(self, to_endpoint: int, from_endpoint: int, why: End | str) -> None:
        """A connection that was counted as active is over."""
        self.active -= 1
        self.to_endpoint += to_endpoint
        self.from_endpoint += from_endpoint
        self.ends[why] = self.ends.get(why, 0) + 1

    def as_data(self) -> Tree:
        """For ``status``, ``dump`` and metrics."""
        return {
            "connections": self.connections,
            "active": self.active,
            "bytes_to_endpoint": self.to_endpoint,
            "bytes_from_endpoint": self.from_endpoint,
            "refused_endpoints": self.refused_endpoints,
            "slow_endpoints": self.slow_endpoints,
            "ends": dict(self.ends),
        }


class Counters:
    """Of the whole proxy."""

    def __init__(self) -> None:
        self.refused: dict[str, int] = {}
        self.admission: dict[str, int] = {}
        self.accepted = 0
        self.datagrams = 0

    def refuse(self, reason: Reason) -> None:
        """Something was not carried."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def admitted(self, rule: str) -> None:
        """A stream from another node was judged by ``rule`` of plan/admission.py."""
        self.admission[rule] = self.admission.get(rule, 0) + 1
