"""The adapter for ipset: our sets, filled by one ``ipset restore`` a change, replaced as a whole by a swap."""

import shlex

from isthmus.kernel.run import run
from isthmus.model.errors import KernelError, NotSupported

IPSET = "ipset"
PREFIX = "isthmus-"
MAX_ENTRIES = 1_048_576

Entries = dict[str, str]
"""Text of an entry to its comment ('': none)."""


class Ipset:
    """Reads and changes sets whose names begin with ``isthmus-``."""

    def read(self) -> dict[str, Entries]:
        """Every set of ours. Empty where ipset is missing: then there is none."""
        try:
            names = [name for name in run([IPSET, "list", "-n"]).split() if name.startswith(PREFIX)]
        except NotSupported:
            return {}
        return {name: parse_save(run([IPSET, "save", name])) for name in names}

    def replace(self, name: str, entries: Entries) -> None:
        """Fill a new set and swap it in: rules that refer to the name see the old content or the new, never half."""
        fresh = f"{name}-new"
        commands = [_create(name), _create(fresh, name), f"flush {fresh}"]
        commands += [_add(fresh, *item) for item in entries.items()]
        self._restore([*commands, f"swap {fresh} {name}", f"destroy {fresh}"])

    def update(self, name: str, before: Entries, after: Entries) -> int:
        """Turn the entries ``before`` into ``after``; how many were changed."""
        gone = [text for text, note in before.items() if after.get(text) != note]
        new = {text: note for text, note in after.items() if before.get(text) != note}
        if gone or new:
            self._restore([f"del {name} {text}" for text in gone] + [_add(name, *item) for item in new.items()])
        return len(new.keys() | gone)

    def remove(self) -> bool:
        """Destroy every set of ours; False where there was none. Rules that refer to them must be gone."""
        names = list(self.read())
        if names:
            self._restore([f"destroy {name}" for name in names])
        return bool(names)

    def _restore(self, commands: list[str]) -> None:
        run([IPSET, "-exist", "restore"], "\n".join(commands) + "\n")


def parse_save(text: str) -> Entries:
    """The entries of one set out of ``ipset save``. KernelError for a line that is neither create nor add."""
    entries: Entries = {}
    for line in text.splitlines():
        words = shlex.split(line)
        if len(words) >= 3 and words[0] == "add":
            entries[words[2]] = words[4] if words[3:4] == ["comment"] and len(words) > 4 else ""
        elif words and words[0] != "create":
            raise KernelError(f"reading ipset's answer: {line!r} is not understood")
    return entries


def _create(name: str, like: str = "") -> str:
    like = like or name
    kind = "hash:ip,port" if "preserved" in like else "hash:ip"
    family = "inet6" if like.endswith("6") else "inet"
    return f"create {name} {kind} family {family} maxelem {MAX_ENTRIES} comment"


def _add(name: str, text: str, comment: str) -> str:
    return f'add {name} {text} comment "{comment}"' if comment else f"add {name} {text}"
