"""Which services bear on a question of ``isthmus trace``. Pure.

With ten thousand services the whole table is megabytes; these few give the same verdicts.
"""

from collections.abc import Iterable
from ipaddress import ip_address

from isthmus.plan.names import MAX_CHAIN
from isthmus.plan.serving import ServicePlan


def canonical(text: str) -> str | None:
    """The address ``text`` in canonical form, None where it is no address. Brackets and a zone are dropped."""
    try:
        return str(ip_address(text.strip("[]").partition("%")[0]))
    except ValueError:
        return None


def relevant(plans: Iterable[ServicePlan], destination: str, namespace: str = "") -> tuple[ServicePlan, ...]:
    """The services that decide what ``destination`` (a name, relative or full, or an address) means in ``namespace``.

    A name: services of that name in any namespace, those that ExternalName services among them point at, and one
    service of each namespace it may name, for an empty namespace is answered differently. An address: every service
    that has it as its own, as a member's, or as what a member is seen as.
    """
    plans = tuple(plans)
    address = canonical(destination)
    if address is not None:
        return tuple(plan for plan in plans if address in _addresses(plan))
    found: dict[str, ServicePlan] = {}
    labels = _labels(destination)
    for _ in range(MAX_CHAIN):
        new = [plan for plan in plans if plan.name in labels and plan.full_name not in found]
        if not new:
            break
        found |= {plan.full_name: plan for plan in new}
        labels = frozenset().union(*(_labels(plan.external_name) for plan in new))
    return (*found.values(), *_witnesses(plans, f"{destination}.{namespace}", found))


def _labels(name: str) -> frozenset[str]:
    return frozenset(name.lower().removesuffix(".").split("."))


def _witnesses(plans: Iterable[ServicePlan], destination: str, found: dict[str, ServicePlan]) -> list[ServicePlan]:
    """One service of each namespace named in the question or behind an ExternalName that has none yet."""
    wanted = _labels(destination).union(*(_labels(plan.external_name) for plan in found.values()))
    wanted -= {plan.namespace for plan in found.values()}
    chosen: dict[str, ServicePlan] = {}
    for plan in plans:
        if plan.namespace in wanted:
            chosen.setdefault(plan.namespace, plan)
    return list(chosen.values())


def _addresses(plan: ServicePlan) -> set[str]:
    own = {canonical(address) or address for address in plan.cluster_ips}
    return own.union(*({member.address, member.visible_address} for member in plan.members))
