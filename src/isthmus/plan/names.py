"""Which records a name has, and why: the Kubernetes DNS-based service discovery, version 1.1.0.

Pure: service plans in, verdicts out. ``Names`` is the index that the DNS worker and ``isthmus trace`` both ask. A
change of one service costs the same however many services there are: a service's own records are made when its name is
first asked for, and forgotten when it changes.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import msgspec

from isthmus.plan.serving import Member, PortPlan, ServiceKind, ServicePlan
from isthmus.plan.verdict import Because, Verdict

SPECIFICATION = "1.1.0"
NEGATIVE_TTL_S = 5  # a service made a moment after it was asked for must not stay unknown for long
MAX_CHAIN = 8  # ExternalName services that point at each other
HEXADECIMAL = frozenset("0123456789abcdef")

Labels = tuple[str, ...]


class RecordType(IntEnum):
    """Types that the cluster's names have (RFC 1035, 2782, 3596)."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    HINFO = 13
    TXT = 16
    AAAA = 28
    SRV = 33


class Resolution(StrEnum):
    """What is done with a question."""

    ANSWER = "answer"
    NODATA = "nodata"
    NXDOMAIN = "nxdomain"
    FORWARD = "forward"


class Record(msgspec.Struct, frozen=True):
    """One record; ``name`` without the final dot, ``data`` in presentation form, names in it with the final dot."""

    name: str
    type: RecordType
    data: str
    ttl_s: int

    def __str__(self) -> str:
        return f"{self.name}. {self.ttl_s} IN {self.type.name} {self.data}"


class NameAnswer(msgspec.Struct, frozen=True):
    """What is answered. ``authority`` holds the SOA of a negative answer.

    ``follow`` is a name outside the domain that an ExternalName service points at; its records are asked of the
    upstreams. ``scopes`` is what the answer depends on: it holds until ``put`` or ``drop`` returns one of them.
    """

    resolution: Resolution
    records: tuple[Record, ...] = ()
    authority: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()
    follow: str = ""
    scopes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(str(record) for record in self.records) or self.resolution.value


NameVerdict = Verdict[NameAnswer]
RecordSets = dict[int, list[Record]]
ServiceZone = dict[Labels, RecordSets]


