"""Cutting a changed text with the help of the earlier cut gives what cutting it anew gives."""

from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus.store import cutting
from isthmus.store.cutting import cut

PARTS = st.lists(
    st.sampled_from(
        ["a: b\n", "---\n", "--- x\n", "...\n", "# c\n", "\n", "-", "--", "---", "...", " ---\n", "é\n", "x"]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(PARTS, PARTS, PARTS, PARTS, st.sampled_from([1, 3, 1 << 16]))
@example("a: b\n", "", "---\na: b\n", "\n---\nc: d\n", 3)
@example("a: b\n--", "", "-\nb\n", "\n---\nc\n", 1)
def test_an_earlier_cut_changes_nothing_but_the_time(head: str, old: str, new: str, tail: str, step: int) -> None:
    with patch.object(cutting, "STEP", step):
        earlier = cut(head + old + tail)
        assert cut(head + new + tail, earlier) == cut(head + new + tail)
        assert cut(head + old + tail, earlier) == earlier


def test_only_what_changed_is_hashed_again() -> None:
    text = "".join(f"---\nname: n{i}\n" for i in range(1_000))
    earlier = cut(text)
    with patch.object(cutting, "_digest", wraps=cutting._digest) as digest:
        changed = cut(text.replace("n500\n", "n500\nmore: 1\n"), earlier)
    assert digest.call_count <= 3
    assert changed.pieces[-1].line == earlier.pieces[-1].line + 1
