"""Intercepted TCP: accept, find the service, connect to an endpoint, splice.

Endpoints are tried in the order of plan/balance.py. One that refuses is passed over at once; one that stays silent for
``connect_stagger_s`` gets company, and the first to answer wins. What did not answer rests.
"""

import socket
from collections.abc import Callable
from random import Random
from typing import Any

from isthmus.loop.loop import READ, Loop, Timer
from isthmus.loop.splice import End, Splice, reset
from isthmus.model.errors import KernelError
from isthmus.model.ports import CancelOpen, Outcome, StreamCarrier, StreamRequest
from isthmus.model.settings import ProxySettings
from isthmus.plan.balance import Candidate
from isthmus.proxy.counters import Counters, Reason
from isthmus.proxy.dial import Dial
from isthmus.proxy.reserve import EXHAUSTED, Reserve
from isthmus.proxy.table import Served, Table

ACCEPTS_A_TURN = 16
PAUSE_S = 0.1  # how long accepting pauses when not even the reserve descriptor is left

# How long an endpoint rests whose node cannot be reached now: short, for paths come back by themselves.
NO_PATH_REST_S = 1.0

Address = tuple[str, int]
ReadDestination = Callable[[socket.socket], Address]


class TcpProxy:
    """All intercepted TCP connections of the node."""

    def __init__(
        self,
        loop: Loop,
        settings: ProxySettings,
        table: Table,
        counters: Counters,
        carrier: StreamCarrier,
        *,
        rng: Random,
        mark: bool = True,
    ) -> None:
        self.loop = loop
        self.settings = settings
        self.table = table
        self.counters = counters
        self.carrier = carrier
        self.rng = rng
        self.mark = mark
        self.connections: dict[int, Connection] = {}
        self._reserve = Reserve()
        self._listeners: dict[socket.socket, ReadDestination] = {}
        self._number = 0

    def listen(self, listener: socket.socket, read_destination: ReadDestination) -> None:
        """Serve a listening, non-blocking socket; the options set here, accepted sockets inherit."""
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        self._listeners[listener] = read_destination
        self._watch(listener)

    def stop_accepting(self) -> None:
        """Close the listeners; connections live on."""
        listeners, self._listeners = self._listeners, {}
        for listener in listeners:
            self.loop.discard(listener)
        self._reserve.close()

    def abort_all(self) -> None:
        """Reset every connection."""
        for connection in list(self.connections.values()):
            connection.abort()

    def _watch(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self.loop.add(listener.fileno(), READ, lambda _events: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        read_destination = self._listeners[listener]
        for _ in range(ACCEPTS_A_TURN):
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._refuse_all_waiting(listener)
                    return
                continue  # the client is gone again (ECONNABORTED), or its packet was refused by a rule
            self.counters.accepted += 1
            try:
                destination = read_destination(client)
            except (KernelError, OSError):
                self.refuse(client, Reason.NOT_INTERCEPTED)
            else:
                self._serve(client, (peer[0], peer[1]), destination)

    def _serve(self, client: socket.socket, peer: Address, destination: Address) -> None:
        served = self.table.find(destination[0], destination[1], "TCP")
        if served is None:
            self.refuse(client, Reason.UNKNOWN_DESTINATION)
            return
        self._number += 1
        connection = Connection(self, self._number, client, peer, served)
        self.connections[self._number] = connection
        connection.start()

    def refuse(self, client: socket.socket, reason: Reason) -> None:
        """Reset a client and count why."""
        self.counters.refuse(reason)
        reset(self.loop, client)

    def _refuse_all_waiting(self, listener: socket.socket) -> None:
        """No descriptor is left: refuse those who wait cleanly, a batch a turn; the connections there are live on."""
        for _ in range(ACCEPTS_A_TURN):
            if not self._reserve.reset_one(listener):
                break
            self.counters.refuse(Reason.NO_DESCRIPTORS)
        else:
            return
        # Others take what is freed, or nobody waits: being called again and again for it would cost a processor.
        self.loop.remove(listener.fileno())
        self.loop.call_later(PAUSE_S, lambda: self._watch(listener))


class Connection:
    """One accepted client: first the attempts to reach an endpoint, then the splice or the carrier's stream."""

    __slots__ = (
        "_attempts",
        "_deadline_s",
        "_order",
        "_timer",
        "client",
        "endpoint",
        "number",
        "peer",
        "proxy",
        "served",
        "splice",
        "started_s",
    )

    def __init__(self, proxy: TcpProxy, number: int, client: socket.socket, peer: Address, served: Served) -> None:
        self.proxy = proxy
        self.number = number
        self.client = client
        self.peer = peer
        self.served = served
        self.started_s = proxy.loop.now_s
        self.endpoint: Candidate | None = None
        self.splice: Splice | None = None
        self._deadline_s = self.started_s + proxy.settings.connect_timeout_s
        self._timer: Timer | None = None
        self._attempts: dict[Candidate, Dial | CancelOpen] = {}

    def start(self) -> None:
        """Choose and try the first endpoint."""
        proxy = self.proxy
        counters = self.served.counters
        counters.connections += 1
        counters.active += 1
        choice = self.served.pool.choose(self.peer[0], self.started_s, proxy.rng)
        self._order = choice.candidates
        if not self._try_next():
            self._fail(Reason.NO_ENDPOINT if choice.rule == "no-endpoint" else Reason.ENDPOINTS_FAILED)

    def abort(self) -> None:
        """Reset it, whatever its state. A stream that the carrier holds ends with the carrier."""
        if self.splice is not None:
            self.splice.abort()
        elif self.endpoint is None:
            self._fail(Reason.DRAINING)

    def _try_next(self) -> bool:
        """Try endpoints until one is connected or has to be waited for; False when none is left and none waits."""
        for candidate in self._order:
            outcome = self._attempt(candidate)
            if outcome is None:
                if self._timer is None and self.endpoint is None:
                    self._timer = self.proxy.loop.call_later(self.proxy.settings.connect_stagger_s, self._tick)
                return True
            if outcome is Outcome.OPENED:
                return True
            if not self._passed_over(candidate, outcome):
                return True
        return bool(self._attempts)

    def _attempt(self, candidate: Candidate) -> Outcome | None:
        """Begin one; None: it is under way."""
        proxy = self.proxy
        plan = self.served.plan
        if candidate.node != proxy.table.node:
            self._carry(candidate)
            return None
        client = self.peer[0] if plan.preserve_client_address else ""
        dial = Dial(proxy.loop, candidate.address, candidate.port, self._dialled, client=client, mark=proxy.mark)
        known = dial.start()
        if known is None:
            self._attempts[candidate] = dial
            return None
        if known[0] is Outcome.OPENED:
            self._won(candidate, dial)
        return known[0]

    def _dialled(self, dial: Dial, outcome: Outcome, _detail: str) -> None:
        candidate = next(each for each, attempt in self._attempts.items() if attempt is dial)
        del self._attempts[candidate]
        if outcome is Outcome.OPENED:
            self._won(candidate, dial)
        else:
            self._lost(candidate, outcome)

    def _carry(self, candidate: Candidate) -> None:
        """Ask the carrier for an endpoint of another node; it takes the client socket when that has answered."""
        plan = self.served.plan
        request = StreamRequest(
            namespace=plan.namespace,
            service=plan.name,
            address=candidate.address,
            port=candidate.port,
            client_address=self.peer[0],
            client_port=self.peer[1],
            client_node=self.proxy.table.node,
        )
        self.client.setblocking(False)
        told: list[Outcome] = []

        def opened(outcome: Outcome, _detail: str) -> None:
            told.append(outcome)
            self._attempts.pop(candidate, None)
            if outcome is Outcome.OPENED:
                self._carried(candidate)
            else:
                # Not from within carry(): the order of endpoints is being walked there.
                self.proxy.loop.call_soon(lambda: self._lost(candidate, outcome))

        cancel = self.proxy.carrier.carry(candidate.node, request, self.client, opened, self._stream_ended)
        if not told:
            self._attempts[candidate] = cancel

    def _won(self, candidate: Candidate, dial: Dial) -> None:
        self._settle(candidate)
        self.splice = Splice(self.proxy.loop, self.client, dial.take(), self._splice_ended)

    def _carried(self, candidate: Candidate) -> None:
        self._settle(candidate)

    def _settle(self, candidate: Candidate) -> None:
        """``candidate`` answered first: the others are given up, and rest if they were silent."""
        self.endpoint = candidate
        self._stop_timer()
        if self._attempts:
            self._give_up(rest=True)
        self.served.pool.connected(candidate, self.peer[0], self.proxy.loop.now_s)

    def _lost(self, candidate: Candidate, outcome: Outcome) -> None:
        """An attempt under way failed."""
        if self.number not in self.proxy.connections or self.endpoint is not None:
            return
        if self._passed_over(candidate, outcome) and not self._try_next():
            self._fail(Reason.ENDPOINTS_FAILED)

    def _passed_over(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Rest what failed. False where trying others makes no sense: the connection was refused to the client."""
        counters = self.served.counters
        proxy = self.proxy
        if outcome is Outcome.EXHAUSTED and candidate.node == proxy.table.node:
            self._fail(Reason.NO_DESCRIPTORS)
            return False
        rest_s = NO_PATH_REST_S if outcome in (Outcome.NO_PATH, Outcome.EXHAUSTED) else proxy.settings.rest_s
        self.served.pool.rest(candidate, proxy.loop.now_s + rest_s)
        if outcome is Outcome.TIMED_OUT:
            counters.slow_endpoints += 1
        else:
            counters.refused_endpoints += 1
        return True

    def _tick(self) -> None:
        """Nobody answered within the stagger: try one more beside those under way, until the deadline."""
        self._timer = None
        now_s = self.proxy.loop.now_s
        if self.endpoint is not None:
            return
        if now_s >= self._deadline_s:
            waits = [each for each in self._attempts.values() if isinstance(each, Dial) and each.waits_for_a_port]
            self._give_up(rest=True)
            self._fail(Reason.NO_PORTS if waits else Reason.CONNECT_TIMEOUT)
            return
        self._try_next()
        if self.endpoint is None and self._timer is None and self.number in self.proxy.connections:
            wait_s = min(self.proxy.settings.connect_stagger_s, max(0.001, self._deadline_s - now_s))
            self._timer = self.proxy.loop.call_later(wait_s, self._tick)

    def _give_up(self, *, rest: bool) -> None:
        attempts, self._attempts = self._attempts, {}
        for candidate, attempt in attempts.items():
            silent = attempt.is_silent() if isinstance(attempt, Dial) else True
            if isinstance(attempt, Dial):
                attempt.cancel()
            else:
                attempt()
            if rest and silent:
                self.served.counters.slow_endpoints += 1
                self.served.pool.rest(candidate, self.proxy.loop.now_s + self.proxy.settings.rest_s)

    def _fail(self, reason: Reason) -> None:
        self._stop_timer()
        self._give_up(rest=False)
        self.proxy.refuse(self.client, reason)
        self.served.counters.ended(0, 0, reason)
        self.proxy.connections.pop(self.number, None)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stream_ended(self, to_endpoint: int, to_client: int) -> None:
        self._over(to_endpoint, to_client, End.CLOSED)

    def _splice_ended(self, to_endpoint: int, to_client: int, why: End) -> None:
        self._over(to_endpoint, to_client, why)

    def _over(self, to_endpoint: int, to_client: int, why: End) -> None:
        assert self.endpoint is not None
        self.served.pool.ended(self.endpoint)
        self.served.counters.ended(to_endpoint, to_client, why)
        self.proxy.connections.pop(self.number, None)


def as_data(connection: Connection, now_s: float) -> dict[str, Any]:
    """One row of ``dump``. Bytes of a stream that the carrier holds are known to the carrier until it ends."""
    endpoint, splice = connection.endpoint, connection.splice
    plan = connection.served.plan
    if endpoint is None:
        path = "connecting"
    else:
        path = "link" if splice is None else "local"
    return {
        "protocol": "TCP",
        "client": f"{connection.peer[0]}:{connection.peer[1]}",
        "service": plan.full_name,
        "destination": f"port {connection.served.port.port}",
        "endpoint": f"{endpoint.address}:{endpoint.port}" if endpoint else "",
        "node": endpoint.node if endpoint else "",
        "path": path,
        "bytes_to_endpoint": splice.bytes_a_to_b if splice else 0,
        "bytes_from_endpoint": splice.bytes_b_to_a if splice else 0,
        "age_s": round(now_s - connection.started_s, 3),
    }
