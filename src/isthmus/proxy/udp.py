"""Intercepted UDP: one session for each client and original destination, answers leave from the service's address.

A session ends after ``udp_idle_s`` without a datagram either way, when the endpoint's port turns out closed, or when
its endpoint leaves the service. Their number is bounded; the one that has been idle longest makes room.
"""

import errno
import resource
import socket
from abc import ABC, abstractmethod
from collections import OrderedDict
from itertools import islice
from random import Random
from typing import Any

from isthmus.kernel.intake import Flow, Intake
from isthmus.kernel.sockets import Address, defer_port, family_of, mark_own, set_transparent
from isthmus.loop.loop import READ, Loop
from isthmus.model.errors import KernelError
from isthmus.model.ports import DatagramCarrier, Outcome, StreamRequest
from isthmus.model.settings import ProxySettings
from isthmus.plan.balance import Candidate
from isthmus.proxy.counters import Counters, Reason
from isthmus.proxy.table import Served, Table

DATAGRAMS_A_TURN = 32
EVICTED_FOR_DESCRIPTORS = 16
SWEEPS_AN_IDLE_TIME = 18  # every 10 s of 180

Key = tuple[Address, Address]  # the client and where it sent to

_DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_buffer = bytearray(65_536)
_view = memoryview(_buffer)


