"""A proxy alone in a process: ``python -m bench.proxy_process NODE SETTINGS``; a JSON line in, a JSON line out.

For benchmarks and tests of the proxy by itself; an agent's data worker composes the same parts with links.
"""

import json
import os
import sys
from typing import Any

import msgspec

from isthmus.kernel.original_destination import original_destination
from isthmus.loop.loop import READ, Loop
from isthmus.model.ports import Outcome
from isthmus.model.settings import InterceptSettings, ProxySettings
from isthmus.plan.serving import ServicePlan
from isthmus.proxy.proxy import Proxy


class NoLinks:
    """A node without peers: every other node is unreachable."""

    def carry(self, node: str, request: Any, client: Any, opened: Any, ended: Any) -> Any:
        opened(Outcome.NO_PATH, "this process has no links")
        return lambda: None

    def open_session(self, node: str, request: Any, received: Any, closed: Any) -> int:
        closed(Outcome.NO_PATH, "this process has no links")
        return 1

    def send(self, session: int, payload: bytes) -> None:
        pass

    def close_session(self, session: int) -> None:
        pass


class Console:
    """Questions from standard input, on the proxy's loop."""

    def __init__(self, loop: Loop, proxy: Proxy) -> None:
        self._loop = loop
        self._proxy = proxy
        self._rest = b""
        os.set_blocking(0, False)
        loop.add(0, READ, self._read)

    def _read(self, _events: int) -> None:
        data = os.read(0, 1 << 20)
        if not data:
            self._loop.stop()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            what, argument = json.loads(line)
            sys.stdout.write(json.dumps(self._answer(what, argument)) + "\n")
            sys.stdout.flush()

    def _answer(self, what: str, argument: Any) -> Any:
        proxy = self._proxy
        if what == "put":
            proxy.put_service(msgspec.convert(argument, ServicePlan))
        elif what == "drop":
            proxy.drop_service(*argument)
        elif what == "counters":
            return proxy.counters()
        elif what == "connections":
            return proxy.connections()
        elif what == "drain":
            proxy.drain(self._loop.stop)
        return None


def main() -> None:
    """Serve until standard input ends."""
    loop = Loop()
    settings = msgspec.convert(json.loads(sys.argv[2]), ProxySettings)
    links = NoLinks()
    proxy = Proxy(loop, settings, sys.argv[1], links, links)
    proxy.listen(InterceptSettings(), original_destination)
    Console(loop, proxy)
    loop.run()


if __name__ == "__main__":
    main()
