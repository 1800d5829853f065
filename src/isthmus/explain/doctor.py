"""``isthmus doctor``: runs the checks in an order in which a root cause hides its consequences."""

from collections.abc import Iterable, Sequence

import msgspec

from isthmus.explain import (
    check_agent,
    check_certificate,
    check_clock,
    check_conntrack,
    check_descriptors,
    check_dns,
    check_firewall,
    check_interception,
    check_original_destination,
    check_peers,
    check_relays,
    check_store,
    check_sysctls,
    check_upstreams,
    check_workers,
)
from isthmus.explain.check import Check, Examined, State
from isthmus.explain.words import count_text, join_text

CHECKS: tuple[Check, ...] = (
    check_agent.CHECK,
    check_workers.CHECK,
    check_store.CHECK,
    check_interception.CHECK,
    check_original_destination.CHECK,
    check_firewall.CHECK,
    check_dns.CHECK,
    check_upstreams.CHECK,
    check_clock.CHECK,
    check_certificate.CHECK,
    check_relays.CHECK,
    check_peers.CHECK,
    check_descriptors.CHECK,
    check_conntrack.CHECK,
    check_sysctls.CHECK,
)


class Result(msgspec.Struct, frozen=True):
    """How one check came out. ``hidden_by`` names the check whose failure explains why this one was not made."""

    code: str
    title: str
    state: State
    text: str
    advice: str = ""
    details: tuple[str, ...] = ()
    hidden_by: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """``isthmus doctor -o json``. ``healthy`` is false with any error, and decides the exit code."""

    healthy: bool
    conclusion: str
    results: tuple[Result, ...]


def diagnose(node: Examined, checks: Sequence[Check] = CHECKS) -> Diagnosis:
    """Make every check whose preconditions hold."""
    results: dict[str, Result] = {}
    for check in checks:
        cause = _cause(check, results)
        results[check.code] = _run(check, node) if cause is None else _hidden(check, cause)
    found = tuple(results.values())
    return Diagnosis(not _having(found, State.ERROR), _conclusion(found), found)


def _cause(check: Check, results: dict[str, Result]) -> Result | None:
    """The root of what ``check`` depends on, if that failed."""
    for code in check.depends_on:
        result = results[code]
        if result.state is State.ERROR:
            return result
        if result.hidden_by:
            return results[result.hidden_by]
    return None


def _run(check: Check, node: Examined) -> Result:
    finding = check.run(node)
    return Result(check.code, check.title, finding.state, finding.text, finding.advice, finding.details)


def _hidden(check: Check, cause: Result) -> Result:
    text = f"follows from “{cause.title}”"
    return Result(check.code, check.title, State.NOT_CHECKED, text, hidden_by=cause.code)


def _having(results: Iterable[Result], state: State) -> list[Result]:
    return [result for result in results if result.state is state]


def _conclusion(results: Sequence[Result]) -> str:
    errors, warnings = _having(results, State.ERROR), _having(results, State.WARNING)
    skipped = len(_having(results, State.NOT_CHECKED))
    parts = [count_text(len(errors), "error"), count_text(len(warnings), "warning")]
    found = join_text([text for text, some in zip(parts, (errors, warnings), strict=True) if some]) or "nothing wrong"
    made = f"in {count_text(len(results) - skipped, 'check')}"
    return f"{found} {made}" + (f", {skipped} not made" if skipped else "")
