"""The adapter for nftables: one own table, one transaction a change, through ``nft -f -``; read through ``nft -j``.

A change of exceptions or preserved endpoints touches only those elements (milliseconds among ten thousand); listing
that many takes a second, so the kernel is read at the start, every period, and after a refusal, not at every change.
"""

import hashlib
import json
from typing import Any

import msgspec

from isthmus.kernel.nft_rules import (
    FAMILY_TABLE,
    TABLE,
    Elements,
    add_elements,
    delete_elements,
    element_text,
    elements,
    structure,
)
from isthmus.kernel.run import run
from isthmus.model.errors import KernelError, NotSupported
from isthmus.plan.interception import InterceptionPlan

NFT = "nft"
Json = dict[str, Any]

# ``delete`` refuses where there is no table, so the table is made first; both and what follows are one transaction.
_FRESH = [f"add table {FAMILY_TABLE}", f"delete table {FAMILY_TABLE}"]


class NftState(msgspec.Struct, frozen=True):
    """What the kernel holds of ours: a digest of everything but the elements, and the elements."""

    digest: str
    elements: Elements


class Nftables:
    """Reads and changes the table ``inet isthmus``."""

    def read(self) -> NftState | None:
        """None where the table does not exist."""
        return parse_listing(self._list())

    def elements(self, plan: InterceptionPlan) -> Elements:
        """What ``read`` should find in the sets."""
        return elements(plan)

    def replace(self, plan: InterceptionPlan) -> None:
        """The whole table anew, in one transaction: there is no moment without it."""
        commands = [*_FRESH, *structure(plan)]
        commands += [add_elements(name, items) for name, items in elements(plan).items() if items]
        self._transaction(commands)

    def update(self, before: Elements, after: Elements) -> int:
        """Turn the elements ``before`` into ``after``, in one transaction; how many were changed."""
        commands: list[str] = []
        changed = 0
        for name, wanted in after.items():
            present = before.get(name, {})
            gone = [text for text, note in present.items() if wanted.get(text) != note]
            new = {text: note for text, note in wanted.items() if present.get(text) != note}
            changed += len(new.keys() | gone)
            if gone:
                commands.append(delete_elements(name, gone))
            if new:
                commands.append(add_elements(name, new))
        if commands:
            self._transaction(commands)
        return changed

    def remove(self) -> bool:
        """Delete the table; False where there was none."""
        if not self._exists():
            return False
        self._transaction(_FRESH)
        return True

    def listing(self) -> str:
        """The table as ``nft`` prints it, for people; '' where there is none."""
        return run([NFT, "list", "table", "inet", TABLE]) if self._exists() else ""

    def _exists(self) -> bool:
        try:
            listed = json.loads(run([NFT, "-j", "list", "tables", "inet"]))["nftables"]
        except NotSupported:  # no nft, or no nf_tables: then nothing of ours is in it either
            return False
        return any(item.get("table", {}).get("name") == TABLE for item in listed)

    def _list(self) -> list[Json] | None:
        if not self._exists():
            return None
        try:
            listed: list[Json] = json.loads(run([NFT, "-j", "list", "table", "inet", TABLE]))["nftables"]
        except KernelError:
            if self._exists():
                raise
            return None  # deleted in between
        return listed

    def _transaction(self, commands: list[str]) -> None:
        run([NFT, "-f", "-"], "\n".join(commands) + "\n")


def parse_listing(listed: list[Json] | None) -> NftState | None:
    """Split a listing in structure and elements; handles are left out, for they differ after every change."""
    if listed is None:
        return None
    found: Elements = {}
    digest = hashlib.sha256()
    for item in listed:
        (kind, body), *_ = item.items()
        if kind == "metainfo":
            continue
        if kind == "set":
            found[body["name"]] = dict(element_text(raw) for raw in body.get("elem", []))
        kept: dict[str, Any] = {key: value for key, value in body.items() if key not in ("handle", "elem")}
        digest.update(json.dumps({kind: kept}, sort_keys=True).encode())
    return NftState(digest.hexdigest(), found)