class Names:
    """Every name of the cluster, as one node answers it."""

    def __init__(
        self,
        domain: str,
        *,
        ttl_s: int = 30,
        own_addresses: Iterable[str] = (),
        local_networks: Iterable[str] = (),
    ) -> None:
        """``own_addresses`` are the server's; ``local_networks`` the ranges whose reverse names are never forwarded."""
        self.domain = domain.strip(".").lower()
        self._ttl_s = ttl_s
        self._suffix = tuple(self.domain.split("."))
        self._own = tuple(own_addresses)
        self._networks = tuple(ip_network(text, strict=False) for text in local_networks)
        self._plans: dict[tuple[str, str], ServicePlan] = {}
        self._zones: dict[tuple[str, str], ServiceZone] = {}
        self._namespaces: dict[str, int] = {}
        self._reverse: dict[str, dict[str, tuple[str, ...]]] = {}
        self._soa = (self._record(self.domain, RecordType.SOA, self._soa_data(), min(ttl_s, NEGATIVE_TTL_S)),)

    def __len__(self) -> int:
        return len(self._plans)

    def put(self, plan: ServicePlan) -> set[str]:
        """A service is new or changed. Returns the scopes whose answers may have changed."""
        key = (plan.namespace, plan.name)
        before = self._plans.get(key)
        if before is not None and _visible(before) == _visible(plan):
            self._plans[key] = plan
            return set()
        scopes = self.drop(*key) if before is not None else set()
        self._plans[key] = plan
        self._namespaces[plan.namespace] = self._namespaces.get(plan.namespace, 0) + 1
        if self._namespaces[plan.namespace] == 1:
            scopes.add(f"{plan.namespace}/")
        for address, target in self._pointers(plan):
            holders = self._reverse.setdefault(address, {})
            holders[plan.full_name] = (*holders.get(plan.full_name, ()), target)
            scopes.add(f"ptr/{address}")
        scopes.add(plan.full_name)
        return scopes

    def drop(self, namespace: str, name: str) -> set[str]:
        """A service is gone. Returns the scopes whose answers may have changed; unknown services change nothing."""
        plan = self._plans.pop((namespace, name), None)
        if plan is None:
            return set()
        self._zones.pop((namespace, name), None)
        scopes = {plan.full_name}
        self._namespaces[namespace] -= 1
        if not self._namespaces[namespace]:
            del self._namespaces[namespace]
            scopes.add(f"{namespace}/")
        for address, _ in self._pointers(plan):
            holders = self._reverse.get(address, {})
            holders.pop(plan.full_name, None)
            if not holders:
                self._reverse.pop(address, None)
            scopes.add(f"ptr/{address}")
        return scopes

    def lookup(self, name: str, rtype: int) -> NameVerdict:
        """Decide what is answered for ``name`` (with or without the final dot, any case) and a record type."""
        return self.lookup_labels(tuple(name.removesuffix(".").lower().split(".")), rtype)

    def lookup_labels(self, labels: Labels, rtype: int) -> NameVerdict:
        """Like ``lookup``, for lower-case labels as they stand in a message; a label may hold any character."""
        cut = len(labels) - len(self._suffix)
        if cut >= 0 and labels[cut:] == self._suffix:
            return self._in_domain(labels[:cut], rtype)
        if labels[-1] == "arpa":
            return self._backwards(labels, rtype)
        return _forward("the name is not in the domain", f"dns.domain={self.domain}")

    def is_local(self, labels: Labels) -> bool:
        """Whether the name lies in the cluster's domain, and so must never leave this node."""
        return labels[-len(self._suffix) :] == self._suffix

    def _in_domain(self, below: Labels, rtype: int) -> NameVerdict:
        if not below:
            return self._apex(rtype)
        kind = below[-1]
        if kind == "svc":
            return self._service(below[:-1], rtype)
        if kind == "pod":
            return self._pod(below[:-1], rtype)
        if below == ("dns-version",):
            record = self._record(f"dns-version.{self.domain}", RecordType.TXT, f'"{SPECIFICATION}"')
            return self._from_sets({RecordType.TXT: [record]}, rtype, "dns-version", Because("the specification"), ())
        if below == ("ns", "dns"):
            return self._from_sets(self._name_server(), rtype, "name-server", Because("this server's own name"), ())
        if below == ("dns",):
            return self._nodata("empty-non-terminal", Because("only names below it have records"), ())
        return self._nxdomain("no-such-name", Because(f"{kind}.{self.domain} is neither svc nor pod"), ())

    def _apex(self, rtype: int) -> NameVerdict:
        sets: RecordSets = {
            RecordType.SOA: [self._record(self.domain, RecordType.SOA, self._soa_data())],
            RecordType.NS: [self._record(self.domain, RecordType.NS, f"ns.dns.{self.domain}.")],
        }
        return self._from_sets(sets, rtype, "apex", Because("the domain itself", setting="dns.domain"), ())

    def _name_server(self) -> RecordSets:
        return _grouped(self._address(f"ns.dns.{self.domain}", address) for address in self._own)

    def _service(self, below: Labels, rtype: int, depth: int = 0) -> NameVerdict:
        if not below:
            return self._nodata("empty-non-terminal", Because("only names below it have records"), ())
        namespace = below[-1]
        scope = f"{namespace}/{below[-2]}" if len(below) > 1 else f"{namespace}/"
        if namespace not in self._namespaces:
            return self._nxdomain("no-such-namespace", Because(f"no service is in namespace {namespace}"), (scope,))
        if len(below) == 1:
            return self._nodata("empty-non-terminal", Because(f"namespace {namespace} has services"), (scope,))
        plan = self._plans.get((namespace, below[-2]))
        if plan is None:
            return self._nxdomain("no-such-service", Because(f"there is no service {scope}"), (scope,))
        if plan.kind is ServiceKind.EXTERNAL_NAME:
            return self._external(plan, below[:-2], rtype, depth)
        return self._in_service(plan, below[:-2], rtype)

    def _in_service(self, plan: ServicePlan, inner: Labels, rtype: int) -> NameVerdict:
        scopes = (plan.full_name,)
        sets = self._zone(plan).get(inner)
        where = _object(plan)
        if sets is None:
            rule = "no-such-port" if inner[0].startswith("_") else "no-such-member"
            because = Because(f"service {plan.full_name} has no {'.'.join(inner)}", where)
            return self._nxdomain(rule, because, scopes)
        if not inner:
            rule = plan.kind.value if rtype != RecordType.SRV else "service-port"
        else:
            rule = "service-port" if inner[-1].startswith("_") else "member"
        because = Because(f"service {plan.full_name} ({plan.origin or 'origin unknown'})", where)
        return self._from_sets(sets, rtype, rule, because, scopes)

    def _zone(self, plan: ServicePlan) -> ServiceZone:
        key = (plan.namespace, plan.name)
        zone = self._zones.get(key)
        if zone is None:
            zone = self._zones[key] = _zone_of(plan, self._service_name(plan), self._ttl_s)
        return zone

    def _external(self, plan: ServicePlan, inner: Labels, rtype: int, depth: int) -> NameVerdict:
        scopes = (plan.full_name,)
        because = Because(f"service {plan.full_name} is of type ExternalName", _object(plan))
        if inner:
            return self._nxdomain("no-such-member", because, scopes)
        target = plan.external_name.removesuffix(".").lower()
        alias = (self._record(self._service_name(plan), RecordType.CNAME, f"{target}."),)
        labels = tuple(target.split("."))
        if rtype == RecordType.CNAME or depth >= MAX_CHAIN:
            return Verdict(NameAnswer(Resolution.ANSWER, alias, scopes=scopes), "external-name", because)
        if not self.is_local(labels):
            answer = NameAnswer(Resolution.ANSWER, alias, follow=target, scopes=scopes)
            return Verdict(answer, "external-name", because)
        inside = labels[: -len(self._suffix)]
        if inside[-1:] == ("svc",):
            end = self._service(inside[:-1], rtype, depth + 1).action
        else:
            end = self._in_domain(inside, rtype).action
        answer = msgspec.structs.replace(end, records=alias + end.records, scopes=scopes + end.scopes)
        return Verdict(answer, "external-name", because)

    def _pod(self, below: Labels, rtype: int) -> NameVerdict:
        if len(below) <= 1:
            return self._nodata("empty-non-terminal", Because("only names below it have records"), ())
        address = _undashed(below[0]) if len(below) == 2 else None
        if address is None:
            because = Because(f"{below[0]} is not an address with dashes, as in 10-1-2-3.NAMESPACE.pod")
            return self._nxdomain("no-such-pod", because, ())
        owner = ".".join((*below, "pod", self.domain))
        because = Because(f"the name itself holds the address {address}")
        return self._from_sets(_grouped([self._address(owner, address)]), rtype, "pod-address", because, ())

    def _backwards(self, labels: Labels, rtype: int) -> NameVerdict:
        address = _address_of_reverse(labels)
        if address is None:
            return _forward("the name is not in the domain", f"dns.domain={self.domain}")
        text, scopes = str(address), (f"ptr/{address}",)
        holders = self._reverse.get(text)
        if holders:
            owner = ".".join(labels)
            targets = sorted({target for targets in holders.values() for target in targets})
            records = [self._record(owner, RecordType.PTR, target) for target in targets]
            because = Because(f"{text} belongs to {', '.join(sorted(holders))}", f"Service {min(holders)}")
            return self._from_sets({RecordType.PTR: records}, rtype, "reverse", because, scopes)
        for network in self._networks:
            if address in network:
                because = Because(f"no service has {text}, which lies in {network}", setting="intercept.service-cidrs")
                return self._nxdomain("no-such-address", because, scopes)
        return _forward(f"{text} is no address of a service", "intercept.service-cidrs", scopes)

    def _from_sets(
        self, sets: RecordSets, rtype: int, rule: str, because: Because, scopes: tuple[str, ...]
    ) -> NameVerdict:
        records = sets.get(rtype)
        if not records:
            return self._nodata("no-such-type", because, scopes)
        extra = self._targets(records) if rtype == RecordType.SRV else ()
        return Verdict(NameAnswer(Resolution.ANSWER, tuple(records), additional=extra, scopes=scopes), rule, because)

    def _targets(self, records: list[Record]) -> tuple[Record, ...]:
        """The addresses of SRV targets, which always lie in the same service."""
        seen: dict[str, None] = dict.fromkeys(record.data.rsplit(" ", 1)[1].removesuffix(".") for record in records)
        extra: list[Record] = []
        for target in seen:
            for rtype in (RecordType.A, RecordType.AAAA):
                extra += self.lookup(target, rtype).action.records
        return tuple(extra)

    def _pointers(self, plan: ServicePlan) -> Iterator[tuple[str, str]]:
        name = self._service_name(plan)
        for address in plan.cluster_ips:
            yield address, f"{name}."
        if plan.kind is ServiceKind.HEADLESS:
            for member in _published(plan):
                yield member.visible_address, f"{_member_label(member)}.{name}."

    def _service_name(self, plan: ServicePlan) -> str:
        return f"{plan.name}.{plan.namespace}.svc.{self.domain}"

    def _address(self, owner: str, address: str) -> Record:
        return _address_record(owner, address, self._ttl_s)

    def _record(self, owner: str, rtype: RecordType, data: str, ttl_s: int | None = None) -> Record:
        return Record(owner, rtype, data, self._ttl_s if ttl_s is None else ttl_s)

    def _soa_data(self) -> str:
        negative = min(self._ttl_s, NEGATIVE_TTL_S)
        return f"ns.dns.{self.domain}. hostmaster.{self.domain}. 1 7200 1800 86400 {negative}"

    def _nodata(self, rule: str, because: Because, scopes: tuple[str, ...]) -> NameVerdict:
        return Verdict(NameAnswer(Resolution.NODATA, authority=self._soa, scopes=scopes), rule, because)

    def _nxdomain(self, rule: str, because: Because, scopes: tuple[str, ...]) -> NameVerdict:
        return Verdict(NameAnswer(Resolution.NXDOMAIN, authority=self._soa, scopes=scopes), rule, because)


