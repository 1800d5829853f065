"""Enrolment, renewal and revocation end to end: a real issuer, the real asking side, files on disk."""

import asyncio
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from relay_world import RunningRelay, World, eventually, world

from isthmus.agent.identity import NodeIdentity
from isthmus.files import StateNotWritten, write_private
from isthmus.model.settings import AgentSettings
from isthmus.relay import authority, enrol
from isthmus.relay.authority import Authority, AuthorityError, NotIssued
from isthmus.relay.credentials import Credentials, State
from isthmus.relay.keystore import KeyStore
from isthmus.wire import enrolment, identity, token
from isthmus.wire.enrolment import Enrol, RefusalCode
from isthmus.wire.identity import Holder, Role
from isthmus.wire.tls import TlsFiles

NODE = Holder(Role.NODE, "edge-1")


def make_token(here: World, relay: RunningRelay, *, ttl_s: float = 60.0, holder: Holder = NODE) -> str:
    made = here.authority.create_token(
        holder, ttl_s=ttl_s, address=relay.settings.listen, now_s=time.time(), secret=os.urandom(32)
    )
    return token.encode(made)


class Member:
    """A node's identity that is kept, and what it told."""

    def __init__(self, directory: Path, text: str, *, issuers: tuple[str, ...] = (), name: str = "edge-1") -> None:
        self.text = text
        self.serials: list[str] = []
        self.kept = Credentials(
            KeyStore(directory),
            Holder(Role.NODE, name),
            issuers=issuers,
            token=lambda: self.text,
            changed=lambda stored: self.serials.append(stored.serial),
        )
        self.stop = asyncio.Event()

    async def __aenter__(self) -> "Member":
        self.kept.load()
        self.task = asyncio.create_task(self.kept.run(self.stop))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop.set()
        await self.task

    async def reaches(self, state: State, deadline_s: float = 6.0) -> str:
        """Wait for a state; returns the error that goes with it."""
        await eventually(lambda: self.kept.snapshot().state is state, deadline_s)
        return self.kept.snapshot().error


def test_a_token_enrols_once_and_only_its_own_node(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            text = make_token(here, relay)
            async with Member(tmp_path / "n1", text) as first:
                await first.reaches(State.VALID)
            async with Member(tmp_path / "n2", text) as thief:
                await eventually(lambda: "used already" in thief.kept.snapshot().error)
                assert thief.kept.snapshot().state is State.NONE
            async with Member(tmp_path / "n3", text, name="edge-2") as other:
                await eventually(lambda: "token is for node edge-1" in other.kept.snapshot().error)
            assert relay.counters["enrolled"] == 1
            assert relay.counters["enrolment-refused-used-token"] == 1
            await relay.end()

    asyncio.run(run())


def test_the_issuer_itself_compares_the_name_with_the_token(tmp_path: Path) -> None:
    made = authority.init(tmp_path / "ca", "test", now_s=1000.0)
    good = made.create_token(NODE, ttl_s=10, address="", now_s=1000.0, secret=b"s" * 32)
    request = identity.new_request(identity.new_key())

    def refusal(ask: Enrol, now_s: float = 1001.0) -> RefusalCode:
        with pytest.raises(NotIssued) as caught:
            made.enrol(ask, now_s=now_s, life_s=60)
        return caught.value.reason_code

    assert refusal(Enrol(Role.NODE, "edge-2", good.secret, request)) is RefusalCode.WRONG_NODE
    assert refusal(Enrol(Role.RELAY, "edge-1", good.secret, request)) is RefusalCode.WRONG_NODE
    assert refusal(Enrol(Role.NODE, "edge-1", b"x" * 32, request)) is RefusalCode.UNKNOWN_TOKEN
    assert refusal(Enrol(Role.NODE, "edge-1", good.secret, request), now_s=1011.0) is RefusalCode.EXPIRED_TOKEN


def test_a_lost_answer_may_be_asked_for_again_with_the_same_key_only(tmp_path: Path) -> None:
    made = authority.init(tmp_path / "ca", "test", now_s=1000.0)
    good = made.create_token(NODE, ttl_s=10, address="", now_s=1000.0, secret=b"s" * 32)
    key = identity.new_key()
    ask = Enrol(Role.NODE, "edge-1", good.secret, identity.new_request(key))
    first = made.enrol(ask, now_s=1001.0, life_s=60)
    second = made.enrol(ask, now_s=1002.0, life_s=60)
    assert first.serial_number != second.serial_number
    stranger = Enrol(Role.NODE, "edge-1", good.secret, identity.new_request(identity.new_key()))
    with pytest.raises(NotIssued, match="used already"):
        made.enrol(stranger, now_s=1003.0, life_s=60)


def test_a_kill_between_the_answer_and_the_files_converges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            text = make_token(here, relay)
            # The process dies after the issuer has answered: nothing of the answer reaches the disk.
            with monkeypatch.context() as patch:
                patch.setattr(KeyStore, "install", _die)
                with pytest.raises(KeyboardInterrupt):
                    async with Member(tmp_path / "n1", text) as dying:
                        await dying.task
            assert relay.counters["enrolled"] == 1
            async with Member(tmp_path / "n1", text) as again:
                await again.reaches(State.VALID)
            assert relay.counters["enrolled"] == 2
            await relay.end()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run())


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_kill_between_two_files_leaves_the_old_or_the_new_identity(tmp_path: Path) -> None:
    made = authority.init(tmp_path / "ca", "test", now_s=time.time())
    store = KeyStore(tmp_path / "n1")
    store.prepare()
    key = store.pending_key()
    assert store.pending_key().private_numbers() == key.private_numbers()
    first = made.issue_local(key, (NODE,), now_s=time.time(), life_s=60)
    store.install(first, made.certificate)
    # Killed after certificate.pem was written into pending/, before the rename.
    next_key = store.pending_key()
    second = made.issue_local(next_key, (NODE,), now_s=time.time(), life_s=60)
    write_private(tmp_path / "n1" / "pending" / "certificate.pem", identity.certificate_pem(second))
    found = KeyStore(tmp_path / "n1").current()
    assert found is not None and found.certificate == first
    again = KeyStore(tmp_path / "n1")
    again.prepare()
    found = again.current()
    assert found is not None and found.certificate == second


