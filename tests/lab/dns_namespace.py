"""A network namespace with the real DNS worker in it, fed as the agent feeds it, and upstreams beside it."""

import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import dns.exception
import dns.flags
import dns.message
import dns.query
import msgspec

from isthmus.dns.worker import DnsConfig, command
from isthmus.model.settings import INTERCEPT_ADDRESS_V4, INTERCEPT_ADDRESS_V6, DnsSettings
from isthmus.plan.serving import PortPlan, ServiceKind, ServicePlan
from isthmus.wire import frames, worker

CLONE_NEWNET = 0x40000000
SERVER = INTERCEPT_ADDRESS_V4
SERVER_V6 = INTERCEPT_ADDRESS_V6
WEB = ServicePlan("shop", "web", ServiceKind.CLUSTER_IP, cluster_ips=("10.96.0.7",), ports=(PortPlan(80, "http"),))
Result = TypeVar("Result")


def until(claim: Callable[[], Any], limit_s: float = 6.0) -> Any:
    """Poll until ``claim`` returns something true; fail after ``limit_s``."""
    end_s = time.monotonic() + limit_s
    while True:
        if found := claim():
            return found
        assert time.monotonic() < end_s, "did not become true in time"
        time.sleep(0.05)


class Namespace:
    """A namespace of our own; ``call`` runs a function on a thread inside it, so that its sockets are opened there."""

    def __init__(self, name: str) -> None:
        self.name = name
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *words: str) -> str:
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *words], check=True, capture_output=True, text=True, timeout=30
        ).stdout

    def add_server_addresses(self) -> None:
        self.run("ip", "address", "add", f"{SERVER}/32", "dev", "lo")
        self.run("ip", "address", "add", f"{SERVER_V6}/128", "dev", "lo", "nodad")

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *words], **options)

    def call(self, function: Callable[[], Result]) -> Result:
        results: list[Result] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                self.enter()
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def enter(self) -> None:
        """Move the calling thread into the namespace."""
        handle = os.open(f"/var/run/netns/{self.name}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(handle)

    def socket(self, kind: socket.SocketKind = socket.SOCK_DGRAM, family: int = socket.AF_INET) -> socket.socket:
        return self.call(lambda: socket.socket(family, kind))

    def ask(
        self, name: str, rtype: str = "A", *, timeout_s: float = 5.0, at: str = SERVER, **options: Any
    ) -> dns.message.Message:
        query = dns.message.make_query(name, rtype, **options)
        return self.call(lambda: dns.query.udp(query, at, timeout=timeout_s))

    def ask_tcp(self, name: str, rtype: str = "A", *, timeout_s: float = 5.0) -> dns.message.Message:
        query = dns.message.make_query(name, rtype)
        return self.call(lambda: dns.query.tcp(query, SERVER, timeout=timeout_s))

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=True)


class Control:
    """The agent's side of a worker."""

    def __init__(self, space: Namespace, config: DnsConfig, *prefix: str) -> None:
        self._end, theirs = socket.socketpair()
        self.process = space.start(*prefix, *command(theirs.fileno(), config), pass_fds=[theirs.fileno()])
        theirs.close()
        self._reader = frames.FrameReader()
        self._asked = 0
        self.troubles: dict[str, str] = {}
        self.ready: worker.Ready | None = None
        self._answers: dict[int, Any] = {}

    def send(self, *messages: worker.ToWorker) -> None:
        self._end.sendall(b"".join(frames.encode(worker.encoder.encode(message)) for message in messages))

    def put(self, *plans: ServicePlan) -> None:
        self.send(*(worker.PutService(plan) for plan in plans))

    def pump(self, wait_s: float = 0.05) -> None:
        """Take in what the worker has said."""
        self._end.settimeout(wait_s)
        try:
            data = self._end.recv(1 << 20)
        except TimeoutError:
            return
        for frame in self._reader.feed(data):
            match worker.from_worker_decoder.decode(frame):
                case worker.Trouble(code, text):
                    self.troubles[code] = text
                case worker.Ready() as ready:
                    self.ready = ready
                case worker.Answer(ident, data_raw):
                    self._answers[ident] = msgspec.msgpack.decode(data_raw)

    def trouble(self, code: str) -> str:
        self.pump()
        return self.troubles.get(code, "")

    def tell(self, what: str, **arguments: str) -> Any:
        self._asked += 1
        self.send(worker.Ask(self._asked, what, arguments))

        def answered() -> bool:
            self.pump()
            return self._asked in self._answers

        until(answered)
        return self._answers.pop(self._asked)

    def wait_ready(self) -> worker.Ready:
        def ready() -> worker.Ready | None:
            self.pump()
            return self.ready

        found = until(ready)
        assert isinstance(found, worker.Ready)
        return found

    def close(self) -> None:
        self._end.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextmanager
def namespace() -> Iterator[Namespace]:
    space = Namespace(f"dns-{os.getpid()}-{time.monotonic_ns() % 1_000_000}")
    try:
        yield space
    finally:
        space.remove()


@contextmanager
def serving(space: Namespace, *plans: ServicePlan, **settings: Any) -> Iterator[Control]:
    """A worker that serves ``plans``; ``settings``: those of DnsSettings, ``resolv_conf``, a command's ``prefix``."""
    resolv_conf, prefix = settings.pop("resolv_conf", "/nonexistent"), settings.pop("prefix", ())
    config = DnsConfig(dns=DnsSettings(**settings), local_networks=("10.96.0.0/12",), resolv_conf=resolv_conf)
    control = Control(space, config, *prefix)
    try:
        control.put(*plans)
        control.send(worker.Synced())
        control.wait_ready()
        yield control
    finally:
        control.close()


@contextmanager
def dnsmasq(space: Namespace, address: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real upstream, with nothing of the host's configuration."""
    words = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]
    words += ["--pid-file=", "--bind-interfaces", "--address=/up.test/127.0.0.1", f"--listen-address={address}"]
    process = space.start(*words, *options, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        try:
            return bool(space.ask("up.test", at=address, timeout_s=0.2))
        except (dns.exception.Timeout, OSError):
            return False

    try:
        until(answers)
        yield process
    finally:
        process.terminate()
        process.wait()


Script = Callable[[dns.message.Message, bool], dns.message.Message | bytes | None]


@contextmanager
def scripted(space: Namespace, address: str, script: Script) -> Iterator[list[str]]:
    """An upstream that does as ``script(query, over_tcp)`` says; yields the questions it was asked, in order."""
    asked: list[str] = []
    datagrams, listener = space.socket(), space.socket(socket.SOCK_STREAM)
    datagrams.bind((address, 53))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, 53))
    listener.listen()

    def reply_to(data: bytes, tcp: bool) -> bytes | None:
        query = dns.message.from_wire(data)
        if query.question[0].name.to_text().count(".") > 2 or tcp:  # probes have two labels at the root
            asked.append(query.question[0].name.to_text())
        reply = script(query, tcp)
        return reply.to_wire(max_size=65_535) if isinstance(reply, dns.message.Message) else reply

    def serve_udp() -> None:
        while True:
            try:
                data, peer = datagrams.recvfrom(4096)
                if not data:  # shut down
                    return
                if (reply := reply_to(data, False)) is not None:
                    datagrams.sendto(reply, peer)
            except OSError:
                return

    def serve_tcp() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                data = client.recv(4096)
                if (reply := reply_to(data[2:], True)) is not None:
                    client.sendall(len(reply).to_bytes(2, "big") + reply)

    threads = [threading.Thread(target=serve, daemon=True) for serve in (serve_udp, serve_tcp)]
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        for one in (datagrams, listener):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            one.close()
        for thread in threads:
            thread.join(2)