def _forward(text: str, setting: str, scopes: tuple[str, ...] = ()) -> NameVerdict:
    return Verdict(NameAnswer(Resolution.FORWARD, scopes=scopes), "not-ours", Because(text, setting=setting))


def _object(plan: ServicePlan) -> str:
    return f"Service {plan.full_name}"


def _visible(plan: ServicePlan) -> tuple[object, ...]:
    """All that DNS shows of a service: endpoints of a cluster address may change without touching an answer."""
    shown = tuple(_published(plan)) if plan.kind is ServiceKind.HEADLESS else ()
    return plan.kind, plan.cluster_ips, plan.external_name, plan.ports, shown, plan.origin


def _published(plan: ServicePlan) -> Iterator[Member]:
    """Members with an address that this node can reach, ready ones unless the service asks for all."""
    for member in plan.members:
        if member.visible_address and (member.ready or plan.publish_not_ready):
            yield member


def _member_label(member: Member) -> str:
    return member.hostname.lower() or member.visible_address.replace(".", "-").replace(":", "-")


def _address_record(owner: str, address: str, ttl_s: int) -> Record:
    return Record(owner, RecordType.AAAA if ":" in address else RecordType.A, address, ttl_s)


def _grouped(records: Iterable[Record]) -> RecordSets:
    sets: RecordSets = {}
    for record in records:
        known = sets.setdefault(record.type, [])
        if record not in known[-1:]:
            known.append(record)
    return sets


