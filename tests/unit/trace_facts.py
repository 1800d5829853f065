"""A small cluster as the agent of ``edge-1`` reports it: what the tests of trace and doctor ask about."""

from typing import Any

import msgspec
from answering_agent import LINKS, a_status

from isthmus.explain.hop import Witness
from isthmus.model.cluster import Pod, Protocol
from isthmus.model.settings import AgentSettings, InterceptSettings
from isthmus.plan.interception import Capabilities, ignored_addresses, plan_interception
from isthmus.plan.nodes import Me, NodeFacts
from isthmus.plan.paths import PathId, PathKind, Peer, Relay, Seen, Self
from isthmus.plan.queries import relevant
from isthmus.plan.serving import Balance, Distance, Member, PortPlan, ServiceKind, ServicePlan
from isthmus.wire.local import EndpointState, Facts, PeerFacts, RuleRow

SETTINGS = AgentSettings(node="edge-1", site="home", addresses=("192.168.1.5",))

EDGE2 = Member("edge-2", "172.17.0.2", Distance.ANYWHERE, {"http": 8080}, pod="shop/web-b")
CLOUD = Member("cloud-1", "10.1.0.5", Distance.ANYWHERE, {"http": 8080}, pod="shop/web-a")
GONE = Member("edge-9", "172.17.0.2", Distance.ANYWHERE, {"http": 8080}, pod="shop/web-c", ready=False)

WEB = ServicePlan(
    "shop", "web", ServiceKind.CLUSTER_IP, ("10.96.0.20",), ports=(PortPlan(80, "http"),), members=(CLOUD, EDGE2, GONE)
)
DNS = ServicePlan(
    "kube-system",
    "kube-dns",
    ServiceKind.CLUSTER_IP,
    ("10.96.0.10",),
    ports=(PortPlan(53, "dns", Protocol.UDP),),
    ignored="noproxy=edgemesh",
)
EMPTY = ServicePlan("shop", "empty", ServiceKind.CLUSTER_IP, ("10.96.0.30",), ports=(PortPlan(80),))
LOCAL = ServicePlan(
    "shop",
    "local",
    ServiceKind.CLUSTER_IP,
    ("10.96.0.40",),
    ports=(PortPlan(80), PortPlan(443, "tls")),
    members=(Member("edge-1", "172.17.0.9", Distance.SAME_NODE, {"": 8080}),),
)
STICKY = msgspec.structs.replace(WEB, name="sticky", cluster_ips=("10.96.0.21",), balance=Balance.CLIENT_HASH)
LOST = ServicePlan(
    "shop",
    "lost",
    ServiceKind.CLUSTER_IP,
    ("10.96.0.50",),
    ports=(PortPlan(80),),
    members=(Member("edge-7", "172.17.0.2", Distance.ANYWHERE, {"": 8080}),),
)
DB = ServicePlan(
    "shop",
    "db",
    ServiceKind.HEADLESS,
    ports=(PortPlan(5432, "sql"),),
    members=(
        Member(
            *("edge-2", "172.17.0.3", Distance.ANYWHERE, {"sql": 5432}),
            hostname="db-0",
            visible_address="240.96.0.7",
            virtual=True,
        ),
        Member(
            *("edge-1", "172.17.0.8", Distance.SAME_NODE, {"sql": 5432}), hostname="db-1", visible_address="172.17.0.8"
        ),
    ),
)
OUTSIDE = ServicePlan("shop", "mail", ServiceKind.EXTERNAL_NAME, external_name="mail.example.org")
ALIAS = ServicePlan("shop", "front", ServiceKind.EXTERNAL_NAME, external_name="web.shop.svc.cluster.local")
SERVICES = (WEB, DNS, EMPTY, LOCAL, STICKY, LOST, DB, OUTSIDE, ALIAS)

