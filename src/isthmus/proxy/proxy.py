"""The room put together: what a data worker makes one of.

proxy = Proxy(loop, settings.proxy, node, carrier, datagrams)
link.use(proxy.connector)
proxy.put_service(plan)                                        # PutService and DropService, as they come
detail = proxy.listen(settings.intercept, original_destination)  # after Synced
proxy.drain(loop.stop)
"""

import errno
import socket
from collections.abc import Callable
from itertools import islice
from random import Random
from typing import Any

from isthmus.kernel.intake import Intake
from isthmus.kernel.sockets import transparent_listener
from isthmus.loop.loop import Loop
from isthmus.model.ports import DatagramCarrier, StreamCarrier
from isthmus.model.settings import InterceptSettings, ProxySettings
from isthmus.plan.serving import ServicePlan
from isthmus.proxy.connector import Connector
from isthmus.proxy.counters import Counters
from isthmus.proxy.table import Table
from isthmus.proxy.tcp import ReadDestination, TcpProxy
from isthmus.proxy.tcp import as_data as tcp_data
from isthmus.proxy.udp import UdpProxy
from isthmus.proxy.udp import as_data as udp_data
from isthmus.wire.local import EndpointState

BACKLOG = 65_535  # the kernel lowers it to net.core.somaxconn
DRAIN_LOOK_S = 0.05

_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})


class Proxy:
    """Intercepted connections of one node. All methods on the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        settings: ProxySettings,
        node: str,
        carrier: StreamCarrier,
        datagrams: DatagramCarrier,
        *,
        rng: Random | None = None,
        mark: bool = True,
    ) -> None:
        """``mark``: sockets carry our mark, which needs CAP_NET_ADMIN; without it interception would loop."""
        rng = rng or Random()
        self._loop = loop
        self._settings = settings
        self._counters = Counters()
        self._table = Table(node)
        self.tcp = TcpProxy(loop, settings, self._table, self._counters, carrier, rng=rng, mark=mark)
        self.udp = UdpProxy(loop, settings, self._table, self._counters, datagrams, rng=rng, mark=mark)
        self.connector = Connector(loop, settings, self._table, self._counters, mark=mark)

    def put_service(self, plan: ServicePlan) -> None:
        """A service is new or changed. Open connections are left alone."""
        self._table.put(plan)

    def drop_service(self, namespace: str, name: str) -> None:
        """A service is gone. Open connections are left alone."""
        self._table.drop(namespace, name)

    def listen(self, intercept: InterceptSettings, read_destination: ReadDestination) -> dict[str, str]:
        """Listen on the interception addresses; returns on what, for ``Ready.detail``: {"tcp4": "ADDRESS:PORT", ...}.

        A node without IPv6 has no ``tcp6``. Raises OSError where an address cannot be bound for another reason; nothing
        is left bound then, and this may be tried again.
        """
        bound: dict[str, str] = {}
        made: list[tuple[socket.socket, Intake]] = []
        try:
            for family, address in (("4", intercept.address_v4), ("6", intercept.address_v6)):
                try:
                    made.append(_listeners(address, intercept.port))
                except OSError as error:
                    if family == "6" and error.errno in _NO_FAMILY:
                        continue
                    raise
                bound[f"tcp{family}"] = bound[f"udp{family}"] = f"{address}:{intercept.port}"
        except OSError:
            for streams, datagrams in made:
                streams.close()
                datagrams.close()
            raise
        for streams, datagrams in made:
            self.tcp.listen(streams, read_destination)
            self.udp.listen(datagrams)
        return bound

    def stop_accepting(self) -> None:
        """Close the listeners; what is open goes on."""
        self.tcp.stop_accepting()
        self.udp.stop_accepting()

    def drain(self, stopped: Callable[[], None]) -> None:
        """Stop accepting, give open TCP connections ``drain_s`` to end, reset the rest, then call ``stopped``."""
        self.stop_accepting()
        self._look_drained(self._loop.now_s + self._settings.drain_s, stopped)

    def counters(self) -> dict[str, Any]:
        """Everything that is counted, as plain data; bounded by the number of services and of reasons."""
        now_s = self._loop.now_s
        return {
            "services": len(self._table),
            "tcp_connections": len(self.tcp.connections),
            "udp_sessions": len(self.udp.sessions),
            "accepted": self._counters.accepted,
            "datagrams": self._counters.datagrams,
            "strangers": self.udp.strangers(),
            "refused": dict(self._counters.refused),
            "admission": dict(self._counters.admission),
            "by_service": {name: each.as_data() for name, each in self._table.counters()},
            "resting": [
                {"service": name, "port": port, "endpoint": endpoint, "rests_s": round(rest_s, 1)}
                for name, port, endpoint, rest_s in self._table.resting(now_s)
            ],
        }

    def connections(self, limit: int = 1_000) -> list[dict[str, Any]]:
        """The open connections and sessions, oldest first, at most ``limit`` of each kind."""
        now_s = self._loop.now_s
        rows = [tcp_data(each, now_s) for each, _ in zip(self.tcp.connections.values(), range(limit), strict=False)]
        rows += [udp_data(each, now_s) for each, _ in zip(self.udp.sessions.values(), range(limit), strict=False)]
        return rows

    def endpoints(self, limit: int = 100_000) -> list[EndpointState]:
        """What is remembered of endpoints: who is used, who rests."""
        return list(islice(self._table.states(self._loop.now_s), limit))

    def _look_drained(self, until_s: float, stopped: Callable[[], None]) -> None:
        if self.tcp.connections and self._loop.now_s < until_s:
            self._loop.call_later(DRAIN_LOOK_S, lambda: self._look_drained(until_s, stopped))
            return
        self.tcp.abort_all()
        self.udp.close_all()
        stopped()


def _listeners(address: str, port: int) -> tuple[socket.socket, Intake]:
    streams = transparent_listener(address, port, backlog=BACKLOG)
    try:
        return streams, Intake(address, port)
    except OSError:
        streams.close()
        raise