def _zone_of(plan: ServicePlan, name: str, ttl_s: int) -> ServiceZone:
    """All records of a service, by the labels before its name; a name that only has names below it maps to nothing."""
    headless = plan.kind is ServiceKind.HEADLESS
    members = list(_published(plan)) if headless else []
    addresses = [member.visible_address for member in members] if headless else list(plan.cluster_ips)
    zone: ServiceZone = {(): _grouped(_address_record(name, address, ttl_s) for address in dict.fromkeys(addresses))}
    for label, own in _by_label(members).items():
        zone[(label,)] = _grouped(_address_record(f"{label}.{name}", address, ttl_s) for address in own)
    everything: dict[str, None] = {}
    for port in plan.ports:
        targets = _srv_data(plan, members, port, name)
        everything |= dict.fromkeys(targets)
        if port.name and targets:
            protocol = f"_{port.protocol.lower()}"
            inner = (f"_{port.name.lower()}", protocol)
            owner = f"{inner[0]}.{protocol}.{name}"
            zone.setdefault((protocol,), {})
            zone[inner] = {RecordType.SRV: [Record(owner, RecordType.SRV, data, ttl_s) for data in targets]}
    if everything:
        zone[()][RecordType.SRV] = [Record(name, RecordType.SRV, data, ttl_s) for data in everything]
    return zone


def _by_label(members: list[Member]) -> dict[str, dict[str, None]]:
    labels: dict[str, dict[str, None]] = {}
    for member in members:
        labels.setdefault(_member_label(member), {})[member.visible_address] = None
    return labels


def _srv_data(plan: ServicePlan, members: list[Member], port: PortPlan, name: str) -> list[str]:
    """``priority weight port target`` of one port: the service itself, or each member of a headless service."""
    if plan.kind is ServiceKind.CLUSTER_IP:
        return [f"0 100 {port.port} {name}."]
    ends = {(member.ports[port.name], _member_label(member)): None for member in members if port.name in member.ports}
    weight = max(1, 100 // len(ends)) if ends else 0
    return [f"0 {weight} {number} {label}.{name}." for number, label in ends]


def _undashed(label: str) -> str | None:
    """The address in ``10-1-2-3`` or ``fd00--7``, canonical; None where there is none."""
    if not HEXADECIMAL.issuperset(label.replace("-", "")):
        return None
    for separator in (".", ":"):
        try:
            return str(ip_address(label.replace("-", separator)))
        except ValueError:
            continue
    return None


def _address_of_reverse(labels: Labels) -> IPv4Address | IPv6Address | None:
    """The address of a full reverse name (RFC 1035 3.5, RFC 3596 2.5); None for others."""
    digits = labels[-3::-1]
    try:
        if labels[-2:] == ("in-addr", "arpa") and len(digits) == 4:
            return IPv4Address(".".join(digits))
        if labels[-2:] == ("ip6", "arpa") and len(digits) == 32 and HEXADECIMAL.issuperset(digits):
            return IPv6Address(int("".join(digits), 16))
    except ValueError:
        pass
    return None
