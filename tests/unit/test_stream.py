"""The stream machine: what goes in at one end comes out at the other, however it is cut; nothing else gets in."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.ports import Outcome, StreamRequest
from isthmus.wire.stream import (
    HEADER,
    MAX_DATA_BYTES,
    MAX_REQUEST_BYTES,
    Announced,
    Datagram,
    End,
    FrameType,
    Open,
    Opened,
    Phase,
    Ready,
    Refused,
    SessionClose,
    SessionOpen,
    Side,
    StreamError,
    StreamMachine,
    data_header_into,
)

REQUEST = StreamRequest("shop", "web", "172.17.0.2", 8080, client_address="10.1.0.9", client_port=40000)


def data_frame(payload: bytes) -> bytes:
    buffer = bytearray(HEADER.size)
    data_header_into(memoryview(buffer), len(payload))
    return bytes(buffer) + payload


def feed(machine: StreamMachine, data: bytes) -> list[object]:
    """Receive, with DATA as bytes: the views die with the buffer."""
    return [bytes(event) if isinstance(event, memoryview) else event for event in machine.receive(memoryview(data))]


def pair() -> tuple[StreamMachine, StreamMachine]:
    opener, acceptor = StreamMachine(Side.OPENER), StreamMachine(Side.ACCEPTOR)
    assert feed(opener, acceptor.ready()) == [Ready()]
    return opener, acceptor


def streaming() -> tuple[StreamMachine, StreamMachine]:
    opener, acceptor = pair()
    assert feed(acceptor, opener.open(REQUEST)) == [Open(REQUEST)]
    assert feed(opener, acceptor.opened()) == [Opened()]
    return opener, acceptor


def test_a_stream_opens_carries_and_leaves_the_connection_idle() -> None:
    opener, acceptor = streaming()
    assert feed(acceptor, data_frame(b"hello") + opener.end()) == [b"hello", End()]
    assert acceptor.phase is Phase.STREAMING
    assert feed(opener, data_frame(b"world") + acceptor.end()) == [b"world", End()]
    assert opener.phase is acceptor.phase is Phase.IDLE
    assert feed(acceptor, opener.open(REQUEST)) == [Open(REQUEST)]


def test_a_refusal_leaves_the_connection_idle() -> None:
    opener, acceptor = pair()
    feed(acceptor, opener.open(REQUEST))
    assert feed(opener, acceptor.refused(Outcome.NOT_ALLOWED, "not ours")) == [Refused(Outcome.NOT_ALLOWED, "not ours")]
    assert opener.phase is acceptor.phase is Phase.IDLE


def test_the_next_open_may_follow_the_last_end_at_once() -> None:
    opener, acceptor = streaming()
    feed(opener, acceptor.end())
    assert feed(acceptor, opener.end() + opener.open(REQUEST)) == [End(), Open(REQUEST)]


@given(
    ours=st.lists(st.binary(max_size=300), max_size=4), theirs=st.lists(st.binary(max_size=300), min_size=1, max_size=4)
)
def test_announcements_go_both_ways_before_the_first_stream(ours: list[bytes], theirs: list[bytes]) -> None:
    opener, acceptor = StreamMachine(Side.OPENER), StreamMachine(Side.ACCEPTOR)
    assert feed(opener, acceptor.ready(ours)) == [Ready(tuple(ours))]
    sent = opener.announce(theirs) + opener.open(REQUEST)
    assert feed(acceptor, sent) == [Announced(tuple(theirs)), Open(REQUEST)]


def test_more_announcements_than_may_come_at_once_are_refused() -> None:
    opener, acceptor = pair()
    with pytest.raises(StreamError, match="5 announcements"):
        feed(acceptor, opener.announce([b"x"] * 5))


def test_datagram_sessions_share_a_connection() -> None:
    opener, acceptor = pair()
    sent = opener.session_open(1, REQUEST) + opener.session_open(2, REQUEST) + opener.datagram(2, b"")
    assert feed(acceptor, sent) == [SessionOpen(1, REQUEST), SessionOpen(2, REQUEST), Datagram(2, b"")]
    answer = acceptor.datagram(1, b"x") + acceptor.session_close(2, Outcome.REFUSED, "")
    assert feed(opener, answer) == [Datagram(1, b"x"), SessionClose(2, Outcome.REFUSED, "")]


Script = st.lists(st.one_of(st.binary(min_size=1, max_size=300), st.just(b"x" * 70_000)), max_size=8)


@given(script=Script, cuts=st.lists(st.integers(0, 80_000), max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_cutting_gives_the_same_bytes_and_events(script: list[bytes], cuts: list[int]) -> None:
    opener, acceptor = pair()
    wire = opener.open(REQUEST)
    acceptor_cut = StreamMachine(Side.ACCEPTOR)
    acceptor_cut.ready()
    edges = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    events: list[object] = []
    for start, end in itertools.pairwise(edges):
        events += feed(acceptor_cut, wire[start:end])
    assert events == [Open(REQUEST)]
    acceptor_cut.opened()
    feed(opener, acceptor.opened() if feed(acceptor, wire) else b"")
    body = b"".join(data_frame(payload) for payload in script) + opener.end()
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    events = []
    for start, end in itertools.pairwise(edges):
        events += feed(acceptor_cut, body[start:end])
    assert b"".join(event for event in events if isinstance(event, bytes)) == b"".join(script)
    assert [event for event in events if not isinstance(event, bytes)] == [End()]


@given(
    sessions=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=2000)), min_size=1, max_size=6),
    step=st.integers(1, 400),
)
@settings(max_examples=80, deadline=None)
def test_any_cutting_gives_the_same_datagrams(sessions: list[tuple[int, bytes]], step: int) -> None:
    opener, acceptor = pair()
    wire = opener.session_open(7, REQUEST) + b"".join(opener.datagram(*session) for session in sessions)
    events: list[object] = []
    for start in range(0, len(wire), step):
        events += feed(acceptor, wire[start : start + step])
    assert events == [SessionOpen(7, REQUEST), *(Datagram(*session) for session in sessions)]


@given(garbage=st.binary(max_size=2000), side=st.sampled_from(Side), step=st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_garbage_is_a_typed_error_or_nothing(garbage: bytes, side: Side, step: int) -> None:
    for machine in (StreamMachine(side), pair()[side is Side.ACCEPTOR], streaming()[side is Side.ACCEPTOR]):
        try:
            for start in range(0, len(garbage), step):
                machine.receive(memoryview(garbage[start : start + step]))
        except StreamError:
            pass


@given(kind=st.sampled_from(FrameType), body=st.binary(max_size=200), side=st.sampled_from(Side))
@settings(max_examples=200, deadline=None)
def test_well_framed_garbage_is_a_typed_error_or_an_event(kind: FrameType, body: bytes, side: Side) -> None:
    for machine in (pair()[side is Side.ACCEPTOR], streaming()[side is Side.ACCEPTOR]):
        try:
            machine.receive(memoryview(HEADER.pack(kind, len(body)) + body))
        except StreamError:
            pass


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (HEADER.pack(FrameType.DATA, MAX_DATA_BYTES + 1), "a DATA frame is bounded"),
        (HEADER.pack(FrameType.DATA, 0), "an empty DATA frame says nothing"),
        (HEADER.pack(FrameType.OPENED, 0), "the stream is open already"),
        (HEADER.pack(FrameType.OPEN, 10), "openers do not serve"),
        (HEADER.pack(77, 0), "no such type"),
        (HEADER.pack(FrameType.END, 1), "END has no body"),
    ],
)
def test_a_frame_out_of_place_is_refused_by_its_header(frame: bytes, why: str) -> None:
    opener, _ = streaming()
    with pytest.raises(StreamError):
        opener.receive(memoryview(frame))


def test_data_after_end_is_refused() -> None:
    opener, acceptor = streaming()
    feed(acceptor, opener.end())
    with pytest.raises(StreamError):
        feed(acceptor, data_frame(b"late"))


def test_a_request_is_bounded_before_it_is_kept() -> None:
    _, acceptor = pair()
    with pytest.raises(StreamError):
        acceptor.receive(memoryview(HEADER.pack(FrameType.OPEN, MAX_REQUEST_BYTES + 1)))


def test_a_long_detail_is_cut_not_refused() -> None:
    opener, acceptor = pair()
    feed(acceptor, opener.open(REQUEST))
    (refused,) = feed(opener, acceptor.refused(Outcome.TIMED_OUT, "ü" * 5000))
    assert isinstance(refused, Refused) and refused.detail == "ü" * 200


@pytest.mark.parametrize("step", ["open", "opened", "end", "ready"])
def test_our_own_missteps_are_not_sent(step: str) -> None:
    opener, _ = streaming()
    opener.end()
    with pytest.raises(RuntimeError):
        getattr(opener, step)(*([REQUEST] if step == "open" else []))
