"""The data worker: ``python -m isthmus.agent.data_worker --fd N --config JSON``, started by the control process.

One readiness loop with the proxy and the links on it. It is fed over the channel (wire/worker.py), listens once it
knows all services (Synced), and ends with SIGTERM after a drain, or with its parent.
"""

import argparse
import gc
import os
import signal
import socket
from typing import Any

import msgspec
import structlog

from isthmus import logs
from isthmus.kernel.original_destination import Method, original_destination, reader
from isthmus.link.link import Link
from isthmus.loop.channel import Channel
from isthmus.loop.loop import Loop
from isthmus.loop.process import end_with_parent, raise_descriptor_limit
from isthmus.model.ports import DatagramEndpoint, EndpointConnector, Outcome, StreamRequest
from isthmus.plan.interception import Handover
from isthmus.proxy.proxy import Proxy
from isthmus.proxy.tcp import ReadDestination
from isthmus.wire import worker
from isthmus.wire.worker import DataConfig

log = structlog.get_logger(__name__)

LISTEN_AGAIN_S = 0.2


class _Endpoints:
    """The proxy's connector for the link, which is made before the proxy."""

    def __init__(self) -> None:
        self.behind: EndpointConnector | None = None

    def connect(self, peer: str, request: StreamRequest, done: Any) -> None:
        """As in EndpointConnector."""
        assert self.behind is not None
        self.behind.connect(peer, request, done)

    def open_datagrams(
        self, peer: str, request: StreamRequest, received: Any
    ) -> "tuple[Outcome, DatagramEndpoint | None, str]":
        """As in EndpointConnector."""
        assert self.behind is not None
        return self.behind.open_datagrams(peer, request, received)


class DataWorker:
    """Proxy and links on one loop."""

    def __init__(self, end: socket.socket, config: DataConfig) -> None:
        settings = config.settings
        self._config = config
        self._loop = Loop()
        self._channel: Channel[worker.ToWorker, worker.FromWorker] = Channel(
            self._loop, end, worker.ToWorkerReader().feed, worker.pack, self._message, self._loop.stop
        )
        endpoints = _Endpoints()
        self._link = Link(self._loop, self._channel.send, endpoints, port=settings.link_port)
        carrier = self._link.carrier
        self._proxy = Proxy(self._loop, settings.proxy, settings.node, carrier, carrier)
        endpoints.behind = self._proxy.connector
        self._listening: dict[str, str] = {}
        self._synced = False
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM, or until the control process is gone."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._loop.call_threadsafe(self._drain))
        try:
            self._loop.run()
        finally:
            self._link.stop()

    def _drain(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._link.drain()
            self._proxy.drain(self._loop.stop)

    def _message(self, message: worker.ToWorker) -> None:
        match message:
            case worker.PutService(plan):
                self._proxy.put_service(plan)
            case worker.DropService(namespace, name):
                self._proxy.drop_service(namespace, name)
            case worker.Synced():
                self._listen_all()
            case worker.Ask(number, what, arguments):
                answer = msgspec.Raw(worker.encoder.encode(self._tell(what, arguments)))
                self._channel.send(worker.Answer(number, answer))
            case _:
                self._link.handle(message)

    def _listen_all(self) -> None:
        """Listen on the link port and the interception addresses; an address that is missing is tried again."""
        if self._synced:
            return
        self._synced = True
        gc.collect()
        gc.freeze()  # the services stay: walking them again and again would hold up connections
        self._listen()

    def _listen(self) -> None:
        if self._stopping:
            return
        try:
            if "link" not in self._listening:
                self._listening["link"] = str(self._link.start())
            self._listening |= self._proxy.listen(self._config.settings.intercept, self._reader())
        except OSError as error:
            self._channel.send(worker.Trouble("data.listen", f"cannot listen: {error}"))
            self._loop.call_later(LISTEN_AGAIN_S, self._listen)
            return
        self._channel.send(worker.Trouble("data.listen", ""))
        self._channel.send(worker.Ready("data", self._listening))

    def _reader(self) -> ReadDestination:
        if self._config.handover is Handover.TPROXY or self._config.by_record:
            intercept = self._config.settings.intercept
            return reader(
                Method.TPROXY, {(text, intercept.port) for text in (intercept.address_v4, intercept.address_v6)}
            )
        return original_destination

    def _tell(self, what: str, arguments: dict[str, str]) -> Any:
        match what:
            case "counters":
                return self._proxy.counters() | self._link.counters()
            case "connections":
                return self._proxy.connections()
            case "endpoints":
                return self._proxy.endpoints()
            case "links":
                return self._link.links()
            case "paths":
                return self._link.paths()
        return {"error": f"unknown question {what!r}"}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="isthmus.agent.data_worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--config", required=True, help="DataConfig as JSON")
    given = parser.parse_args(arguments)
    config = msgspec.json.decode(given.config, type=DataConfig)
    logs.configure(node=config.settings.node, worker="data")
    end_with_parent()
    raise_descriptor_limit()
    os.set_inheritable(given.fd, False)
    DataWorker(socket.socket(fileno=given.fd), config).run()


if __name__ == "__main__":
    main()