def test_a_damaged_newest_generation_falls_back_to_the_one_before(tmp_path: Path) -> None:
    made = authority.init(tmp_path / "ca", "test", now_s=time.time())
    store = KeyStore(tmp_path / "n1")
    store.prepare()
    certificates = []
    for _ in range(5):
        certificates.append(made.issue_local(store.pending_key(), (NODE,), now_s=time.time(), life_s=60))
        store.install(certificates[-1], made.certificate)
    generations = sorted(path.name for path in (tmp_path / "n1").glob("0*"))
    assert generations == ["000003", "000004", "000005"]
    (tmp_path / "n1" / "000005" / "certificate.pem").write_bytes(b"")
    found = store.current()
    assert found is not None and found.certificate == certificates[3]


def test_every_file_is_private_and_the_authority_is_never_overwritten(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            async with Member(tmp_path / "n1", make_token(here, relay)) as member:
                await member.reaches(State.VALID)
            await relay.end()

    asyncio.run(run())
    public = {tmp_path / "ca" / "ca.crt"}
    for root in (tmp_path / "ca", tmp_path / "n1", tmp_path / "relay" / "state"):
        for path in (root, *root.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o644 if path in public else 0o700 if path.is_dir() else 0o600), path
    before = (tmp_path / "ca" / "ca.key").read_bytes()
    with pytest.raises(AuthorityError, match="already"):
        authority.init(tmp_path / "ca", "test", now_s=time.time())
    assert (tmp_path / "ca" / "ca.key").read_bytes() == before


def test_a_certificate_renews_in_time_and_no_channel_is_lost(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay(certificate_hours=2.0 / 3600)
            a = here.node("a", relay)
            text = make_token(here, relay, holder=Holder(Role.NODE, "b"))
            b = here.node("b", relay)
            member = Member(tmp_path / "b", text, issuers=(relay.settings.listen,), name="b")
            member.kept._changed = lambda stored: (member.serials.append(stored.serial), b.client.use(stored.files))
            async with member:
                await eventually(lambda: len(member.serials) >= 2, 10.0)
                assert member.kept.snapshot().state is State.VALID
                assert len(set(member.serials)) == len(member.serials)
                mine, theirs = await a.pair_with(b, relay)
                mine.close()
                theirs.close()
            assert relay.counters["channels"] == 2  # one each, from the beginning
            await relay.end()

    asyncio.run(run())


def test_a_revoked_node_is_not_renewed_and_comes_back_with_a_new_token(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay(certificate_hours=2.0 / 3600)
            text = make_token(here, relay)
            async with Member(tmp_path / "n1", text, issuers=(relay.settings.listen,)) as member:
                await member.reaches(State.VALID)
                here.authority.revoke(NODE, now_s=time.time())
                assert "revoked" in await member.reaches(State.REVOKED)
                await eventually(lambda: "not known" in member.kept.snapshot().error)  # the old token ended too
                member.text = make_token(here, relay)
                await member.reaches(State.VALID)
            assert [record.revoked_s for record in here.authority.holders() if record.holder == NODE] == [0.0]
            await relay.end()

    asyncio.run(run())


def test_a_full_disk_is_said_and_keeps_the_old_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private(tmp_path / "file", b"old")
    real_write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if "file" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StateNotWritten, match="No space left on device"):
        write_private(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_an_issuer_that_cannot_write_refuses_and_the_node_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            with monkeypatch.context() as patch:
                patch.setattr(Authority, "_issue", _no_space)
                async with Member(tmp_path / "n1", make_token(here, relay)) as member:
                    await eventually(lambda: "cannot write" in member.kept.snapshot().error)
                    patch.undo()
                    await member.reaches(State.VALID)
            await relay.end()

    asyncio.run(run())


def _no_space(*_: object, **__: object) -> None:
    raise StateNotWritten("could not write: No space left on device")


def test_the_agent_sends_nothing_to_an_issuer_of_another_cluster(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path / "one") as here, world(tmp_path / "two") as other:
            relay, stranger = await here.relay(), await other.relay()
            made = token.decode(make_token(here, relay))
            text = token.encode(
                token.Token(made.role, made.name, made.secret, made.authority, stranger.settings.listen)
            )
            async with Member(tmp_path / "n1", text) as member:
                await eventually(lambda: "another authority" in member.kept.snapshot().error)
            assert not [name for name in stranger.counters if name.startswith("enrolment-refused")]
            await relay.end()
            await stranger.end()

    asyncio.run(run())


def test_fetching_tells_of_a_newer_list_only(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            here.authority.issue_local(identity.new_key(), (NODE,), now_s=time.time(), life_s=60)
            here.authority.revoke(NODE, now_s=time.time())
            known = bytes.fromhex(identity.fingerprint(here.authority.certificate))
            for number, expected in ((0, True), (int(time.time()) + 1, False)):
                answer = await enrol.ask(relay.settings.listen, known, enrolment.Fetch(number), clock=time.time)
                assert isinstance(answer.message, enrolment.Fetched)
                assert bool(answer.message.revocations) is expected
            await relay.end()

    asyncio.run(run())


def test_a_directory_restored_from_a_backup_renews_and_revokes_what_it_forgot(tmp_path: Path) -> None:
    made = authority.init(tmp_path / "ca", "test", now_s=1000.0)
    shutil.copytree(tmp_path / "ca", tmp_path / "backup")
    key = identity.new_key()
    forgotten = made.issue_local(key, (NODE,), now_s=1001.0, life_s=60)
    made.revoke(Holder(Role.NODE, "edge-1"), now_s=1002.0)
    restored = Authority(tmp_path / "backup")
    ask = enrolment.renewal(Role.NODE, "edge-1", forgotten, key, identity.new_request(identity.new_key()))
    restored.renew(ask, now_s=1003.0, life_s=60, grace_s=60)
    restored.revoke(NODE, now_s=1004.0)
    assert identity.serial_text(forgotten) in restored._list().serials
    assert restored._list().number > made._list().number


def test_no_secret_reaches_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts: list[str] = []

    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            texts.append(make_token(here, relay))
            async with Member(tmp_path / "n1", texts[0]) as member:
                await member.reaches(State.VALID)
            await relay.end()

    asyncio.run(run())
    written = "".join(capsys.readouterr())
    assert "identity enrolled" in written
    assert texts[0] not in written and "PRIVATE KEY" not in written
    assert token.decode(texts[0]).secret.hex() not in written


def test_the_agents_identity_speaks_to_workers_and_status(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            relay = await here.relay()
            settings = AgentSettings(
                node="edge-1", state_directory=str(tmp_path / "agent"), issuer=relay.settings.listen
            )
            found: list[TlsFiles] = []
            node = NodeIdentity(settings, changed=found.append, revocations=lambda _signed: None)
            node.start()
            trouble = node.trouble()
            assert trouble is not None and trouble[0] == "identity.none" and str(node.token_file) in trouble[2]
            assert node.message(None) is None
            stop = asyncio.Event()
            running = asyncio.create_task(node.run(stop))
            node.token_file.write_text(make_token(here, relay))
            await eventually(lambda: node.ready)
            message = node.message(None)
            assert message is not None and message.key_file == found[0].key_file
            assert node.status().state == "valid" and node.trouble() is None
            stop.set()
            await running
            # A restart uses what is there, at once, without the issuer.
            await relay.end()
            again = NodeIdentity(settings, changed=found.append, revocations=lambda _signed: None)
            again.start()
            assert again.ready and found[-1] == found[0]

    asyncio.run(run())


def test_concurrent_issue_and_revocation_leave_no_living_certificate(tmp_path: Path) -> None:
    """Whatever the order: a certificate is on the list, or was issued after the list."""
    made = authority.init(tmp_path / "ca", "test", now_s=1000.0)
    key = identity.new_key()

    async def run() -> None:
        issuing: Callable[[], object] = lambda: made.issue_local(key, (NODE,), now_s=1001.0, life_s=60)  # noqa: E731
        issuing()
        await asyncio.gather(
            *(asyncio.to_thread(issuing) for _ in range(10)),
            asyncio.to_thread(made.revoke, NODE, now_s=1002.0),
        )

    asyncio.run(run())
    made.revoke(NODE, now_s=1003.0)
    issued = {one.serial for record in made.holders() for one in record.certificates}
    assert len(issued) == 11
    assert issued == made._list().serials
