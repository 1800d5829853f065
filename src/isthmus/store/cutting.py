"""Cutting a file's text into documents, again and again. Pure.

Of a large file usually one document changes. The text before the first difference and after the last one is the same,
so its documents need neither be cut nor hashed again: what remains costs a comparison of memory.
"""

from hashlib import blake2b
from itertools import takewhile

import msgspec

from isthmus.model.yamltext import normalise, spans

STEP = 1 << 16
MARKER = 4
"""Characters of a marker with the one that follows it."""


class Piece(msgspec.Struct, frozen=True):
    """A document: its digest, its first line from 1, and where it stands in the text."""

    digest: bytes
    line: int
    start: int
    end: int


class Cut(msgspec.Struct, frozen=True):
    """A normalised text and its documents in order."""

    text: str
    pieces: tuple[Piece, ...]

    def document(self, piece: Piece) -> str:
        """The text of one document."""
        return self.text[piece.start : piece.end]


def cut(text: str, earlier: Cut | None = None) -> Cut:
    """The documents of a file's text. ``earlier``, how it was cut before, changes nothing but the time it takes."""
    text = normalise(text)
    if earlier is None:
        return Cut(text, _cut(text, 0, len(text), 1))
    prefix = _common_prefix(earlier.text, text)
    suffix = _common_suffix(earlier.text, text, min(len(earlier.text), len(text)) - prefix)
    head = tuple(takewhile(lambda piece: piece.end + MARKER <= prefix, earlier.pieces))
    tail = _tail(earlier, len(earlier.text) - suffix, len(head))
    moved = len(text) - len(earlier.text)
    start = head[-1].end if head else 0
    end = tail[0].start + moved if tail else len(text)
    line = head[-1].line + text.count("\n", head[-1].start, start) if head else 1
    middle = _cut(text, start, end, line)
    if tail:
        old_start = start
        lines = text.count("\n", start, end) - earlier.text.count("\n", old_start, tail[0].start)
        tail = tuple(Piece(one.digest, one.line + lines, one.start + moved, one.end + moved) for one in tail)
    return Cut(text, head + middle + tail)


def _tail(earlier: Cut, same_from: int, first: int) -> tuple[Piece, ...]:
    """The pieces that start, line end before their marker included, where the texts are the same again."""
    pieces = earlier.pieces
    at = len(pieces)
    while at > first and pieces[at - 1].start - 1 - MARKER >= same_from:
        at -= 1
    return pieces[at:]


def _cut(text: str, start: int, end: int, line: int) -> tuple[Piece, ...]:
    part = text if (start, end) == (0, len(text)) else text[start:end]
    return tuple(
        Piece(_digest(part[begin:stop]), line + lines, start + begin, start + stop)
        for begin, stop, lines in spans(part)
    )


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _common_prefix(one: str, other: str) -> int:
    limit = min(len(one), len(other))
    low = 0
    while low < limit and one[low : low + STEP] == other[low : low + STEP]:
        low += STEP
    if low >= limit:
        return limit
    return low + _bisect(one[low : low + STEP], other[low : low + STEP])


def _bisect(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(one: str, other: str, limit: int) -> int:
    """At most ``limit``."""
    same = 0
    while same < limit:
        step = min(STEP, limit - same)
        left, right = _before_end(one, same, step), _before_end(other, same, step)
        if left != right:
            return same + _bisect(left[::-1], right[::-1])
        same += step
    return same


def _before_end(text: str, same: int, step: int) -> str:
    end = len(text) - same
    return text[end - step : end]
