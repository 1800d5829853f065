"""What a scraper reads: every counter there is, by a documented name, and nothing that a stranger sends harms it."""

import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import msgspec

from isthmus.agent.metrics import Metrics, render
from isthmus.link.link import Link
from isthmus.loop.loop import Loop
from isthmus.model.ports import DatagramEndpoint, Outcome, StreamRequest
from isthmus.model.settings import ProxySettings
from isthmus.proxy.proxy import Proxy
from isthmus.store.change import Counters

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


class NoEndpoints:
    def connect(self, peer: str, request: StreamRequest, done: Any) -> None:
        done(Outcome.NOT_ALLOWED, None, "")

    def open_datagrams(
        self, peer: str, request: StreamRequest, received: Any
    ) -> "tuple[Outcome, DatagramEndpoint | None, str]":
        return Outcome.NOT_ALLOWED, None, ""


def test_every_counter_of_store_and_proxy_is_documented() -> None:
    loop = Loop()
    link = Link(loop, lambda _message: None, NoEndpoints())
    proxy = Proxy(loop, ProxySettings(), "n1", link.carrier, link.carrier)
    counters = {"store": msgspec.to_builtins(Counters()), "data": proxy.counters() | link.counters()}
    names = set(re.findall(r"^(isthmus_\w+)", render(counters).decode(), re.MULTILINE))
    undocumented = {name for name in names if name not in PAGE and not name.startswith("isthmus_data_link_")}
    assert names
    assert not undocumented


def test_reasons_and_services_become_labels() -> None:
    text = render(
        {"data": {"refused": {"no-endpoint": 2}, "by_service": {"shop/web": {"active": 3, "ends": {}}}}}
    ).decode()
    assert 'isthmus_data_refused{reason="no-endpoint"} 2.0' in text
    assert 'isthmus_data_by_service_active{service="shop/web"} 3.0' in text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


def test_it_serves_metrics_and_nothing_else() -> None:
    async def main() -> None:
        port, stop = free_port(), asyncio.Event()

        async def gather() -> dict[str, dict[str, Any]]:
            return {"dns": {"queries_udp": 7}}

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Metrics(f"127.0.0.1:{port}", gather).run(stop))
            for _ in range(100):
                try:
                    good = await ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                    break
                except ConnectionError:
                    await asyncio.sleep(0.01)
            assert b"200 OK" in good
            assert b"isthmus_dns_queries_udp 7.0" in good
            assert b"404" in (await ask(port, b"GET / HTTP/1.1\r\n\r\n")).splitlines()[0]
            assert await ask(port, b"\x00" * 20_000) == b""
            assert await ask(port, b"GET /metr") == b""
            assert b"200 OK" in await ask(port, b"GET /metrics HTTP/1.0\r\n\r\n")
            stop.set()

    asyncio.run(main())
