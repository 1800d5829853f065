"""Frames survive any cutting of the stream, and a large announcement is refused before memory is given to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.wire.frames import FrameError, FrameReader, encode


@given(st.lists(st.binary(max_size=200)), st.integers(min_value=1, max_value=50))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(bodies: list[bytes], step: int) -> None:
    stream = b"".join(encode(body) for body in bodies)
    reader = FrameReader()
    seen = [frame for at in range(0, len(stream), step) for frame in reader.feed(stream[at : at + step])]
    assert seen == bodies


def test_a_frame_larger_than_the_limit_is_refused_at_its_header() -> None:
    with pytest.raises(FrameError):
        FrameReader(max_bytes=10).feed(encode(b"x" * 11)[:4])
