"""Manifests as users have them: what they become, and what is said where they are wrong."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.cluster import EndpointSlice, Key, Namespace, Node, Object, Pod, Protocol, Service, ServiceType
from isthmus.model.findings import Code, Finding, Severity
from isthmus.model.manifests import parse_document, parse_text

SERVICE = """apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
spec:
  clusterIP: 10.96.0.1
  ports:
  - name: http
    port: 80
"""
SLICE = """apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- addresses: [172.17.0.2]
  nodeName: edge-a
  targetRef: {kind: Pod, name: web-x}
"""
ALIAS_BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])


def objects(text: str) -> list[Object]:
    return [obj for parsed in parse_text(text, "f.yaml") for item in parsed.items for obj in item.objects]


def findings(text: str) -> list[Finding]:
    return [finding for parsed in parse_text(text, "f.yaml") for finding in parsed.findings]


def service(text: str) -> Service:
    (obj,) = objects(text)
    assert isinstance(obj, Service)
    return obj


def slice_of(text: str) -> EndpointSlice:
    (obj,) = objects(text)
    assert isinstance(obj, EndpointSlice)
    return obj


def test_a_service_says_where_it_stands() -> None:
    found = service("# first\n---\n# second\n" + SERVICE)
    assert found.cluster_ips == ("10.96.0.1",)
    assert (found.source.file, found.source.line) == ("f.yaml", 4)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(SERVICE.replace("\n", "\r\n"), id="Windows line ends"),
        pytest.param(SERVICE.replace("\n", "\r"), id="old line ends"),
        pytest.param("\ufeff" + SERVICE, id="byte order mark"),
        pytest.param("---\n---\n\n# nothing\n---\n" + SERVICE + "---\n...\n", id="empty documents"),
        pytest.param("%YAML 1.2\n--- # a comment\n" + SERVICE + "...\n", id="directive and comment at the marker"),
        pytest.param(
            "--- {apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},\n"
            ' "spec": {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}}',
            id="content at the marker",
        ),
        pytest.param(
            '{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},\n'
            '\t"spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]}}',
            id="JSON indented with tabs",
        ),
        pytest.param(
            SERVICE.replace("metadata:", "metadata: &m\n  <<: {namespace: shop, name: other}").replace(
                "  namespace: shop\n", ""
            ),
            id="merge key",
        ),
        pytest.param(SERVICE + "  selector:\nstatus:\n  loadBalancer: {}\n", id="null and unknown fields"),
        pytest.param(
            "apiVersion: v1\nkind: List\nitems:\n- " + SERVICE.strip().replace("\n", "\n  "), id="a list of one"
        ),
        pytest.param("apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: web, namespace: shop}\n"
                     "  spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}", id="a typed list"),
    ],
)  # fmt: skip
def test_all_ways_of_writing_a_service_give_the_same_one(text: str) -> None:
    assert not findings(text)
    plain = msgspec.structs.replace(service(text), source=service(SERVICE).source)
    assert plain == service(SERVICE)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("clusterIP: 10.96.0.1", "clusterIP: None", lambda s: s.headless and s.cluster_ips == ()),
        (
            "clusterIP: 10.96.0.1",
            "clusterIPs: [10.96.0.1, 'FD00:0::1']\n  clusterIP: 10.96.0.1",
            lambda s: s.cluster_ips == ("10.96.0.1", "fd00::1"),
        ),
        (
            "clusterIP: 10.96.0.1",
            "type: ExternalName\n  externalName: DB.Example.org.",
            lambda s: s.external_name == "db.example.org" and not s.cluster_ips,
        ),
        ("spec:", "spec:\n  sessionAffinity: ClientIP", lambda s: s.client_ip_affinity_s == 10_800),
        (
            "spec:",
            "spec:\n  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}",
            lambda s: s.client_ip_affinity_s == 60,
        ),
        ("spec:", "spec:\n  publishNotReadyAddresses: true", lambda s: s.publish_not_ready_addresses),
        ("port: 80", "port: 80\n    targetPort: http-port", lambda s: s.ports[0].target_port == "http-port"),
        ("port: 80", "port: 80\n    protocol: UDP", lambda s: s.ports[0].protocol is Protocol.UDP),
        ("  namespace: shop\n", "", lambda s: s.namespace == "default"),
        (
            "namespace: shop",
            "namespace: shop\n  labels: {on: 'x', 80: 'y'}",
            lambda s: s.labels == {"on": "x", "80": "y"},
        ),
    ],
)
def test_the_fields_of_a_service(old: str, new: str, check: object) -> None:
    text = SERVICE.replace(old, new)
    assert not findings(text)
    assert callable(check)
    assert check(service(text))


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "told"),
    [
        ("port: 80", "port: eighty", 10, "spec.ports[0].port", "'eighty' is text; expected a whole number"),
        ("port: 80", "port: 65536", 10, "spec.ports[0].port", "65536 is not allowed; expected a number from 1"),
        ("port: 80", "port: 80\n    protocol: ICMP", 11, "spec.ports[0].protocol", "'ICMP' is not known"),
        ("    port: 80", "    targetPort: 1", 9, "spec.ports[0].port", "it is missing"),
        ("port: 80", "port: 80\n  - port: 81", 11, "spec.ports[1].name", "since the service has several ports"),
        ("port: 80", "port: 80\n  - {name: http, port: 81}", 11, "spec.ports[1].name", "'http' stands twice"),
        ("port: 80", "port: 80\n  - {name: b, port: 80}", 11, "spec.ports[1].port", "80/TCP stands twice"),
        ("10.96.0.1", "10.96.0.256", 7, "spec.clusterIP", "expected an IP address"),
        ("10.96.0.1", "127.0.0.1", 7, "spec.clusterIP", "loopback"),
        ("name: web", "name: Web_1", 4, "metadata.name", "expected a DNS label"),
        ("name: web", "name: 12", 4, "metadata.name", "'12' is a whole number; expected text"),
        ("  name: web\n", "", 4, "metadata.name", "it is missing"),
        ("name: web", "name: web\n  name: api", 5, "metadata.name", "the key stands twice"),
        ("name: web", "name: web\n  labels: {a: x, b: 1.10}", 5, "metadata.labels.b", "'1.10' is float"),
        ("spec:", "spec:\n  type: Cluster", 7, "spec.type", "'Cluster' is not known; expected one of ClusterIP"),
        ("spec:", "spec:\n  internalTrafficPolicy: local", 7, "spec.internalTrafficPolicy", "one of Cluster, Local"),
        ("  clusterIP", "\tclusterIP", 7, "", "a tab is used to indent; expected spaces"),
        ("clusterIP: 10.96.0.1", "clusterIP: [10.96.0.1", 8, "", ""),
        ("apiVersion: v1\n", "", 1, "apiVersion", "it is missing"),
        ("kind: Service", "kind: [Service]", 2, "kind", "is not text"),
        ("spec:", "spec: []\nother:", 6, "spec", "it is a list; expected a mapping"),
        ("clusterIP: 10.96.0.1", "clusterIP: !!python/object:os.system x", 7, "spec.clusterIP", "tag"),
    ],
)  # fmt: skip
def test_a_problem_names_line_and_field_and_what_is_expected(
    old: str, new: str, line: int, field: str, told: str
) -> None:
    text = SERVICE.replace(old, new, 1)
    assert not objects(text)
    problem = findings(text)[0]
    assert problem.severity is Severity.ERROR
    assert (problem.file, problem.line, problem.field) == ("f.yaml", line, field)
    assert told in str(problem)


def test_all_problems_of_an_object_are_told_at_once() -> None:
    text = SERVICE.replace("port: 80", "port: 0").replace("10.96.0.1", "x").replace("name: http", "name: HTTP")
    assert [problem.field for problem in findings(text)] == [
        "spec.clusterIP",
        "spec.ports[0].port",
        "spec.ports[0].name",
    ]


def test_an_item_of_a_list_is_named_with_its_index_and_the_others_are_used() -> None:
    item = SERVICE.strip().replace("\n", "\n  ")
    text = f"apiVersion: v1\nkind: List\nitems:\n- {item}\n- {item.replace('port: 80', 'port: x')}\n"
    assert len(objects(text)) == 1
    (problem,) = findings(text)
    assert (problem.field, problem.line) == ("items[1].spec.ports[0].port", 23)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested deeper than"),
        ("- " * 50_000 + "a", "nested deeper than"),
        ("a: " * 1 + "{a: " * 5_000, "nested deeper than"),
        ("a: &a [*a]", "within the value it repeats"),
        (ALIAS_BOMB, "aliases repeat more than"),
        ("a: *nowhere", "undefined alias"),
        ("a: \x07", "not allowed"),
        ("just text", "not an object"),
        ("{? [a]: b}", "used as a key"),
    ],
)  # fmt: skip
def test_hostile_texts_are_refused_quickly(text: str, told: str) -> None:
    (problem,) = findings(text)
    assert told in problem.text


@pytest.mark.parametrize(
    ("kind", "version", "severity"),
    [
        ("Deployment", "apps/v1", Severity.NOTE),
        ("Service", "serving.knative.dev/v1", Severity.NOTE),
        ("EndpointSlice", "discovery.k8s.io/v1beta1", Severity.WARNING),
    ],
)
def test_unknown_kinds_are_noted_and_are_no_problem(kind: str, version: str, severity: Severity) -> None:
    (finding,) = findings(f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\n")
    assert finding.severity is severity
    assert kind in finding.text


@pytest.mark.parametrize(
    ("old", "new", "severity", "field"),
    [
        ("spec:", "spec:\n  type: NodePort", Severity.NOTE, "spec.type"),
        ("spec:", "spec:\n  type: LoadBalancer", Severity.NOTE, "spec.type"),
        ("port: 80", "port: 80\n    protocol: SCTP", Severity.NOTE, "spec.ports[0].protocol"),
        ("  clusterIP: 10.96.0.1\n", "", Severity.WARNING, "spec.clusterIP"),
        (
            "  name: web",
            "  annotations: {isthmus.dev/balance: fastest}\n  name: web",
            Severity.WARNING,
            "metadata.annotations[isthmus.dev/balance]",
        ),
        (
            "  name: web",
            "  labels: {isthmus.dev/proxy: 'no'}\n  name: web",
            Severity.WARNING,
            "metadata.labels[isthmus.dev/proxy]",
        ),
        ("spec:", "spec:\n  trafficDistribution: Nearest", Severity.WARNING, "spec.trafficDistribution"),
    ],
)
def test_what_is_not_served_is_said_and_the_rest_is_served(old: str, new: str, severity: Severity, field: str) -> None:
    text = SERVICE.replace(old, new, 1)
    assert service(text).type in ServiceType
    assert [(finding.severity, finding.field) for finding in findings(text)] == [(severity, field)]


def test_a_slice_carries_endpoints_by_node() -> None:
    found = slice_of(SLICE)
    assert found.service == "web"
    (endpoint,) = found.endpoints
    assert (endpoint.address, endpoint.node, endpoint.pod, endpoint.ready) == ("172.17.0.2", "edge-a", "web-x", True)


def test_an_endpoint_without_a_node_is_reported_with_its_place() -> None:
    text = SLICE.replace("  nodeName: edge-a\n", "")
    assert slice_of(text).endpoints[0].node == ""
    (finding,) = findings(text)
    assert finding.code is Code.ENDPOINT_WITHOUT_NODE
    assert finding.severity is Severity.WARNING
    assert (finding.line, finding.field) == (7, "endpoints[0].nodeName")


@pytest.mark.parametrize(
    ("conditions", "ready", "serving"),
    [
        ("{}", True, True),
        ("{ready: null}", True, True),
        ("{ready: false}", False, False),
        ("{ready: false, serving: true, terminating: true}", False, True),
    ],
)
def test_conditions_of_an_endpoint(conditions: str, ready: bool, serving: bool) -> None:
    (endpoint,) = slice_of(SLICE + f"  conditions: {conditions}\n").endpoints
    assert (endpoint.ready, endpoint.serving) == (ready, serving)


def test_slices_of_names_and_of_no_service_are_said_not_to_be_served() -> None:
    fqdn = SLICE.replace("IPv4", "FQDN").replace("172.17.0.2", "a.example.org")
    assert not objects(fqdn)
    assert findings(fqdn)[0].code is Code.NOT_SERVED
    orphan = SLICE.replace("labels: {kubernetes.io/service-name: web}", "labels: {}")
    assert not objects(orphan)
    assert findings(orphan)[0].code is Code.SLICE_WITHOUT_SERVICE


def test_an_address_of_the_other_family_is_refused() -> None:
    (problem,) = findings(SLICE.replace("172.17.0.2", "fd00::2"))
    assert problem.field == "endpoints[0].addresses[0]"


def test_legacy_endpoints_become_a_slice_for_each_subset_and_family() -> None:
    text = """apiVersion: v1
