"""Chains of others that the kernel calls by itself, from what ``nft -j`` or ``iptables-save`` lists. Pure."""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from isthmus.explain.check import Hooked
from isthmus.kernel.nft_rules import PRIORITY_NAT, TABLE
from isthmus.plan.interception import CHAIN

Json = dict[str, Any]
Place = tuple[str, str]

# What an nftables table made by iptables is called at its standard priorities; iptables has no numbers of its own.
_IPTABLES_HOOKS = {"PREROUTING": "prerouting", "INPUT": "input", "OUTPUT": "output"}
_KINDS = {"nat": "nat", "filter": "filter"}


def from_nft(listing: str) -> tuple[Hooked, ...]:
    """The hooked chains of ``nft -j list ruleset``, ours left out. Raises ValueError where it is no such listing."""
    try:
        return _from_nft(json.loads(listing)["nftables"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a listing of nft: {error}") from error


def _from_nft(items: list[Json]) -> tuple[Hooked, ...]:
    chains = [item["chain"] for item in items if "chain" in item]
    rules: dict[Place, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if "rule" in item:
            rule = item["rule"]
            rules[rule["family"], rule["table"]][rule["chain"]].append(json.dumps(rule["expr"]))
    found = (_nft_chain(chain, rules[chain["family"], chain["table"]]) for chain in chains if "hook" in chain)
    return tuple(chain for chain in found if f" {TABLE} " not in chain.name)


def _nft_chain(chain: Json, rules: dict[str, list[str]]) -> Hooked:
    return Hooked(
        name=f"{chain['family']} {chain['table']} {chain['name']}",
        kind=chain["type"],
        hook=chain["hook"],
        priority=int(chain["prio"]),
        drops=chain.get("policy") == "drop",
        text="\n".join(rules.get(chain["name"], ())),
        # A firewall mostly jumps on from its hooked chain, so what it names stands anywhere in its table.
        table_text="\n".join(line for lines in rules.values() for line in lines),
    )


def from_iptables(saved: str) -> tuple[Hooked, ...]:
    """The built-in chains of ``iptables-save``. Rules that stand before our jump count as before ours."""
    found: list[Hooked] = []
    for table, lines in _tables(saved):
        for name, policy in _policies(lines):
            if name in _IPTABLES_HOOKS and table in _KINDS:
                found += _iptables_chain(table, name, policy, lines)
    return tuple(found)


def _tables(saved: str) -> Iterator[tuple[str, list[str]]]:
    table, lines = "", list[str]()
    for line in saved.splitlines():
        if line.startswith("*"):
            table, lines = line[1:].strip(), []
        elif line.strip() == "COMMIT":
            yield table, lines
        else:
            lines.append(line)


def _policies(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        words = line.split()
        if line.startswith(":") and len(words) >= 2:
            yield words[0][1:], words[1]


def _iptables_chain(table: str, name: str, policy: str, lines: list[str]) -> Iterator[Hooked]:
    rules = [line for line in lines if line.startswith(f"-A {name} ")]
    ours = next((at for at, line in enumerate(rules) if _jumps_to_us(line)), 0)
    text = "\n".join(lines)
    where = f"iptables {table} {name}"
    hook, kind, drops = _IPTABLES_HOOKS[name], _KINDS[table], policy == "DROP"
    if rules[:ours]:
        yield Hooked(where, kind, hook, PRIORITY_NAT, False, "\n".join(rules[:ours]), text)
    rest = [line for line in rules[ours:] if not _jumps_to_us(line)]
    if rest or drops:
        yield Hooked(where, kind, hook, PRIORITY_NAT + 1, drops, "\n".join(rest), text)


def _jumps_to_us(line: str) -> bool:
    try:
        words = shlex.split(line)
    except ValueError:
        return False
    return any(word in ("-j", "--jump", "-g") and target == CHAIN for word, target in pairwise(words))
