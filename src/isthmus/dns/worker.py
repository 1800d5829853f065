"""The DNS worker process: ``python -m isthmus.dns.worker --fd N --config JSON``, started by the agent (``command``).

``--fd`` is its end of a Unix stream socket pair; the other end speaks wire/worker.py: PutService, DropService,
Synced and Ask in, Ready, Trouble and Answer out. It binds its addresses at once, in the network namespace it was
started in, and answers from Synced on; what was asked before waits in the sockets. It ends with SIGTERM, and with its
parent.
"""

import argparse
import errno
import gc
import os
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import structlog

from isthmus import logs
from isthmus.dns.answers import Answers
from isthmus.dns.forward import Forwarder
from isthmus.dns.probe import Prober
from isthmus.dns.tcp import TcpServer
from isthmus.dns.udp import UdpServer, bind
from isthmus.dns.upstreams import UpstreamError, Upstreams, parse_resolv_conf, parse_server
from isthmus.loop.channel import Channel
from isthmus.loop.loop import Loop
from isthmus.loop.process import end_with_parent, raise_descriptor_limit
from isthmus.plan.names import Names, RecordType
from isthmus.wire import worker
from isthmus.wire.worker import DnsConfig

log = structlog.get_logger(__name__)

WAIT_FOR_STATE_S = 2.0  # then cluster names get SERVFAIL until Synced; other names are served
REBIND_S = 0.2
RESOLV_CONF_S = 2.0


def command(fd: int, config: DnsConfig) -> list[str]:
    """The command line that starts a worker on an inherited descriptor."""
    text = msgspec.json.encode(config).decode()
    return [sys.executable, "-m", "isthmus.dns.worker", "--fd", str(fd), "--config", text]