PODS = (
    Pod("shop", "client", "edge-1", ("172.17.0.4",)),
    Pod("ops", "client", "edge-1", ("172.17.0.5",)),
    Pod("shop", "cart", "edge-1", ("172.17.0.6", "fd00:17::6")),
    Pod("shop", "far", "edge-2", ("172.17.0.4",)),
)
OWN = Self("edge-1", "home", ("192.168.1.5:20006",))
CLOUD_DIRECT = PathId(PathKind.DIRECT, "192.0.2.11:20006")
RELAY = Relay("cloud", "192.0.2.10:20004", "cloud", connected=True, holds_peer=True, rtt_ms=12.0)
PEERS = (
    PeerFacts(
        Peer("cloud-1", "cloud", ("192.0.2.11:20006",)),
        "store",
        (RELAY,),
        ((CLOUD_DIRECT, Seen(worked_s=990.0, rtt_ms=12.0)),),
    ),
    PeerFacts(
        Peer("edge-2", "office", ("203.0.113.9:20006",)),
        "relay cloud",
        (RELAY,),
        ((PathId(PathKind.DIRECT, "203.0.113.9:20006"), Seen(failed_s=980.0, error="timed out")),),
    ),
    PeerFacts(
        Peer("edge-7", "barn", ("203.0.113.7:20006",)),
        "store",
        (msgspec.structs.replace(RELAY, holds_peer=False),),
        ((PathId(PathKind.DIRECT, "203.0.113.7:20006"), Seen(failed_s=980.0, error="refused")),),
    ),
)
PLANNED = plan_interception(
    InterceptSettings(), SETTINGS.virtual_cidrs, ignored_addresses(SERVICES), (), SETTINGS.addresses, Capabilities()
)
RULES = (
    RuleRow("prerouting-jump", "prerouting", "all", "jump isthmus", "isthmus", True),
    RuleRow("ignored", "isthmus", "ip daddr 10.96.0.10", "return", "ignore kube-system/kube-dns service", True),
    RuleRow("taken", "isthmus", "ip daddr 10.96.0.0/12", "dnat to 169.254.96.16:40001", "isthmus", True),
)


def facts(destination: str = "", namespace: str = "", **changes: Any) -> Facts:
    """What the agent answers, with ``changes``."""
    values: dict[str, Any] = {
        "me": Me("edge-1", "home"),
        "own": OWN,
        "now_s": 1000.0,
        "settings": SETTINGS,
        "services": relevant(SERVICES, destination, namespace),
        "pods": PODS,
        "nodes": {"cloud-1": NodeFacts("cloud"), "edge-2": NodeFacts("office")},
        "peers": PEERS,
        "interception": a_status().interception,
        "planned": PLANNED,
        "rules": RULES,
        "endpoints": (
            EndpointState("shop/web", 80, "TCP", "cloud-1", "10.1.0.5", 8080, 0.0, 2),
            EndpointState("shop/web", 80, "TCP", "edge-2", "172.17.0.2", 8080, 0.0, 0),
        ),
        "links": tuple(LINKS),
        "places": {"Service shop/web": "web.yaml:3", "Node cloud-1": "nodes.yaml:1"},
    }
    return Facts(**(values | changes))


def answer_facts(**changes: Any) -> Any:
    """The agent's answerer of "facts"."""
    return lambda arguments: facts(arguments.get("destination", ""), arguments.get("namespace", ""), **changes)


class Table(Witness):
    """A DNS server that answers what was planned for the cluster, or what it is told to."""

    def __init__(self, answers: dict[tuple[str, str], set[str] | None] | None = None, *, silent: bool = False) -> None:
        self.answers = answers or {}
        self.silent = silent
        self.asked: list[tuple[str, str]] = []

    def resolve(self, name: str, record_type: str) -> frozenset[str] | None:
        self.asked.append((name, record_type))
        if self.silent:
            return None
        if (name, record_type) in self.answers:
            given = self.answers[name, record_type]
            return None if given is None else frozenset(given)
        from isthmus.explain.hop_dns import names_of

        records = names_of(facts(name)).lookup(name, {"A": 1, "AAAA": 28}[record_type]).action.records
        return frozenset(record.data for record in records if record.type.name == record_type)
