"""The shape of every decision: what was decided, by which rule, because of which object and setting."""

from typing import Generic, TypeVar

import msgspec

Action = TypeVar("Action")


class Because(msgspec.Struct, frozen=True):
    """The cause of a decision: ``text`` for a reader, the object and the setting it came from for a program."""

    text: str
    object: str = ""
    setting: str = ""


class Verdict(msgspec.Struct, Generic[Action], frozen=True):
    """A decision. ``rule`` is a stable, documented name; a bare boolean is never returned instead."""

    action: Action
    rule: str
    because: Because

    def __str__(self) -> str:
        return f"{self.action}: {self.rule}, because {self.because.text}"
