"""The relay as a service: real sockets, real TLS, real clients."""

import asyncio
import contextlib
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from relay_world import RunningNode, RunningRelay, World, eventually, world

from isthmus.relay.status import read_report
from isthmus.wire.identity import Holder, Role
from isthmus.wire.ticket import MAGIC, TicketRefused, preamble
from isthmus.wire.worker import NeedConnection


async def two_nodes(here: World, **relay_settings: object) -> tuple[RunningRelay, RunningNode, RunningNode]:
    relay = await here.relay(**relay_settings)
    a, b = here.node("a", relay), here.node("b", relay)
    await eventually(lambda: a.sees("b") and b.sees("a"))
    return relay, a, b


def test_two_nodes_learn_of_each_other_and_are_joined_within_two_seconds(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            begin = time.monotonic()
            relay, a, b = await two_nodes(here)
            mine, theirs = await a.pair_with(b, relay)
            assert time.monotonic() - begin < 2.0
            loop = asyncio.get_running_loop()
            payload = os.urandom(1_000_000)
            sending = asyncio.create_task(loop.sock_sendall(mine, payload))
            got = b""
            while len(got) < len(payload):
                got += await loop.sock_recv(theirs, 65_536)
            await sending
            assert got == payload
            mine.shutdown(socket.SHUT_WR)
            assert await loop.sock_recv(theirs, 1) == b""
            await loop.sock_sendall(theirs, b"after the half-close")
            assert await loop.sock_recv(mine, 100) == b"after the half-close"
            theirs.close()
            mine.close()
            await eventually(lambda: relay.service.report().joined == 0)
            assert relay.counters["bytes"] == len(payload) + len(b"after the half-close")
            await relay.end()

    asyncio.run(run())


def test_a_ticket_is_used_once_and_nobody_elses_word_makes_one(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, b = await two_nodes(here)
            mine, theirs = await a.pair_with(b, relay)
            used = bytes.fromhex(a.told.dials[0].ticket)
            for ticket in (used, os.urandom(32)):
                with pytest.raises(TicketRefused, match="not known"):
                    await relay.dial(ticket)
            mine.close()
            theirs.close()
            await relay.end()

    asyncio.run(run())


def test_a_half_whose_peer_does_not_come_is_refused_in_time(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, _b = await two_nodes(here, pairing_timeout_s=0.3)
            a.client.need(NeedConnection(1, "b", "relayed", "relay"))
            await eventually(lambda: a.told.dials)
            with pytest.raises(TicketRefused, match="did not come"):
                await relay.dial(bytes.fromhex(a.told.dials[0].ticket))
            assert relay.service.report().pending == 0
            await relay.end()

    asyncio.run(run())


def test_a_reverse_wish_becomes_a_dial_at_the_peer(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            a = here.node("a", relay, addresses=("10.0.0.9:20006", "198.51.100.7:20006"))
            b = here.node("b", relay)
            await eventually(lambda: a.sees("b") and b.sees("a"))
            a.client.need(NeedConnection(7, "b", "reverse", "relay"))
            await eventually(lambda: len(b.told.dials) == 2)
            assert [dial.address for dial in b.told.dials] == ["198.51.100.7:20006", "10.0.0.9:20006"]
            assert {(dial.node, dial.kind, dial.ticket, dial.request) for dial in b.told.dials} == {
                ("a", "reverse", "", 0)
            }
            await relay.end()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("node", "reason"),
    [("nobody", "no channel"), ("a", "to itself")],
)
def test_a_connection_that_cannot_be_is_refused_with_a_reason(tmp_path: Path, node: str, reason: str) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, _ = await two_nodes(here)
            a.client.need(NeedConnection(5, node, "relayed", "relay"))
            await eventually(lambda: a.told.failed)
            assert reason in a.told.failed[0].reason
            assert a.told.failed[0].request == 5
            await relay.end()

    asyncio.run(run())


def test_a_node_has_a_bounded_number_of_streams(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, b = await two_nodes(here, streams_per_node=2)
            kept = [await a.pair_with(b, relay), await b.pair_with(a, relay)]
            a.client.need(NeedConnection(9, "b", "relayed", "relay"))
            await eventually(lambda: a.told.failed)
            assert "the limit" in a.told.failed[0].reason
            for mine, theirs in kept:
                mine.close()
                theirs.close()
            await eventually(lambda: relay.service.report().joined == 0)
            mine, theirs = await a.pair_with(b, relay)
            mine.close()
            theirs.close()
            await relay.end()

    asyncio.run(run())


def test_a_revoked_node_is_out_at_once_and_everybody_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, b = await two_nodes(here)
            mine, theirs = await a.pair_with(b, relay)
            begin = time.monotonic()
            here.authority.revoke(Holder(Role.NODE, "b"), now_s=time.time())
            await eventually(lambda: a.told.gone == [("b", "revoked")])
            assert await asyncio.wait_for(_ended(mine), 3.0)
            assert time.monotonic() - begin < 3.0
            assert a.told.lists[-1] and a.told.lists[-1] == b.told.lists[-1]  # it is told itself, too
            await eventually(lambda: not b.connected)
            await asyncio.sleep(0.3)  # long enough for its next attempts
            assert [row.node for row in relay.service.report().nodes] == ["a"]
            theirs.close()
            # Enrolled again, it is welcome.
            b.client.use(here.credentials("b"))
            await eventually(lambda: a.sees("b"))
            await relay.end()

    asyncio.run(run())


async def _ended(sock: socket.socket) -> bool:
    try:
        return await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    except ConnectionError:
        return True
    finally:
        sock.close()


def test_clients_come_back_when_the_relay_does(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, b = await two_nodes(here)
            await relay.end()
            await eventually(lambda: not a.connected and not b.connected)
            a.client.need(NeedConnection(3, "b", "relayed", "relay"))
            assert "no control channel" in a.told.failed[-1].reason
            begin = time.monotonic()
            await relay.start()
            await eventually(lambda: a.sees("b") and b.sees("a"))
            mine, theirs = await a.pair_with(b, relay)
            assert time.monotonic() - begin < 2.0
            mine.close()
            theirs.close()
            await relay.end()

    asyncio.run(run())


def test_with_one_of_two_relays_gone_the_other_joins(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            first, second = await here.relay("first"), await here.relay("second")
            a, b = here.node("a", first, second), here.node("b", first, second)
            await eventually(lambda: a.sees("b") and b.sees("a") and a.connected and b.connected)
            await first.end()
            await eventually(lambda: [relay.connected for relay in a.client.relays()] == [False, True])
            assert a.told.gone == []  # its announcement is still good, and the other relay holds it
            mine, theirs = await a.pair_with(b, second)
            mine.close()
            theirs.close()
            await second.end()

    asyncio.run(run())


def test_renewed_credentials_do_not_end_a_channel(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, b = await two_nodes(here)
            before = relay.service.report().nodes
            a.client.use(here.credentials("a"))
            await eventually(lambda: len([one for one in b.told.announced if one.node == "a"]) > 1)
            after = relay.service.report().nodes
            assert {row.since for row in after} == {row.since for row in before}
            assert {row.serial for row in after} != {row.serial for row in before}
            await relay.end()

    asyncio.run(run())


def test_a_relay_without_the_authority_gets_revocations_from_nodes(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            first = await here.relay("first")
            # Enrolled like a node; its issuer is away now, so that only nodes can bring the list.
            settings = here.settings("second", issuer=False, issuer_address="127.0.0.1:9")
            store_in_its_place(here, settings.state_directory)
            second = RunningRelay(settings, None)
            await second.start()
            a, b = here.node("a", first, second), here.node("b", second)
            await eventually(lambda: a.sees("b") and b.sees("a") and a.connected)
            here.authority.revoke(Holder(Role.NODE, "b"), now_s=time.time())
            await eventually(lambda: not b.connected)
            assert second.counters["revoked-channels"] == 1
            await first.end()
            await second.end()

    asyncio.run(run())


def store_in_its_place(here: World, state_directory: str) -> None:
    """An identity for relay ``second``."""
    from isthmus.relay.keystore import KeyStore

    Path(state_directory).mkdir(parents=True)
    store = KeyStore(Path(state_directory) / "identity")
    store.prepare()
    key = store.pending_key()
    holder = Holder(Role.RELAY, "second")
    made = here.authority.issue_local(key, (holder,), now_s=time.time(), life_s=3600)
    store.install(made, here.authority.certificate)


def test_another_relay_or_a_node_cannot_pose_as_the_relay(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay("other-name")
            impostor = RunningRelay(relay.settings, here.authority)
            impostor.settings = here.settings("relay", listen=relay.settings.listen)
            a = here.node("a", impostor)
            await eventually(lambda: "expected" in a.client.relays()[0].error)
            assert not a.connected
            await relay.end()

    asyncio.run(run())


def test_garbage_from_strangers_is_counted_and_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, a, b = await two_nodes(here)
            # Short for the strangers only: on a loaded machine the nodes may need the usual time.
            monkeypatch.setattr("isthmus.relay.door.FIRST_BYTES_DEADLINE_S", 0.5)
            monkeypatch.setattr("isthmus.relay.door.HANDSHAKE_DEADLINE_S", 0.5)
            rng = random.Random(7)
            await asyncio.gather(*(send_garbage(relay, rng.randbytes(rng.randrange(1, 400)), rng) for _ in range(200)))
            await eventually(lambda: relay.service.report().strangers == 0, 30.0)
            monkeypatch.undo()
            mine, theirs = await a.pair_with(b, relay)
            mine.close()
            theirs.close()
            assert a.connected and b.connected
            assert relay.counters["garbage"] > 50
            await relay.end()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def silent_strangers(relay: RunningRelay, count: int) -> AsyncIterator[None]:
    """Open ``count`` connections that say nothing."""
    opened = [await asyncio.open_connection(relay.host, relay.port) for _ in range(count)]
    try:
        yield
    finally:
        for _, writer in opened:
            writer.close()


async def send_garbage(relay: RunningRelay, data: bytes, rng: random.Random) -> None:
    """One of the things that strangers do to an open port."""
    start = rng.choice(
        [b"", b"\x16\x03\x01\x02", MAGIC[: rng.randrange(1, 8)], preamble(bytes(32)), b"GET / HTTP/1.1\r\n"]
    )
    reader, writer = await asyncio.open_connection(relay.host, relay.port)
    try:
        writer.write(start + data)
        await writer.drain()
        if rng.random() < 0.5:
            writer.write_eof()
        await asyncio.wait_for(reader.read(1_000), 7.0)
    except OSError:
        pass
    finally:
        writer.close()


def test_silent_strangers_of_one_address_are_bounded_and_thrown_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            monkeypatch.setattr("isthmus.relay.door.FIRST_BYTES_DEADLINE_S", 60.0)
            async with silent_strangers(relay, 300):
                await eventually(lambda: relay.counters.get("refused-strangers-address", 0) == 44)
                assert relay.service.report().strangers == 256
            await eventually(lambda: relay.service.report().strangers == 0)
            monkeypatch.setattr("isthmus.relay.door.FIRST_BYTES_DEADLINE_S", 0.3)
            async with silent_strangers(relay, 100):
                await eventually(lambda: relay.counters.get("stranger-late", 0) == 100)
                assert relay.service.report().strangers == 0
            await relay.end()

    asyncio.run(run())


def test_the_status_socket_says_who_is_here(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay, _a, _b = await two_nodes(here)
            report = await read_report(Path(relay.settings.run_directory))
            assert {row.node for row in report.nodes} == {"a", "b"}
            assert (report.state, report.issuer, report.announced) == ("valid", True, 2)
            assert (Path(relay.settings.run_directory) / "relay.sock").stat().st_mode & 0o777 == 0o600
            await relay.end()
            assert not (Path(relay.settings.run_directory) / "relay.sock").exists()

    asyncio.run(run())
