"""Reads a settings file; what is in it is checked by model/settings_text.py."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from isthmus.model.errors import UsageError
from isthmus.wire.identity import IdentityError, check_name

Settings = TypeVar("Settings")


def load_settings(path: Path, parse: Callable[[str, str], Settings]) -> Settings:
    """Parse ``path``. Raises UsageError where it cannot be read, SettingsError for what is in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"could not read the settings {path}: {error}") from error
    return parse(text, str(path))


def holder_name(text: str) -> str:
    """The name of a node, relay or issuer as it was typed or configured; raises UsageError."""
    try:
        return check_name(text)
    except IdentityError as error:
        raise UsageError(error.message) from error