class DnsWorker:
    """The parts, put together on one loop."""

    def __init__(self, end: socket.socket, config: DnsConfig) -> None:
        self._config = config
        self._loop = Loop()
        self._counters: Counter[str] = Counter()
        names = Names(
            config.dns.domain,
            ttl_s=config.dns.ttl_s,
            own_addresses=config.listen,
            local_networks=config.local_networks,
        )
        self._answers = Answers(names, self._counters)
        self._answers.ready = False
        self._upstreams = Upstreams()
        self._channel: Channel[worker.ToWorker, worker.FromWorker] = Channel(
            self._loop, end, worker.ToWorkerReader().feed, worker.pack, self._message, self._loop.stop
        )
        self._prober = Prober(self._loop, self._upstreams, self._trouble)
        self._forwarder = Forwarder(self._loop, self._answers, self._upstreams, config.dns, self._prober.is_probe)
        self._servers: list[UdpServer | TcpServer] = []
        self._unbound = [(address, kind) for address in config.listen for kind in ("udp", "tcp")]
        self._bound: dict[str, str] = {}
        self._serving = False
        self._troubles: dict[str, str] = {}

    def run(self) -> None:
        """Serve until SIGTERM, or until the control process is gone."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._loop.stop())
        self._bind()
        self._read_upstreams()
        self._loop.call_later(WAIT_FOR_STATE_S, self._serve)
        self._prober.start()
        try:
            self._loop.run()
        finally:
            for server in self._servers:
                server.close()
            self._forwarder.close()
            self._channel.close()
            self._loop.close()

    def _bind(self) -> None:
        """Take the addresses; those that someone else holds are tried again, and reported."""
        left, reasons = [], []
        for address, kind in self._unbound:
            try:
                self._take(address, kind)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:
                    self._bound[f"{kind} {address}"] = "this kernel has no IPv6"
                    continue
                left.append((address, kind))
                reasons.append(f"{kind} {address} port {self._config.port}: {error.strerror}")
        self._unbound = left
        self._trouble("dns.bind", "; ".join(reasons))
        if left:
            self._loop.call_later(REBIND_S, self._bind)
        elif self._serving:
            self._channel.send(worker.Ready("dns", self._bound))

    def _take(self, address: str, kind: str) -> None:
        port = self._config.port
        server: UdpServer | TcpServer
        if kind == "udp":
            server = UdpServer(self._loop, bind(address, port, socket.SOCK_DGRAM), self._answers, self._forwarder.ask)
        else:
            server = TcpServer(self._loop, bind(address, port, socket.SOCK_STREAM), self._answers, self._forwarder.ask)
        self._servers.append(server)
        self._bound[f"{kind} {address}"] = str(port)
        if self._serving:
            server.start()

    def _serve(self) -> None:
        if self._serving:
            return
        self._serving = True
        for server in self._servers:
            server.start()
        if not self._unbound:
            self._channel.send(worker.Ready("dns", self._bound))

    def _message(self, message: worker.ToWorker) -> None:
        match message:
            case worker.PutService(plan):
                self._answers.forget(self._answers.names.put(plan))
                self._counters["changes"] += 1
            case worker.DropService(namespace, name):
                self._answers.forget(self._answers.names.drop(namespace, name))
                self._counters["changes"] += 1
            case worker.Synced():
                self._answers.ready = True
                gc.collect()
                gc.freeze()  # the cluster's objects stay: walking them again would stop answers for a moment
                self._serve()
            case worker.Ask(ident, what, arguments):
                self._channel.send(
                    worker.Answer(ident, msgspec.Raw(worker.encoder.encode(self._tell(what, arguments))))
                )
            case _:
                pass

    def _tell(self, what: str, arguments: dict[str, str]) -> Any:
        """The answer to a question of the local API; an unknown one is answered with ``error``."""
        if what == "counters":
            return dict(self._counters)
        if what == "cache":
            return {"entries": len(self._forwarder.cache), "table": len(self._answers.table)}
        if what == "services":
            return {"services": len(self._answers.names)}
        if what == "upstreams":
            return [
                {"server": str(one), "state": one.state, "asked": one.asked, "answered": one.answered}
                for one in self._upstreams.all
            ]
        if what == "flush":
            self._forwarder.cache.clear()
            self._answers.forget_all()
            return {}
        if what == "lookup" and arguments.get("type", "A") in RecordType.__members__:
            rtype = RecordType[arguments.get("type", "A")]
            return self._answers.names.lookup(arguments.get("name", ""), rtype)
        return {"error": f"unknown question {what!r}"}

    def _read_upstreams(self) -> None:
        """Those of the settings, else those of resolv.conf, which is looked at again and again. Never ourselves."""
        given = self._config.dns.upstreams
        if given:
            servers = self._parse(given)
        else:
            self._loop.call_later(RESOLV_CONF_S, self._read_upstreams)
            try:
                servers = parse_resolv_conf(Path(self._config.resolv_conf).read_text(errors="replace"))
            except OSError:
                servers = []
        ours = {(address, self._config.port) for address in self._config.listen}
        if self._upstreams.set(server for server in servers if server not in ours):
            self._prober.again()
        self._prober.review()

    def _parse(self, given: tuple[str, ...]) -> list[tuple[str, int]]:
        """The servers that the settings name; one that cannot be read is reported, and the others are used."""
        servers, errors = [], []
        for text in given:
            try:
                servers.append(parse_server(text))
            except UpstreamError as error:
                errors.append(str(error))
        self._trouble(UpstreamError.code, "; ".join(errors))
        return servers

    def _trouble(self, code: str, text: str) -> None:
        if self._troubles.get(code, "") == text:
            return
        self._troubles[code] = text
        log.info("dns trouble", code=code, text=text)
        self._channel.send(worker.Trouble(code, text))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="isthmus.dns.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--config", required=True, help="DnsConfig as JSON")
    given = parser.parse_args(arguments)
    logs.configure(worker="dns")
    end_with_parent()
    raise_descriptor_limit()
    os.set_inheritable(given.fd, False)
    config = msgspec.json.decode(given.config, type=DnsConfig)
    DnsWorker(socket.socket(fileno=given.fd), config).run()


if __name__ == "__main__":
    main()
