"""Kernel settings that interception needs: changed only where they must be, written down before, put back afterwards.

The state file (mode 0600) holds the value that was there before our first change, so it survives crashes and restarts;
one value is put back only while it is still the one that we wrote: a change that someone made since is theirs.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from isthmus.files import StateNotWritten, write_private
from isthmus.model.errors import KernelError, NotPermitted

STATE_FILE = "sysctls.json"


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One setting, by its name as sysctl(8) writes it with slashes: its value before, and ours."""

    name: str
    before: str
    ours: str


class Sysctls:
    """Reads, changes and restores settings of this network namespace."""

    def __init__(self, state_dir: Path, boot_id: str, root: Path = Path("/proc/sys")) -> None:
        self._file = state_dir / STATE_FILE
        self._boot_id = boot_id
        self._root = root

    def read(self, name: str) -> str | None:
        """The value now; None where the kernel has no such setting (here, or not yet)."""
        try:
            return " ".join((self._root / name).read_text().split())
        except OSError:
            return None

    def changes(self) -> tuple[Change, ...]:
        """What we have changed since this boot, in order; a state file that cannot be read counts as empty."""
        try:
            state = msgspec.json.decode(self._file.read_bytes(), type=_State)
        except (OSError, msgspec.DecodeError):
            return ()
        return state.changes if state.boot_id == self._boot_id else ()

    def raise_to(self, minimum: dict[str, int]) -> tuple[str, ...]:
        """Have each setting at least at its minimum; what was changed, in words. Missing settings are passed over."""
        low = {
            name: str(least)
            for name, least in minimum.items()
            if (now := self.read(name)) is not None and now.isdigit() and int(now) < least
        }
        return self.set_to(low)

    def set_to(self, wanted: dict[str, str]) -> tuple[str, ...]:
        """Have each setting at its value; what was changed, in words. Missing settings are passed over."""
        done: list[str] = []
        for name, value in wanted.items():
            now = self.read(name)
            if now is None or now == value:
                continue
            self._note(Change(name, self._before(name, now), value))
            self._write(name, value)
            done.append(f"sysctl {name}: {now} -> {value}")
        return tuple(done)

    def restore(self, keep: Iterable[str] = ()) -> tuple[str, ...]:
        """Put back what is still as we wrote it, and forget it, all but ``keep``; what was changed, in words."""
        done: list[str] = []
        kept = tuple(change for change in self.changes() if change.name in set(keep))
        for change in self.changes():
            if change not in kept and self.read(change.name) == change.ours:
                self._write(change.name, change.before)
                done.append(f"sysctl {change.name}: {change.ours} -> {change.before}")
        if kept:
            self._keep(kept)
        else:
            self._file.unlink(missing_ok=True)
        return tuple(done)

    def _before(self, name: str, now: str) -> str:
        """What was there before our first change; ``now`` where someone else has changed it since."""
        known = next((change for change in self.changes() if change.name == name), None)
        return known.before if known is not None and now == known.ours else now

    def _note(self, change: Change) -> None:
        others = tuple(other for other in self.changes() if other.name != change.name)
        self._keep((*others, change))

    def _keep(self, changes: tuple[Change, ...]) -> None:
        raw = msgspec.json.format(msgspec.json.encode(_State(self._boot_id, changes)), indent=2)
        try:
            write_private(self._file, raw + b"\n")
        except StateNotWritten as error:
            raise KernelError(error.message, hint="no setting is changed that could not be restored") from error

    def _write(self, name: str, value: str) -> None:
        try:
            (self._root / name).write_text(value)
        except PermissionError as error:
            raise NotPermitted(f"setting {name} to {value}: {error.strerror}") from error
        except OSError as error:
            raise KernelError(f"setting {name} to {value}: {error.strerror}") from error


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    boot_id: str
    changes: tuple[Change, ...]
