"""Which servers other names are asked of, in which order, and what is known of their health. Pure.

A server that failed twice in a row rests: it is asked last until a probe of ours is answered. One that sends our own
probe back to us is in a loop and is not asked at all until a later probe comes back answered.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from isthmus.model.errors import UsageError
from isthmus.model.settings import DNS_PORT

FAILURES_TO_REST = 2


class UpstreamError(UsageError):
    """A setting names an upstream that cannot be one."""

    code = "dns.upstream"


@dataclass(slots=True, eq=False)
class Upstream:
    """One server and what happened with it."""

    address: str
    port: int = DNS_PORT
    failures: int = 0
    looping: bool = False
    asked: int = 0
    answered: int = 0
    plain: bool = False  # refused OPT once: is asked without it

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def resting(self) -> bool:
        return self.failures >= FAILURES_TO_REST

    @property
    def state(self) -> str:
        """For ``status``."""
        return "looping" if self.looping else "resting" if self.resting else "fine"


class Upstreams:
    """The servers in the order of the settings."""

    def __init__(self) -> None:
        self.all: list[Upstream] = []

    def set(self, servers: Iterable[tuple[str, int]]) -> bool:
        """Replace the list; what is known of servers that stay is kept. Returns whether anything changed."""
        wanted = list(dict.fromkeys(servers))
        known = {(upstream.address, upstream.port): upstream for upstream in self.all}
        if list(known) == wanted:
            return False
        self.all = [known.get(server) or Upstream(*server) for server in wanted]
        return True

    def in_order(self) -> list[Upstream]:
        """Those that may be asked, healthy ones first."""
        return sorted((upstream for upstream in self.all if not upstream.looping), key=lambda one: one.resting)


def parse_server(text: str) -> tuple[str, int]:
    """``ADDRESS``, ``ADDRESS:PORT`` or ``[IPV6]:PORT``. Raises UpstreamError."""
    host, port = text.strip(), str(DNS_PORT)
    if host.startswith("["):
        host, _, port = host[1:].partition("]")
        port = port.removeprefix(":") or str(DNS_PORT)
    elif host.count(":") == 1:
        host, port = host.split(":")
    try:
        number = int(port)
        if not 0 < number < 65_536:
            raise ValueError(f"{port} is not a port")
        return str(ip_address(host)), number
    except ValueError as error:
        hint = "write 192.0.2.53, 192.0.2.53:5353 or [2001:db8::53]:53"
        raise UpstreamError(f"{text!r} in dns.upstreams is not a server address: {error}", hint=hint) from error


def parse_resolv_conf(text: str) -> list[tuple[str, int]]:
    """The ``nameserver`` lines of a resolv.conf(5), in order; lines that cannot be read are left out."""
    servers: list[tuple[str, int]] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                servers.append((str(ip_address(words[1])), DNS_PORT))
            except ValueError:
                continue
    return servers
