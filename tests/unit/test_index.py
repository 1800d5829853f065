"""The cluster index: what a change touches, held against an index built anew."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from isthmus.model.cluster import Endpoint, EndpointSlice, Key, Node, Object, Pod, Service, Source
from isthmus.model.index import Cluster, service_key

WEB = Service("shop", "web", cluster_ips=("10.96.0.1",))
API = Service("shop", "api", cluster_ips=("10.96.0.2",))


def piece(name: str, service: str, *nodes: str, legacy: bool = False) -> EndpointSlice:
    endpoints = tuple(Endpoint(f"172.17.0.{i + 2}", node) for i, node in enumerate(nodes))
    return EndpointSlice("shop", name, service, endpoints=endpoints, legacy=legacy)


def cluster(*objects: Object, me: str = "me") -> Cluster:
    made = Cluster(me)
    for obj in objects:
        made.put(obj)
    return made


def test_a_new_service_and_a_changed_slice_touch_that_service_alone() -> None:
    made = cluster(WEB, API)
    assert made.put(piece("web-1", "web", "a")) == {WEB.key}
    assert made.put(Service("shop", "new")) == {service_key("shop", "new")}


def test_a_slice_that_changes_hands_touches_both_services() -> None:
    made = cluster(WEB, API, piece("s", "web", "a"))
    assert made.put(piece("s", "api", "a")) == {WEB.key, API.key}
    assert made.slices_of(WEB.key) == ()


def test_a_slice_without_its_service_touches_nothing_until_the_service_comes() -> None:
    made = cluster(piece("s", "web", "a"))
    assert made.put(piece("s", "web", "b")) == frozenset()
    assert made.put(WEB) == {WEB.key}


def test_an_object_that_only_moved_touches_nothing() -> None:
    made = cluster(WEB)
    moved = Service("shop", "web", cluster_ips=("10.96.0.1",), source=Source("f.yaml", 9))
    assert made.put(moved) == frozenset()
    assert made.services[WEB.key].source.line == 9


def test_a_node_touches_the_services_with_members_there() -> None:
    made = cluster(WEB, API, piece("w", "web", "a", "b"), piece("p", "api", "b"))
    assert made.put(Node("a", site="north")) == {WEB.key}
    assert made.put(Node("a", site="north", labels={"x": "y"})) == frozenset()
    assert made.put(Node("b", site="south")) == {WEB.key, API.key}
    assert made.drop(Key("Node", "", "a")) == {WEB.key}


def test_this_nodes_own_site_touches_every_service() -> None:
    made = cluster(WEB, API, me="a")
    assert made.put(Node("a", site="north")) == {WEB.key, API.key}


def test_legacy_endpoints_count_only_without_slices() -> None:
    legacy = piece("web#0-ipv4", "web", "old", legacy=True)
    made = cluster(WEB, legacy)
    assert made.slices_of(WEB.key) == (legacy,)
    modern = piece("web-1", "web", "new")
    made.put(modern)
    assert made.slices_of(WEB.key) == (modern,)
    made.drop(modern.key)
    assert made.slices_of(WEB.key) == (legacy,)


def test_pods_of_sites_that_overlap_share_an_address() -> None:
    one, other = Pod("x", "one", "a", ("172.17.0.2",)), Pod("x", "other", "b", ("172.17.0.2",))
    made = cluster(one, other)
    assert made.pods_at("172.17.0.2") == (one, other)
    made.drop(one.key)
    assert made.pods_at("172.17.0.2") == (other,)
    made.put(Pod("x", "other", "b"))
    assert made.pods_at("172.17.0.2") == ()


NAMES = st.sampled_from("abc")
OBJECTS = st.one_of(
    st.builds(Service, st.just("shop"), NAMES, cluster_ips=st.sampled_from([(), ("10.96.0.1",)])),
    st.builds(lambda name, service, nodes, legacy: piece(name, service, *nodes, legacy=legacy),
              NAMES, NAMES, st.lists(NAMES, max_size=3), st.booleans()),
    st.builds(Node, NAMES, site=st.sampled_from(["", "x", "y"])),
    st.builds(Pod, st.just("shop"), NAMES, NAMES, st.sampled_from([(), ("1.1.1.1",), ("1.1.1.2",)])),
)  # fmt: skip


class Incremental(RuleBasedStateMachine):
    """Whatever the history, the index is the one built from what is left; and untouched services look the same."""

    keys: Bundle[Key] = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster("a")
        self.left: dict[Key, Object] = {}
        self.views: dict[Key, object] = {}

    def view(self, key: Key) -> object:
        slices = self.cluster.slices_of(key)
        nodes = {endpoint.node for one in slices for endpoint in one.endpoints} | {"a"}
        sites = {node: self.cluster.nodes[node].site for node in nodes if node in self.cluster.nodes}
        return self.cluster.services[key], slices, sites

    def check(self, touched: frozenset[Key]) -> None:
        views = {key: self.view(key) for key in self.cluster.services}
        for key in views.keys() | self.views.keys():
            if key not in touched:
                assert views.get(key) == self.views.get(key)
        self.views = views

    @rule(target=keys, obj=OBJECTS)
    def put(self, obj: Object) -> Key:
        self.left[obj.key] = obj
        self.check(self.cluster.put(obj))
        return obj.key

    @rule(key=keys)
    def drop(self, key: Key) -> None:
        self.left.pop(key, None)
        self.check(self.cluster.drop(key))

    @invariant()
    def equals_one_built_anew(self) -> None:
        anew = cluster(*self.left.values(), me="a")
        assert len(anew) == len(self.cluster) == len(self.left)
        for name in "abc":
            assert anew.services_on(name) == self.cluster.services_on(name)
            assert anew.slices_of(service_key("shop", name)) == self.cluster.slices_of(service_key("shop", name))
        assert anew.pods_at("1.1.1.1") == self.cluster.pods_at("1.1.1.1")
        assert {obj.key for obj in self.cluster} == set(self.left)


TestIncremental = Incremental.TestCase
TestIncremental.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
