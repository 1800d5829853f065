"""Kernel settings: those that the agent changed are still as it set them."""

import re

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import count_text

# As kernel/sysctls.py words a change: "sysctl net/ipv4/tcp_tw_reuse: 2 -> 1".
CHANGE = re.compile(r"(?:sysctl )?(?P<name>[\w./-]+): (?P<before>.*) -> (?P<ours>.*)")


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    changes = node.status.interception.sysctls
    differing = [text for change in changes if (text := _difference(node, change))]
    if differing:
        text = f"{count_text(len(differing), 'setting')} changed again since the agent set it"
        advice = "find out who sets it (files in /etc/sysctl.d, another agent); `isthmus agent` needs what it set"
        return Finding(State.WARNING, text, advice, tuple(differing))
    return ok("changed by the agent, put back by uninstall", *changes) if changes else ok("none had to be changed")


def _difference(node: Examined, change: str) -> str:
    """How the setting differs from what the agent set, '' where it does not or cannot be read."""
    match = CHANGE.fullmatch(change)
    now = node.sysctl(match["name"]) if match else None
    if match is None or now is None or now == match["ours"]:
        return ""
    return f"{match['name']} is {now}, the agent set {match['ours']}"


CHECK = Check("sysctls", "kernel settings", _run, ("agent",))