kind: Endpoints
metadata: {name: web, namespace: shop}
subsets:
- addresses: [{ip: 172.17.0.2, nodeName: a}, {ip: 'fd00::2', nodeName: a}]
  notReadyAddresses: [{ip: 172.17.0.3, nodeName: b}]
  ports: [{port: 8080}]
"""
    first, second = objects(text)
    assert isinstance(first, EndpointSlice)
    assert isinstance(second, EndpointSlice)
    assert (first.name, second.name) == ("web#0-ipv4", "web#0-ipv6")
    assert [endpoint.ready for endpoint in first.endpoints] == [True, False]
    assert first.legacy
    assert first.service == "web"


def test_nodes_pods_and_namespaces() -> None:
    node, pod, done, namespace = objects("""apiVersion: v1
kind: Node
metadata: {name: edge-a, labels: {topology.kubernetes.io/zone: z, isthmus.dev/site: north}}
spec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00:1::/64']}
status: {addresses: [{type: InternalIP, address: 192.168.1.4}, {type: Hostname, address: edge-a}]}
---
apiVersion: v1
kind: Pod
metadata: {name: p}
spec: {nodeName: edge-a}
status: {podIP: 10.1.0.5, podIPs: [{ip: 10.1.0.5}, {ip: 'fd00:1::5'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: done}
status: {phase: Succeeded, podIP: 10.1.0.6}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
""")
    assert isinstance(node, Node)
    assert (node.site, node.pod_cidrs, node.internal_ips) == ("north", ("10.1.0.0/24", "fd00:1::/64"), ("192.168.1.4",))
    assert isinstance(pod, Pod)
    assert (pod.node, pod.ips, pod.namespace) == ("edge-a", ("10.1.0.5", "fd00:1::5"), "default")
    assert isinstance(done, Pod)
    assert not done.ips
    assert isinstance(namespace, Namespace)


def test_a_broken_document_still_says_whose_it_is() -> None:
    (parsed,) = parse_text(SERVICE.replace("port: 80", "port: x"))
    assert parsed.broken == (Key("Service", "shop", "web"),)
    assert not parsed.unknown_loss
    (unreadable,) = parse_text("a: [")
    assert unreadable.unknown_loss


def test_findings_of_one_object_are_bounded() -> None:
    text = SLICE + "- addresses: [172.17.0.3]\n" * 500
    found = findings(text)
    assert len(found) == 20
    assert "480 more" in found[-1].text


YAMLISH = st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!|>'\"#%@`,?\n \t\r0x1.<~\ufeff\u2028é\x00")), max_size=200)
MUTATED = st.builds(
    lambda base, at, cut, junk: base[: at % len(base)] + junk + base[at % len(base) + cut :],
    st.sampled_from([SERVICE, SLICE, SERVICE + "---\n" + SLICE]),
    st.integers(0, 1000),
    st.integers(0, 30),
    YAMLISH,
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(YAMLISH, MUTATED, st.text(max_size=100)))
def test_no_text_is_too_strange_to_be_read_or_reported(text: str) -> None:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
    for parsed in parse_text(text, "f.yaml"):
        for finding in parsed.findings:
            assert 1 <= finding.line <= lines + 1 + sum(map(text.count, "\u2028\u2029\x85"))
            assert str(finding)
        if parsed.broken or parsed.unknown_loss:
            assert any(finding.severity is Severity.ERROR for finding in parsed.findings)


def test_the_same_text_always_gives_the_same_result() -> None:
    assert parse_document(SERVICE) == parse_document(SERVICE)
