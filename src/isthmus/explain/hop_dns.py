"""The name: which of the names on the search path exists, and what this node's DNS server answers for it."""

from collections.abc import Iterable
from ipaddress import ip_address

import msgspec

from isthmus.explain.hop import Flow, Held, Report, Step, Witness, place_of
from isthmus.explain.words import join_text
from isthmus.plan.names import Names, NameVerdict, RecordType, Resolution
from isthmus.plan.queries import canonical
from isthmus.wire.local import Facts

HOP = "dns"
NDOTS = 5  # what the kubelet writes into a pod's resolv.conf
ADDRESS_TYPES = (RecordType.A, RecordType.AAAA)


class Answered(msgspec.Struct, frozen=True):
    """What one name of the search path is answered, by record type, and the addresses in it."""

    name: str
    verdicts: dict[str, NameVerdict]
    addresses: tuple[str, ...]

    @property
    def resolution(self) -> Resolution:
        """The better of the two answers: NODATA of one family does not hide the other."""
        found = [verdict.action.resolution for verdict in self.verdicts.values()]
        order = (Resolution.ANSWER, Resolution.FORWARD, Resolution.NODATA, Resolution.NXDOMAIN)
        return min(found, key=order.index)

    @property
    def verdict(self) -> NameVerdict:
        """The verdict that goes with ``resolution``."""
        return next(one for one in self.verdicts.values() if one.action.resolution is self.resolution)


def hop(flow: Flow, facts: Facts, witness: Witness) -> Step:
    """Resolve ``flow.destination`` as a pod's resolver would; an address needs no name and has no hop."""
    address = canonical(flow.destination)
    if address is not None:
        return Step(msgspec.structs.replace(flow, address=address))
    names = names_of(facts)
    tried: list[Answered] = []
    for name in search_path(flow.destination, flow.source.namespace, facts.settings.dns.domain):
        answered = _ask(names, name, witness)
        tried.append(answered)
        if answered.addresses or answered.resolution is Resolution.ANSWER:
            break
    return _step(flow, facts, witness, tried)


def search_path(name: str, namespace: str, domain: str) -> list[str]:
    """The full names a resolver tries, in order: ``ndots:5``, search NAMESPACE.svc.DOMAIN, svc.DOMAIN and DOMAIN.

    A final dot, or a source without a namespace (the node itself), leaves the name alone.
    """
    if name.endswith(".") or not namespace:
        return [name.removesuffix(".")]
    searched = [f"{name}.{suffix}" for suffix in (f"{namespace}.svc.{domain}", f"svc.{domain}", domain)]
    return [name, *searched] if name.count(".") >= NDOTS else [*searched, name]


def names_of(facts: Facts) -> Names:
    """The same index that the DNS worker answers from, over the services of the question."""
    settings = facts.settings
    names = Names(
        settings.dns.domain,
        ttl_s=settings.dns.ttl_s,
        own_addresses=[a for a in (facts.interception.address_v4, facts.interception.address_v6) if a],
        local_networks=(*settings.intercept.service_cidrs, *settings.virtual_cidrs),
    )
    for plan in facts.services:
        names.put(plan)
    return names


def _ask(names: Names, name: str, witness: Witness) -> Answered:
    verdicts = {rtype.name: names.lookup(name, rtype) for rtype in ADDRESS_TYPES}
    addresses: list[str] = []
    for rtype in ADDRESS_TYPES:
        answer = verdicts[rtype.name].action
        addresses += [record.data for record in answer.records if record.type is rtype]
        if answer.resolution is Resolution.FORWARD or answer.follow:
            # What the upstreams say cannot be planned; only the server itself knows it.
            addresses += sorted(witness.resolve(name, rtype.name) or ())
    return Answered(name, verdicts, tuple(dict.fromkeys(addresses)))


def _step(flow: Flow, facts: Facts, witness: Witness, tried: list[Answered]) -> Step:
    last = tried[-1]
    chosen, others = choose(last.addresses, flow.source.addresses)
    held, held_text = _held(last, witness)
    because = last.verdict.because
    before = [f"{one.name}: {_said(one)}" for one in tried[:-1]]
    report = Report(
        hop=HOP,
        outcome=f"{last.name} is {chosen}" if chosen else _failure(flow.destination, last),
        rule=last.verdict.rule,
        because=because.text,
        object=because.object,
        place=place_of(facts, because),
        setting=because.setting,
        held=held,
        held_text=held_text,
        alternatives=tuple([f"tried before: {text}" for text in before] + [f"would also do: {one}" for one in others]),
        passes=bool(chosen) and held is not Held.DIFFERS,
    )
    return Step(msgspec.structs.replace(flow, address=chosen), (report,), last=not chosen)


def choose(addresses: Iterable[str], own: Iterable[str]) -> tuple[str, list[str]]:
    """The address a client tries first, and the others: those of a family it has, IPv4 first."""
    families = {ip_address(one).version for one in own}
    ordered = sorted(addresses, key=lambda one: (bool(families) and _version(one) not in families, _version(one)))
    return (ordered[0], ordered[1:]) if ordered else ("", [])


def _version(address: str) -> int:
    return ip_address(address).version


def _said(answered: Answered) -> str:
    text = {
        Resolution.NXDOMAIN: "no such name",
        Resolution.NODATA: "the name exists, without an address",
        Resolution.FORWARD: "asked of the upstreams, without an address",
        Resolution.ANSWER: "an alias without an address",
    }[answered.resolution]
    return f"{text} ({answered.verdict.because.text})"


def _failure(destination: str, last: Answered) -> str:
    kind = {
        Resolution.NXDOMAIN: "does not exist (NXDOMAIN)",
        Resolution.NODATA: "exists and has no address (NODATA)",
        Resolution.FORWARD: "got no address from the upstreams",
        Resolution.ANSWER: "is an alias that leads to no address",
    }[last.resolution]
    return f"{destination} {kind}"


def _held(answered: Answered, witness: Witness) -> tuple[Held, str]:
    """Hold the verdicts against this node's DNS server itself."""
    if answered.resolution is Resolution.FORWARD:
        return Held.NOT_CHECKED, "the upstreams decide"
    differences = []
    for record_type, verdict in answered.verdicts.items():
        said = witness.resolve(answered.name, record_type)
        if said is None:
            return Held.NOT_CHECKED, "this node's DNS server did not answer"
        planned = {record.data for record in verdict.action.records if record.type.name == record_type}
        if said != planned and not verdict.action.follow:
            differences.append(f"{record_type} {join_text(sorted(said)) or 'nothing'}")
    if differences:
        return Held.DIFFERS, f"this node's DNS server answers {join_text(differences)}"
    return Held.OK, "this node's DNS server answers the same"
