"""How quantities are written for people: one form everywhere."""

_BYTE_STEPS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_TIME_STEPS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def duration_text(seconds: float) -> str:
    """``3 h 12 min``: the two largest units; below a second, milliseconds. Negative durations count as 0."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms" if seconds > 0 else "0 s"
    left, parts = int(seconds), []
    for size, unit in _TIME_STEPS:
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
        elif parts:
            break
    return " ".join(parts[:2])


def bytes_text(count: int) -> str:
    """``1.5 MiB``: binary units, one decimal."""
    for size, unit in _BYTE_STEPS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def count_text(count: int, noun: str, plural: str = "") -> str:
    """``1 peer``, ``2 peers``."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def join_text(items: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)