class UdpProxy:
    """All intercepted UDP sessions of the node."""

    def __init__(
        self,
        loop: Loop,
        settings: ProxySettings,
        table: Table,
        counters: Counters,
        carrier: DatagramCarrier,
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
        self.sessions: OrderedDict[Key, Session] = OrderedDict()
        # Every session may hold a descriptor; TCP must find some as well.
        self.limit = min(settings.udp_sessions, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._intakes: list[Intake] = []
        self._sweep_s = max(0.05, settings.udp_idle_s / SWEEPS_AN_IDLE_TIME)
        self._sweeper = loop.call_later(self._sweep_s, self._sweep)

    def listen(self, intake: Intake) -> None:
        """Serve what arrives there, and answer through it."""
        self._intakes.append(intake)
        self.loop.add(intake.fileno(), READ, lambda _events: self._read(intake))

    def stop_accepting(self) -> None:
        """Read no more; what is under way is still answered."""
        for intake in self._intakes:
            self.loop.remove(intake.fileno())

    def close_all(self) -> None:
        """End every session and give back every socket."""
        self._sweeper.cancel()
        for session in list(self.sessions.values()):
            session.close("stopped")
        intakes, self._intakes = self._intakes, []
        for intake in intakes:
            self.loop.discard(intake)

    def answer(self, session: "Session", payload: bytes) -> None:
        """Send an answer to the session's client, from the address that the client asked."""
        self.sessions.move_to_end(session.key)
        session.active_s = self.loop.now_s
        session.from_endpoint += len(payload)
        try:
            session.intake.reply(session.flow, payload)
        except BlockingIOError:
            pass  # the queue is full: a datagram is lost, as on any link
        except OSError:
            self.counters.refuse(Reason.REPLY_FAILED)

    def strangers(self) -> int:
        """Datagrams that were sent to the interception address itself."""
        return sum(intake.strangers for intake in self._intakes)

    def _read(self, intake: Intake) -> None:
        for _ in range(DATAGRAMS_A_TURN):
            try:
                received = intake.receive()
            except BlockingIOError:
                return
            except (OSError, KernelError):
                self.counters.refuse(Reason.NOT_INTERCEPTED)
                continue
            if received is not None:
                self.counters.datagrams += 1
                self._forward(intake, received[1], received[0])

    def _forward(self, intake: Intake, flow: Flow, payload: bytes) -> None:
        key = (flow.client, flow.destination)
        session = self.sessions.get(key)
        if session is not None:
            session.flow = flow
            if session.version != self.table.version and not session.still_valid():
                session.close("endpoint-gone")
            elif session.send(payload):
                self.sessions.move_to_end(key)
                return
        session = self._open(intake, flow)
        if session is not None:
            session.send(payload)

    def _open(self, intake: Intake, flow: Flow) -> "Session | None":
        served = self.table.find(*flow.destination, "UDP")
        if served is None:
            self.counters.refuse(Reason.UNKNOWN_DESTINATION)
            return None
        if len(self.sessions) >= self.limit:
            self._evict(1)
        for candidate in served.pool.choose(flow.client[0], self.loop.now_s, self.rng).candidates:
            kind = LocalSession if candidate.node == self.table.node else RemoteSession
            try:
                session = kind(self, intake, flow, served, candidate)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._evict(EVICTED_FOR_DESCRIPTORS)
                    self.counters.refuse(Reason.NO_DESCRIPTORS)
                    return None
                served.pool.rest(candidate, self.loop.now_s + self.settings.rest_s)
                continue
            self.sessions[session.key] = session
            return session
        self.counters.refuse(Reason.NO_ENDPOINT)
        return None

    def _evict(self, count: int) -> None:
        for session in list(islice(self.sessions.values(), count)):
            self.counters.refuse(Reason.SESSION_EVICTED)
            session.close("evicted")

    def _sweep(self) -> None:
        """End the sessions that have been idle too long; the order of the table is that of their last datagram."""
        before_s = self.loop.now_s - self.settings.udp_idle_s
        while self.sessions:
            session = next(iter(self.sessions.values()))
            if session.active_s > before_s:
                break
            session.close("idle")
        self._sweeper = self.loop.call_later(self._sweep_s, self._sweep)


class Session(ABC):
    """One client's datagrams to one destination; the endpoint stays the same while the session lives."""

    __slots__ = (
        "active_s",
        "candidate",
        "flow",
        "from_endpoint",
        "intake",
        "key",
        "proxy",
        "served",
        "started_s",
        "to_endpoint",
        "version",
    )

    def __init__(self, proxy: UdpProxy, intake: Intake, flow: Flow, served: Served, candidate: Candidate) -> None:
        self.proxy = proxy
        self.intake = intake
        self.flow = flow
        self.key: Key = (flow.client, flow.destination)
        self.served = served
        self.candidate = candidate
        self.version = proxy.table.version
        self.started_s = self.active_s = proxy.loop.now_s
        self.to_endpoint = self.from_endpoint = 0
        served.counters.connections += 1
        served.counters.active += 1
        served.pool.connected(candidate, flow.client[0], self.started_s)

    def still_valid(self) -> bool:
        """Whether the service, as it is now, still leads to this endpoint."""
        self.version = self.proxy.table.version
        found = self.proxy.table.find(*self.flow.destination, "UDP")
        return found is self.served and self.served.pool.holds(self.candidate)

    @abstractmethod
    def send(self, payload: bytes) -> bool:
        """Send one datagram on; False if the session has ended, and the datagram was not sent."""

    @abstractmethod
    def release(self) -> None:
        """Give back what the session holds."""

    def close(self, why: str) -> None:
        """End it. Repeating this does nothing."""
        if self.proxy.sessions.get(self.key) is self:
            del self.proxy.sessions[self.key]
            self.served.pool.ended(self.candidate)
            self.served.counters.ended(self.to_endpoint, self.from_endpoint, why)
            self.release()

    def refused(self) -> None:
        """The endpoint's port is closed: rest it, and let the next datagram find another."""
        self.served.counters.refused_endpoints += 1
        self.served.pool.rest(self.candidate, self.proxy.loop.now_s + self.proxy.settings.rest_s)
        self.close("endpoint-refused")

    def _sent(self, size: int) -> None:
        self.to_endpoint += size
        self.active_s = self.proxy.loop.now_s


class LocalSession(Session):
    """Towards an endpoint of this node: a connected socket of its own, so that answers and ICMP errors find it."""

    __slots__ = ("_sock",)

    def __init__(self, proxy: UdpProxy, intake: Intake, flow: Flow, served: Served, candidate: Candidate) -> None:
        client = flow.client[0] if served.plan.preserve_client_address else ""
        self._sock = connected_datagrams(candidate.address, candidate.port, client=client, mark=proxy.mark)
        super().__init__(proxy, intake, flow, served, candidate)
        proxy.loop.add(self._sock.fileno(), READ, self._ready)

    def send(self, payload: bytes) -> bool:
        try:
            self._sock.send(payload)
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            self.refused()
            return False
        except OSError:
            self.close("send-failed")
            return False
        self._sent(len(payload))
        return True

    def release(self) -> None:
        self.proxy.loop.discard(self._sock)

    def _ready(self, _events: int) -> None:
        receive, answer = self._sock.recv_into, self.proxy.answer
        for _ in range(DATAGRAMS_A_TURN):
            try:
                size = receive(_buffer)
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                self.refused()
                return
            except OSError:
                self.close("receive-failed")
                return
            answer(self, bytes(_view[:size]))


class RemoteSession(Session):
    """Towards an endpoint of another node, through the carrier."""

    __slots__ = ("_number",)

    def __init__(self, proxy: UdpProxy, intake: Intake, flow: Flow, served: Served, candidate: Candidate) -> None:
        super().__init__(proxy, intake, flow, served, candidate)
        plan = served.plan
        request = StreamRequest(
            namespace=plan.namespace,
            service=plan.name,
            address=candidate.address,
            port=candidate.port,
            protocol="UDP",
            client_address=flow.client[0],
            client_port=flow.client[1],
            client_node=proxy.table.node,
        )
        self._number = proxy.carrier.open_session(candidate.node, request, self._received, self._closed)

    def send(self, payload: bytes) -> bool:
        self.proxy.carrier.send(self._number, payload)
        self._sent(len(payload))
        return True

    def release(self) -> None:
        self.proxy.carrier.close_session(self._number)

    def _received(self, payload: bytes) -> None:
        if self.proxy.sessions.get(self.key) is self:
            self.proxy.answer(self, payload)

    def _closed(self, outcome: Outcome, _detail: str) -> None:
        # Not from within open_session: the session is not in the table yet.
        self.proxy.loop.call_soon(self.refused if outcome is Outcome.REFUSED else self._lost)

    def _lost(self) -> None:
        self.close("link-lost")


def connected_datagrams(address: str, port: int, *, client: str = "", mark: bool = True) -> socket.socket:
    """A non-blocking UDP socket towards an endpoint; from ``client``'s address if one is given. Raises OSError."""
    sock = socket.socket(family_of(address), _DATAGRAM)
    try:
        if mark:
            mark_own(sock)
        if client:
            set_transparent(sock)
            defer_port(sock)
            sock.bind((client, 0))
        sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def as_data(session: Session, now_s: float) -> dict[str, Any]:
    """One row of ``dump``."""
    client, destination = session.key
    return {
        "protocol": "UDP",
        "client": f"{client[0]}:{client[1]}",
        "service": session.served.plan.full_name,
        "destination": f"{destination[0]}:{destination[1]}",
        "endpoint": f"{session.candidate.address}:{session.candidate.port}",
        "node": session.candidate.node,
        "path": "local" if isinstance(session, LocalSession) else "link",
        "bytes_to_endpoint": session.to_endpoint,
        "bytes_from_endpoint": session.from_endpoint,
        "age_s": round(now_s - session.started_s, 3),
    }
