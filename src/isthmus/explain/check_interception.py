"""Interception: everything that the plan asks for is in the kernel, and the address is on a device of this node."""

from isthmus.explain.check import Check, Examined, Finding, State, not_checked, ok
from isthmus.explain.words import count_text, join_text

REPAIRS_ADVICE = "another program removes our rules: find it; they are put back, with gaps in between"
SHOWN = 10


def _run(node: Examined) -> Finding:
    if node.status is None:
        return not_checked("the agent's status is not known")
    interception = node.status.interception
    if not interception.applied:
        text = interception.error or "the rules have not been applied yet"
        return Finding(State.ERROR, text, "see the agent's log; `isthmus dump rules` says what is there")
    wanted = {address for address in (interception.address_v4, interception.address_v6) if address}
    here = node.local_addresses()
    if here is not None and (absent := sorted(wanted - here)):
        return Finding(
            State.ERROR,
            f"no device of this node has {join_text(absent)}",
            f"the device {interception.device} is put back at the next comparison with the kernel",
        )
    rules = node.rules()
    if rules is None:
        return not_checked("the kernel's rules could not be read")
    missing = [f"{row.name}: {row.match} {row.action}" for row in rules if not row.present]
    if missing or not rules:
        text = (
            f"{count_text(len(missing), 'rule')} missing in the kernel"
            if missing
            else "nothing of ours is in the kernel"
        )
        return Finding(
            State.ERROR, text, "they are put back at the next comparison with the kernel", tuple(missing[:SHOWN])
        )
    text = f"{interception.backend}, {count_text(len(rules), 'rule and element', 'rules and elements')}"
    if interception.repairs:
        return Finding(State.WARNING, f"{text}, repaired {count_text(interception.repairs, 'time')}", REPAIRS_ADVICE)
    return ok(text)


CHECK = Check("interception", "rules in the kernel", _run, ("agent",))
