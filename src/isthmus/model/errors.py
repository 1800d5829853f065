"""Errors that every room shares.

One root with a stable ``code`` (listed in docs/errors.md, held to it by a test); a subclass only where a caller
branches on it. The message says what was tried, on what, and why it failed; ``hint`` says what to do.
"""

from typing import ClassVar


class IsthmusError(Exception):
    """The root. ``code`` is stable and documented; ``hint`` tells the reader what to do next."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def message(self) -> str:
        """The message without the hint."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(IsthmusError):
    """The command line or a setting asks for something that does not exist; exit code 2."""

    code = "usage"


class KernelError(IsthmusError):
    """The kernel, or a tool that speaks to it, refused."""

    code = "kernel.refused"


class NotSupported(KernelError):
    """The kernel lacks the feature; the only refusal that selects a fallback."""

    code = "kernel.not-supported"


class NotPermitted(KernelError):
    """A privilege is missing. Never means that a feature is absent."""

    code = "kernel.not-permitted"
