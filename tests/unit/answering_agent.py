"""A local API that gives fixed answers: the agent's own server (agent/api.py) over values made here."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isthmus.agent.api import LocalApi
from isthmus.wire.local import (
    EndpointRow,
    IdentityStatus,
    InterceptionStatus,
    LinkRow,
    PeerStatus,
    RelayStatus,
    RuleRow,
    ServiceRow,
    Status,
    StoreStatus,
    TroubleRow,
    WorkerStatus,
)

NOW_S = 1_790_000_000.0


@contextlib.contextmanager
def answering(directory: Path, answers: Mapping[str, Any]) -> Iterator[Path]:
    """Serve ``answers`` (a value, or an error to raise) on a socket in ``directory``; yields the directory."""
    started = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def answerer(value: Any) -> Any:
        async def answer(arguments: dict[str, str]) -> Any:
            if isinstance(value, Exception):
                raise value
            return value(arguments) if callable(value) else value

        return answer

    api = LocalApi(directory / "agent.sock", {what: answerer(value) for what, value in answers.items()})

    async def serve() -> None:
        stop = asyncio.Event()
        running.append((asyncio.get_running_loop(), stop))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(api.run(stop), name="api")
            while not (directory / "agent.sock").exists():
                await asyncio.sleep(0.001)
            started.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(6)
        yield directory
    finally:
        for loop, stop in running:
            loop.call_soon_threadsafe(stop.set)
        thread.join(6)


def a_status(**changes: Any) -> Status:
    """A healthy node's status, with ``changes``."""
    values: dict[str, Any] = {
        "node": "edge-1",
        "site": "home",
        "version": "0.1.0",
        "pid": 4711,
        "started_at": NOW_S - 11_520,
        "boot_id": "8c0e4b2c-8a5e-4a52-a5f5-3f0c86c5a7c1",
        "healthy": True,
        "store": StoreStatus(
            "/etc/isthmus/store", {"Service": 12, "EndpointSlice": 30, "Node": 3}, [], [], False, NOW_S - 190
        ),
        "interception": InterceptionStatus(
            backend="nftables",
            original_destination="so-original-dst",
            reason="the call answered within 0.2 ms in a child process",
            device="isthmus0",
            address_v4="169.254.96.16",
            address_v6="fd00:a9fe:6010::16",
            port=40001,
            ranges=["10.96.0.0/12", "240.96.0.0/16"],
            ignored=3,
            applied=True,
            repairs=0,
            sysctls=[],
        ),
        "identity": IdentityStatus("valid", "5f3a", NOW_S + 82_800, NOW_S + 54_000, "isthmus-ca"),
        "workers": [
            WorkerStatus("data", 4712, "ready", 0, {"tcp": "169.254.96.16:40001"}),
            WorkerStatus("dns", 4713, "ready", 0, {"listening": "169.254.96.16:53"}),
        ],
        "relays": [RelayStatus("cloud", "192.0.2.10:20004", True, 12.4, "198.51.100.7:33445")],
        "peers": [
            PeerStatus("cloud-1", "cloud", "store", ["direct 192.0.2.11:20006", "relayed via cloud"], 3),
            PeerStatus("edge-2", "office", "relay cloud", ["relayed via cloud"], 0),
        ],
        "counters": {"proxy": {"accepted": 10}},
        "troubles": [],
    }
    return Status(**(values | changes))


AN_ERROR = TroubleRow("store.missing", "error", "the store /etc/isthmus/store does not exist")
A_WARNING = TroubleRow("relay.unreachable", "warning", "relay cloud at 192.0.2.10:20004: connection refused")

SERVICES = [
    ServiceRow(
        *("shop", "web", "cluster-ip", ["10.96.0.20"], ["http 80/TCP"]),
        *(2, 1, "round-robin", "proxied", "web.yaml:1"),
    ),
    ServiceRow(
        *("kube-system", "kube-dns", "cluster-ip", ["10.96.0.10"], ["53/UDP", "53/TCP"]),
        *(1, 1, "random", "ignored: noproxy=edgemesh", "dns.yaml:4"),
    ),
]
ENDPOINTS = [
    EndpointRow("shop", "web", "edge-2", "172.17.0.2", "", ["http 8080"], "anywhere", True, True, 4, "shop/web-b"),
    EndpointRow("shop", "web", "cloud-1", "10.1.0.5", "", ["http 8080"], "anywhere", True, False, 0, "shop/web-a"),
]
LINKS = [
    LinkRow("cloud-1", "direct", "192.0.2.11:20006", "", "busy", 1, 5_242_880, 1_024, 75.0, "TLSv1.3"),
    LinkRow("edge-2", "relayed", "192.0.2.10:20004", "cloud", "idle", 0, 10, 20, 5.0, "TLSv1.3"),
]
RULES = [
    RuleRow("prerouting-jump", "prerouting", "all", "jump isthmus", "isthmus", True),
    RuleRow("service-range", "isthmus", "tcp 10.96.0.0/12", "dnat 169.254.96.16:40001", "isthmus", False),
]
LISTS = {"services": SERVICES, "endpoints": ENDPOINTS, "links": LINKS, "rules": RULES}
