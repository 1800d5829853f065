"""What of ours the kernel holds, as rows: every rule and exception, and those that are planned and missing."""

import re
from collections.abc import Iterator

from isthmus.kernel.interception import Reading
from isthmus.plan.interception import InterceptionPlan
from isthmus.wire.local import RuleRow

_HOOK = re.compile(r"type (\w+) hook (\w+) priority ([^;]+);")
_COMMENT = re.compile(r'\s*(?:--comment|comment) (?:"([^"]*)"|(\S+))')
_NFT_ACTION = re.compile(r"\b(jump \S+|return|accept|dnat .*|tproxy .*|notrack|meta mark set .*|ct timeout set \S+)$")
_IPTABLES_ACTION = re.compile(r"-j (.*)$")


def rule_rows(reading: Reading, plan: InterceptionPlan | None) -> list[RuleRow]:
    """Rules in the order of their chains, then exceptions by address; what is missing has ``present`` false."""
    rows: list[RuleRow] = []
    for backend, listing in reading.rules.items():
        listing = _with_ranges(listing, reading.elements.get(backend, {}))
        rows += _iptables_rows(backend, listing) if backend.startswith("iptables") else _nft_rows(backend, listing)
    exceptions = _exceptions(reading)
    for address, comment in sorted(exceptions.items()):
        rows.append(RuleRow("exceptions", "", f"ip daddr {address}", "return", comment, True))
    if plan is not None and reading.rules:
        for version in plan.versions():
            for address, comment in sorted(plan.exceptions(version).items()):
                if address not in exceptions:
                    rows.append(RuleRow("exceptions", "", f"ip daddr {address}", "return", comment, False))
    elif plan is not None and plan.versions():
        rows.append(RuleRow("isthmus", "", "", "jump", "isthmus root chain", False))
    return rows


def _with_ranges(listing: str, elements: dict[str, dict[str, str]]) -> str:
    """The listing with the ranges in place of the names of their sets: a reader looks for the range."""
    for name, items in elements.items():
        if name.startswith("ranges") and items:
            listing = listing.replace(f"@{name} ", f"{{ {', '.join(sorted(items))} }} ")
    return listing


def _exceptions(reading: Reading) -> dict[str, str]:
    found: dict[str, str] = {}
    for elements in reading.elements.values():
        for name, items in elements.items():
            if "exceptions" in name:
                found |= items
    return found


def _nft_rows(backend: str, listing: str) -> Iterator[RuleRow]:
    chain, hook = "", ""
    for line in map(str.strip, listing.splitlines()):
        if line.startswith("chain "):
            chain, hook = line.split()[1], ""
        elif line == "}":
            chain = ""
        elif chain and (found := _HOOK.search(line)):
            hook = f"{found.group(2)} {found.group(1)} {found.group(3)}"
        elif chain and line:
            text, comment = _without_comment(line)
            action = _NFT_ACTION.search(text)
            match = text[: action.start()].strip() if action else text
            yield RuleRow(chain, hook or backend, match, action.group(1) if action else "", comment, True)


def _iptables_rows(backend: str, listing: str) -> Iterator[RuleRow]:
    table = ""
    for line in listing.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A "):
            _, chain, *rest = line.split(" ", 2)
            text, comment = _without_comment(rest[0] if rest else "")
            action = _IPTABLES_ACTION.search(text)
            match = text[: action.start()].replace("-m comment", "").strip() if action else text
            yield RuleRow(chain, f"{table} {backend}", match, action.group(1) if action else "", comment, True)


def _without_comment(line: str) -> tuple[str, str]:
    found = _COMMENT.search(line)
    if not found:
        return line, ""
    return (line[: found.start()] + line[found.end() :]).strip(), found.group(1) or found.group(2) or ""
