"""The adapter for iptables: one transaction a table, through ``iptables-restore --noflush``.

Our chains are replaced as a whole; of other chains only our own jumps are touched, and they are put first: kube-proxy
inserts its own jump at the top whenever it starts, so the order is part of what is compared.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from isthmus.kernel.ipset import Ipset
from isthmus.kernel.iptables_rules import CHAINS, ROOT_COMMENT, TABLES, TableRules, exception_rule, sets, tables
from isthmus.kernel.nft_rules import Elements
from isthmus.kernel.run import run
from isthmus.model.errors import NotSupported
from isthmus.plan.interception import CHAIN, InterceptionPlan

LOCK_WAIT_S = 10
_TOOL = {4: "iptables", 6: "ip6tables"}
_TABLE_NAMES = {4: Path("/proc/net/ip_tables_names"), 6: Path("/proc/net/ip6_tables_names")}

_JUMP = re.compile(r"^-A (PREROUTING|OUTPUT) .*-j (" + "|".join(map(re.escape, CHAINS)) + r")$")
_EXCEPTION = re.compile(r'^-A \S+ -d (\S+)/(?:32|128) -m comment --comment "?(.+?)"? -j RETURN$')


class TableState(msgspec.Struct, frozen=True):
    """What one table holds of ours: chains, their rules as ``iptables-save`` prints them, jumps, and their order."""

    chains: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    jumps: tuple[str, ...] = ()
    jumps_first: bool = True

    @property
    def present(self) -> bool:
        return bool(self.chains or self.jumps)


class IptablesState(msgspec.Struct, frozen=True):
    """What the kernel holds of ours: a digest of everything but the exceptions and preserved endpoints, and those."""

    digest: str
    elements: Elements


class Iptables:
    """Reads and changes our chains and sets, in the flavour ("legacy", "nft") that is given."""

    def __init__(self, flavour: str) -> None:
        self.flavour = flavour
        self._ipset = Ipset()

    def read(self) -> IptablesState | None:
        """None where no chain or jump of ours is there."""
        digest = hashlib.sha256()
        elements: Elements = dict(self._ipset.read())
        found = False
        for version in (4, 6):
            for table in TABLES:
                state = self._read_table(version, table)
                if not state.present:
                    continue
                found = True
                rules, exceptions = split_exceptions(state.rules)
                if exceptions:
                    elements[f"{table}{version}"] = exceptions
                kept = (version, table, state.chains, rules, state.jumps, state.jumps_first)
                digest.update(repr(kept).encode())
        return IptablesState(digest.hexdigest(), elements) if found else None

    def replace(self, plan: InterceptionPlan) -> None:
        """Every set and table anew. Sets first, for rules refer to them; tables that we no longer use lose our part."""
        wanted_sets = sets(plan)
        for name, entries in wanted_sets.items():
            self._ipset.replace(name, entries)
        for version in (4, 6):
            wanted = tables(plan, version)
            for table in TABLES:
                self._replace_table(version, table, wanted.get(table))
        if not wanted_sets:
            self._ipset.remove()

    def update(self, before: Elements, after: Elements) -> int:
        """Turn the elements ``before`` into ``after``; how many were changed. Both from ``elements``."""
        return sum(self._update(name, before.get(name, {}), wanted) for name, wanted in after.items())

    def elements(self, plan: InterceptionPlan) -> Elements:
        """What ``read`` should find: entries of sets, or exceptions of each table and version."""
        if plan.use_ipset:
            return sets(plan)
        found = {
            f"{table}{version}": plan.exceptions(version)
            for version in plan.versions()
            for table, rules in tables(plan, version).items()
            if any("-j RETURN" in rule for chain in rules.chains.values() for rule in chain)
        }
        return {name: items for name, items in found.items() if items}

    def remove(self) -> bool:
        """Delete our jumps, chains and sets; False where there was nothing. Sets only where no rule refers to them."""
        found = self.remove_rules()
        other = Iptables("nft" if self.flavour == "legacy" else "legacy")
        return self._ipset.remove() or found if not other.has_rules() else found

    def remove_rules(self) -> bool:
        """Delete our jumps and chains; False where there was nothing."""
        found = False
        for version in (4, 6):
            for table in TABLES:
                found = self._replace_table(version, table, None) or found
        return found

    def has_rules(self) -> bool:
        """Whether any of our chains or jumps is there."""
        return any(self._read_table(version, table).present for version in (4, 6) for table in TABLES)

    def listing(self) -> str:
        """Our part as ``iptables-save`` prints it, for people; '' where there is none."""
        lines: list[str] = []
        for version in (4, 6):
            for table in TABLES:
                state = self._read_table(version, table)
                if state.present:
                    lines += [f"# {_TOOL[version]} ({self.flavour})", f"*{table}", *state.jumps, *state.rules]
        for name, entries in sorted(self._ipset.read().items()):
            lines += [f"# ipset {name}", *(f"{text}  {note}".rstrip() for text, note in sorted(entries.items()))]
        return "\n".join(lines) + "\n" if lines else ""

    def _update(self, name: str, before: dict[str, str], after: dict[str, str]) -> int:
        if name.startswith("isthmus-"):
            return self._ipset.update(name, before, after)
        gone = {text: note for text, note in before.items() if after.get(text) != note}
        new = {text: note for text, note in after.items() if before.get(text) != note}
        if gone or new:
            table, version = name[:-1], int(name[-1])
            chains = self._read_table(version, table).chains
            lines = [f"-D {chain} {exception_rule(*item)}" for chain in chains for item in gone.items()]
            lines += [f"-I {chain} 1 {exception_rule(*item)}" for chain in chains for item in new.items()]
            self._restore(version, table, lines)
        return len(gone.keys() | new.keys())

    def _replace_table(self, version: int, table: str, wanted: TableRules | None) -> bool:
        """True where something of ours was there before."""
        state = self._read_table(version, table)
        if wanted is None and not state.present:
            return False
        chains = wanted.chains if wanted is not None else {}
        # Naming a chain empties it if it is there, and makes it if it is not.
        lines = [f":{name} - [0:0]" for name in (*chains, *(name for name in state.chains if name not in chains))]
        lines += [line.replace("-A", "-D", 1) for line in state.jumps]
        lines += [f"-A {name} {rule}" for name, rules in chains.items() for rule in rules]
        jumps = wanted.jumps if wanted is not None else {}
        lines += [f'-I {hook} 1 -m comment --comment "{ROOT_COMMENT}" -j {chain}' for hook, chain in jumps.items()]
        lines += [f"-X {name}" for name in state.chains if name not in chains]
        self._restore(version, table, lines)
        return state.present

    def _read_table(self, version: int, table: str) -> TableState:
        if self.flavour == "legacy" and not _legacy_table_exists(version, table):
            return TableState()  # asking iptables-save would make it
        try:
            return parse_save(run([self._tool(version, "save"), "-t", table]))
        except NotSupported:
            return TableState()

    def _restore(self, version: int, table: str, lines: list[str]) -> None:
        command = [self._tool(version, "restore"), "--noflush", "-w", str(LOCK_WAIT_S)]
        run(command, "\n".join([f"*{table}", *lines, "COMMIT"]) + "\n")

    def _tool(self, version: int, verb: str) -> str:
        return tool(_TOOL[version], self.flavour, verb)


def tool(name: str, flavour: str, verb: str) -> str:
    """``iptables-legacy-restore`` and the like; on systems without flavours, ``iptables-restore``."""
    full = f"{name}-{flavour}-{verb}"
    return full if shutil.which(full) or flavour == "nft" else f"{name}-{verb}"


def parse_save(text: str) -> TableState:
    """Our part of what ``iptables-save -t TABLE`` prints."""
    chains: list[str] = []
    rules: list[str] = []
    jumps: list[str] = []
    seen: set[str] = set()
    jumps_first = True
    for line in text.splitlines():
        name = line[1:].split(" ", 1)[0] if line.startswith(":") else ""
        if name in CHAINS:
            chains.append(name)
        elif any(line.startswith(f"-A {chain} ") for chain in CHAINS):
            rules.append(line)
        elif line.startswith("-A "):
            hook = line.split(" ", 2)[1]
            if _JUMP.match(line):
                jumps.append(line)
                jumps_first = jumps_first and hook not in seen
            seen.add(hook)
    return TableState(tuple(sorted(chains)), tuple(rules), tuple(sorted(jumps)), jumps_first)


def split_exceptions(rules: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Rules without those that return one address, and these as address to comment."""
    kept: list[str] = []
    found: dict[str, str] = {}
    for rule in rules:
        match = _EXCEPTION.match(rule)
        if match is None:
            kept.append(rule)
        else:
            found[match[1]] = match[2]
    return tuple(kept), found


