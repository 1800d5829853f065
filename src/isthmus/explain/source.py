"""Who connects: from what the user typed as POD to an address and a namespace."""

from isthmus.explain.hop import Source
from isthmus.model.cluster import Pod
from isthmus.model.errors import UsageError
from isthmus.plan.queries import canonical
from isthmus.wire.local import Facts

HOST_NAMES = ("host", "node")


def find_source(text: str, facts: Facts) -> Source:
    """The pod or node that ``text`` names: ``host``, ``node``, this node's name, NAME, NAMESPACE/NAME or an address.

    Raises UsageError where it names nothing, several pods, or a pod of another node.
    """
    if text in HOST_NAMES or text == facts.me.node:
        return Source(f"node {facts.me.node}", facts.me.node, facts.settings.addresses)
    address = canonical(text)
    if address is not None:
        return _by_address(address, facts)
    return _by_name(text, facts)


def _by_address(address: str, facts: Facts) -> Source:
    if address in facts.settings.addresses:
        return Source(f"node {facts.me.node}", facts.me.node, facts.settings.addresses)
    here = [pod for pod in facts.pods if address in pod.ips and pod.node in ("", facts.me.node)]
    if here:
        return _of(here[0], facts)
    # Not every user keeps Pod objects in the store; an address alone is enough to follow a connection.
    return Source(f"address {address}", facts.me.node, (address,), "default")


def _by_name(text: str, facts: Facts) -> Source:
    namespace, slash, name = text.rpartition("/")
    found = [pod for pod in facts.pods if pod.name == name and (not slash or pod.namespace == namespace)]
    here = [pod for pod in found if pod.node in ("", facts.me.node)]
    if len(here) == 1:
        return _of(here[0], facts)
    if here:
        names = ", ".join(sorted(f"{pod.namespace}/{pod.name}" for pod in here))
        raise UsageError(f"“{text}” names several pods", hint=f"say which: {names}")
    if found:
        raise UsageError(
            f"the pod {found[0].namespace}/{found[0].name} is on node {found[0].node}, this is {facts.me.node}",
            hint=f"run `isthmus trace` on {found[0].node}",
        )
    raise UsageError(f"no pod “{text}” on node {facts.me.node}", hint=_known(facts))


def _known(facts: Facts) -> str:
    names = sorted(f"{pod.namespace}/{pod.name}" for pod in facts.pods if pod.node in ("", facts.me.node))
    if not names:
        return "the store has no Pod of this node: give the pod's address, or “host” for the node itself"
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"known here: {shown}; an address or “host” will do as well"


def _of(pod: Pod, facts: Facts) -> Source:
    addresses = facts.settings.addresses if pod.host_network else pod.ips
    return Source(f"pod {pod.namespace}/{pod.name}", facts.me.node, addresses, pod.namespace)
