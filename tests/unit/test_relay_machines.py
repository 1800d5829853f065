"""The relay's pure parts: tickets, outbox, ticket preambles, control messages."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isthmus.relay.outbox import Outbox
from isthmus.relay.tickets import PairRefused, Stage, TicketBook
from isthmus.wire import announcement, control, identity, ticket
from isthmus.wire.announcement import Announcement
from isthmus.wire.control import ControlError, NodeReader, RelayReader
from isthmus.wire.identity import Holder, Role
from isthmus.wire.registry import Registry
from isthmus.wire.ticket import AnswerReader, PreambleReader, TicketError, TicketRefused

NODES = ["a", "b", "c"]
LIMIT, PAIRS, PAIRING_S = 3, 5, 5.0


class Tickets(RuleBasedStateMachine):
    """The book against a naive list of pairs."""

    def __init__(self) -> None:
        super().__init__()
        numbers = itertools.count(1)
        self.book = TicketBook(
            pairs_per_node=LIMIT,
            pairs=PAIRS,
            pairing_s=PAIRING_S,
            random_bytes=lambda size: next(numbers).to_bytes(size, "big"),
        )
        self.now_s = 0.0
        self.unused: dict[bytes, int] = {}
        self.living: dict[int, tuple[str, str, float, int]] = {}  # nodes, deadline, halves that have come

    @rule(asker=st.sampled_from(NODES), peer=st.sampled_from(NODES))
    def issue(self, asker: str, peer: str) -> None:
        count = {node: sum(node in one[:2] for one in self.living.values()) for node in NODES}
        allowed = asker != peer and max(count[asker], count[peer]) < LIMIT and len(self.living) < PAIRS
        try:
            pair = self.book.issue(asker, peer, self.now_s)
        except PairRefused:
            assert not allowed
            return
        assert allowed
        self.living[pair.number] = (asker, peer, self.now_s + PAIRING_S, 0)
        self.unused.update((one, pair.number) for one in pair.tickets.values())

    @precondition(lambda self: self.unused)
    @rule(choice=st.randoms(use_true_random=False))
    def redeem(self, choice: random.Random) -> None:
        used = choice.choice(sorted(self.unused))
        number = self.unused.pop(used)
        living = self.living.get(number)
        try:
            redeemed = self.book.redeem(used, self.now_s)
        except PairRefused:
            assert living is None or self.now_s > living[2]
            self.living.pop(number, None)
        else:
            assert living is not None
            assert redeemed.pair.stage is (Stage.JOINED if living[3] else Stage.HALF)
            self.living[number] = (*living[:3], living[3] + 1)
        with pytest.raises(PairRefused):
            self.book.redeem(used, self.now_s)

    @rule(step_s=st.floats(0.1, 4.0))
    def wait(self, step_s: float) -> None:
        self.now_s += step_s
        late = {pair.number for pair in self.book.expire(self.now_s)}
        expected = {number for number, one in self.living.items() if one[3] < 2 and one[2] < self.now_s}
        assert late == expected
        for number in late:
            del self.living[number]

    @rule(node=st.sampled_from(NODES))
    def revoke(self, node: str) -> None:
        ended = {pair.number for pair in self.book.forget_node(node)}
        assert ended == {number for number, one in self.living.items() if node in one[:2]}
        for number in ended:
            del self.living[number]

    @invariant()
    def counts_agree(self) -> None:
        assert self.book.joined == sum(one[3] == 2 for one in self.living.values())
        assert self.book.joined + self.book.pending == len(self.living)
        for node in NODES:
            assert self.book.streams_of(node) == sum(node in one[:2] for one in self.living.values())


TestTickets = Tickets.TestCase


@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(1, 9)))
def test_a_preamble_arrives_in_any_pieces_and_nothing_behind_it_is_taken(secret: bytes, sizes: list[int]) -> None:
    stream = ticket.preamble(secret) + b"\x16TLS"
    reader, at, found = PreambleReader(), 0, None
    for size in (*sizes, *[40] * 40):
        size = min(size, reader.missing_bytes)
        found = reader.feed(stream[at : at + size])
        at += size
        if found is not None:
            break
    assert found == secret and at == ticket.PREAMBLE_BYTES


@given(st.binary(min_size=1, max_size=60))
def test_anything_else_than_a_preamble_is_noticed_at_its_first_wrong_byte(data: bytes) -> None:
    reader = PreambleReader()
    if ticket.MAGIC.startswith(data[:8]):
        return
    with pytest.raises(TicketError):
        for byte in data:
            reader.feed(bytes((byte,)))


@given(st.text(max_size=300))
def test_a_refusal_arrives_with_its_reason(reason: str) -> None:
    reader, data = AnswerReader(), ticket.refusal(reason)
    with pytest.raises(TicketRefused) as caught:
        while data:
            size = reader.missing_bytes
            chunk, data = data[:size], data[size:]
            assert not reader.feed(chunk)
    assert reason.startswith(caught.value.message.rstrip("\ufffd")) or caught.value.message == reason


@given(st.binary(max_size=300))
def test_garbage_on_a_control_channel_is_a_control_error(data: bytes) -> None:
    for reader in (NodeReader(), RelayReader()):
        with pytest.raises(ControlError):
            reader.feed(len(data).to_bytes(4, "big") + data)


@pytest.mark.parametrize(
    "message",
    [
        control.Hello(1, "a", b"x" * (announcement.MAX_BYTES + 1)),
        control.Announce(b"x" * (announcement.MAX_BYTES + 1)),
        control.Connect(0, "b", control.Mode.RELAYED),
        control.Connect(2**60, "b", control.Mode.RELAYED),
    ],
)
def test_what_a_node_may_send_is_bounded(message: control.FromNode) -> None:
    with pytest.raises(ControlError):
        NodeReader().feed(control.pack(message))


@pytest.mark.parametrize(
    "message",
    [
        control.Ticket(1, "b", b"short", 5.0),
        control.ReversePlease("b", tuple("x" for _ in range(17))),
        control.Announcements(tuple(b"" for _ in range(65))),
    ],
)
def test_what_a_relay_may_send_is_bounded(message: control.FromRelay) -> None:
    with pytest.raises(ControlError):
        RelayReader().feed(control.pack(message))


def registry_of(count: int) -> Registry:
    """A registry with nodes n0, n1, ... that did announce themselves."""
    now_s = 1_800_000_000.0
    authority_key = identity.new_key()
    authority = identity.new_authority("test", authority_key, now_s=now_s)
    registry = Registry(authority)
    key = identity.new_key()
    for number in range(count):
        name = f"n{number}"
        holder = Holder(Role.NODE, name)
        certificate = identity.issue(authority, authority_key, key.public_key(), (holder,), now_s=now_s)
        registry.accept(announcement.seal(Announcement(name, 1, now_s), certificate, key), now_s=now_s)
    return registry


def drain(outbox: Outbox, registry: Registry) -> list[control.FromRelay]:
    reader, messages = RelayReader(), []
    while data := outbox.take(registry):
        messages += reader.feed(data)
    return messages


def test_a_new_channel_gets_everything_but_itself_in_batches() -> None:
    registry, outbox = registry_of(130), Outbox(1_000)
    outbox.mark_everything(registry, ("n0", "n1"), "n0")
    messages = drain(outbox, registry)
    sizes = [len(one.signed) for one in messages if isinstance(one, control.Announcements)]
    assert sizes == [64, 64, 1]
    assert control.Presence(("n0", "n1"), complete=True) in messages


def test_what_changed_ten_thousand_times_is_sent_once() -> None:
    registry, outbox = registry_of(2), Outbox(1_000)
    for number in range(10_000):
        outbox.mark("n1")
        outbox.mark_presence("n1", number % 2 == 0)
        outbox.mark("unknown")
    messages = drain(outbox, registry)
    assert [type(one).__name__ for one in messages] == ["Announcements", "Presence"]
    assert messages[1] == control.Presence(absent=("n1",))


def test_answers_that_are_not_read_are_bounded() -> None:
    outbox = Outbox(100)
    assert outbox.put(control.Pong(1))
    assert not all(outbox.put(control.Pong(number)) for number in range(50))
