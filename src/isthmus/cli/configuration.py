"""Reads a settings file: YAML into the typed settings, with the file and the field in every error."""

from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from isthmus.model.errors import UsageError

Settings = TypeVar("Settings")


def load_settings(path: Path, kind: type[Settings]) -> Settings:
    """Parse ``path``; an empty file means all defaults. Raises UsageError that names file, line or field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"could not read the settings {path}: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    try:
        return msgspec.convert(data if data is not None else {}, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}", hint="every setting is in docs/settings.md") from error
