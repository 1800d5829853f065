"""What a scraper reads: every number of ``counters``, in the text format of Prometheus, over HTTP."""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric, UntypedMetricFamily
from prometheus_client.registry import Collector

log = structlog.get_logger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_BYTES = 8_192
REQUEST_S = 5.0

Gather = Callable[[], Awaitable[dict[str, dict[str, Any]]]]


class Metrics:
    """``http://HOST:PORT/metrics``. Names are documented in docs/metrics.md."""

    def __init__(self, listen: str, gather: Gather) -> None:
        host, _, port = listen.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._gather = gather

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``."""
        server = await asyncio.start_server(self._serve, self._host, self._port, limit=REQUEST_BYTES)
        async with server:
            await stop.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_S)
            if head.split(b" ", 2)[:2] == [b"GET", b"/metrics"]:
                body, status = render(await self._gather()), "200 OK"
            else:
                body, status = b"only GET /metrics is served\n", "404 Not Found"
            lines = f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
            writer.write(lines.encode() + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
        writer.close()


def render(counters: dict[str, dict[str, Any]]) -> bytes:
    """Every number in ``counters`` as ``isthmus_AREA_NAME``; ``by_service`` and ``refused`` become labels."""
    registry = CollectorRegistry()
    registry.register(_Collected(counters))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, counters: dict[str, dict[str, Any]]) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        families: dict[str, UntypedMetricFamily] = {}
        for area, values in sorted(self._counters.items()):
            for name, labels, value in _flat(values):
                full = re.sub(r"[^a-z0-9_]", "_", f"isthmus_{area}_{name}".lower())
                if full not in families:
                    families[full] = UntypedMetricFamily(full, f"{area}: {name}", labels=list(labels))
                families[full].add_metric(list(labels.values()), value)
        return families.values()


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, str], float]]:
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            yield name, {}, float(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, bool | int | float):
                    yield name, {"reason": str(key)}, float(inner)
                elif isinstance(inner, dict):
                    for leaf, number in inner.items():
                        if isinstance(number, int | float):
                            yield f"{name}_{leaf}", {"service": str(key)}, float(number)