def choose_flavour(flavours: tuple[str, ...], read_nat: Callable[[str], str]) -> str:
    """Out of the flavours that work here: the one whose NAT table others use, kube-proxy before all, else the first.

    Both flavours hook in at the same priority, and then the one that came last goes first: only in the same table as
    kube-proxy's jumps can ours be sure to stand before them. ``read_nat(flavour)`` is what iptables-save prints.
    """
    if not flavours:
        raise NotSupported("choosing iptables: neither flavour works", hint="install iptables")
    texts = {flavour: read_nat(flavour) for flavour in flavours}
    return max(flavours, key=lambda flavour: _weight(texts[flavour]))


def read_nat(flavour: str) -> str:
    """The IPv4 NAT table of a flavour as text; '' where it has none."""
    if flavour == "legacy" and not _legacy_table_exists(4, "nat"):
        return ""
    try:
        return run([tool("iptables", flavour, "save"), "-t", "nat"])
    except NotSupported:
        return ""


def _weight(text: str) -> tuple[bool, int]:
    foreign = [line for line in text.splitlines() if line.startswith("-A ") and CHAIN not in line]
    return any("KUBE-" in line for line in foreign), len(foreign)


def _legacy_table_exists(version: int, table: str) -> bool:
    try:
        return table in _TABLE_NAMES[version].read_text().split()
    except OSError:
        return False
