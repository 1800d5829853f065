"""The cluster as this node knows it: objects by key, slices by service, services by node. Pure and incremental.

``put`` and ``drop`` return the services that must be planned again. Their cost is proportional to the object and to
what it touches, never to the size of the cluster (a change of this node's own site touches every service).
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import msgspec

from isthmus.model.cluster import EndpointSlice, Key, Namespace, Node, Object, Pod, Service, Source

NOTHING: frozenset[Key] = frozenset()
NOWHERE = Source()


def same_content(one: Object, other: Object) -> bool:
    """Whether two objects differ at most in the place they were read from."""
    if type(one) is not type(other):
        return False
    return msgspec.structs.replace(one, source=NOWHERE) == msgspec.structs.replace(other, source=NOWHERE)


def service_key(namespace: str, name: str) -> Key:
    """The key a Service has."""
    return Key("Service", namespace, name)


class Cluster:
    """The index. ``me`` is this node's name: its Node object bears on every service."""

    def __init__(self, me: str = "") -> None:
        self._me = me
        self._services: dict[Key, Service] = {}
        self._slices: dict[Key, EndpointSlice] = {}
        self._nodes: dict[str, Node] = {}
        self._pods: dict[Key, Pod] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._slices_of: dict[Key, dict[Key, EndpointSlice]] = {}
        self._services_on: dict[str, dict[Key, int]] = {}
        self._pods_at: dict[str, dict[Key, Pod]] = {}

    # Reading

    @property
    def services(self) -> Mapping[Key, Service]:
        """All services by key; a live view."""
        return MappingProxyType(self._services)

    @property
    def nodes(self) -> Mapping[str, Node]:
        """All nodes of the store by name; a live view."""
        return MappingProxyType(self._nodes)

    @property
    def pods(self) -> Mapping[Key, Pod]:
        """All pods by key; a live view."""
        return MappingProxyType(self._pods)

    @property
    def namespaces(self) -> Mapping[str, Namespace]:
        """All namespaces by name; a live view."""
        return MappingProxyType(self._namespaces)

    def slices_of(self, service: Key) -> tuple[EndpointSlice, ...]:
        """The slices of a service, by name. Legacy Endpoints count only where the service has no EndpointSlice."""
        slices = self._slices_of.get(service)
        if not slices:
            return ()
        modern = [one for one in slices.values() if not one.legacy]
        return tuple(sorted(modern or slices.values(), key=lambda one: one.name))

    def services_on(self, node: str) -> frozenset[Key]:
        """The services that have an endpoint on ``node`` (plan them again when the node's facts change)."""
        return frozenset(key for key in self._services_on.get(node, ()) if key in self._services)

    def pods_at(self, address: str) -> tuple[Pod, ...]:
        """The pods that have this address, by key: several where ranges of sites overlap."""
        found = self._pods_at.get(address, {})
        return tuple(found[key] for key in sorted(found))

    def get(self, key: Key) -> Object | None:
        """The object of that key."""
        if key.kind == "Node":
            return self._nodes.get(key.name)
        if key.kind == "Namespace":
            return self._namespaces.get(key.name)
        return self._services.get(key) or self._slices.get(key) or self._pods.get(key)

    def __len__(self) -> int:
        parts = (self._services, self._slices, self._nodes, self._pods, self._namespaces)
        return sum(len(part) for part in parts)

    def __iter__(self) -> Iterator[Object]:
        yield from self._namespaces.values()
        yield from self._nodes.values()
        yield from self._pods.values()
        yield from self._services.values()
        yield from self._slices.values()

    # Changing

    def put(self, obj: Object) -> frozenset[Key]:
        """Add or replace an object; the services to plan again. A change of place alone (line, file) touches none."""
        match obj:
            case Service():
                return self._put_service(obj)
            case EndpointSlice():
                return self._put_slice(obj)
            case Node():
                return self._put_node(obj)
            case Pod():
                self._put_pod(obj)
            case Namespace():
                self._namespaces[obj.name] = obj
        return NOTHING

    def drop(self, key: Key) -> frozenset[Key]:
        """Remove an object; the services to plan again (a removed service among them). Unknown keys touch none."""
        match key.kind:
            case "Service":
                return frozenset((key,)) if self._services.pop(key, None) else NOTHING
            case "EndpointSlice":
                old = self._slices.pop(key, None)
                return self._existing(self._unlink(old)) if old else NOTHING
            case "Node":
                return self._touched_by(key.name) if self._nodes.pop(key.name, None) else NOTHING
            case "Pod":
                self._forget_pod(key)
            case "Namespace":
                self._namespaces.pop(key.name, None)
        return NOTHING

    def _put_service(self, service: Service) -> frozenset[Key]:
        key = service.key
        old = self._services.get(key)
        self._services[key] = service
        return NOTHING if old and same_content(old, service) else frozenset((key,))

    def _put_slice(self, new: EndpointSlice) -> frozenset[Key]:
        key = new.key
        old = self._slices.get(key)
        self._slices[key] = new
        if old and same_content(old, new):
            self._slices_of[service_key(new.namespace, new.service)][key] = new
            return NOTHING
        touched = {self._unlink(old)} if old else set()
        touched.add(self._link(new))
        return self._existing(*touched)

    def _put_node(self, node: Node) -> frozenset[Key]:
        old = self._nodes.get(node.name)
        self._nodes[node.name] = node
        if old and (old.site, old.pod_cidrs, old.internal_ips, old.external_ips) == (
            node.site,
            node.pod_cidrs,
            node.internal_ips,
            node.external_ips,
        ):
            return NOTHING
        return self._touched_by(node.name)

    def _put_pod(self, pod: Pod) -> None:
        self._forget_pod(pod.key)
        self._pods[pod.key] = pod
        for address in pod.ips:
            self._pods_at.setdefault(address, {})[pod.key] = pod

    def _forget_pod(self, key: Key) -> None:
        old = self._pods.pop(key, None)
        for address in old.ips if old else ():
            there = self._pods_at.get(address, {})
            there.pop(key, None)
            if not there:
                self._pods_at.pop(address, None)

    def _link(self, new: EndpointSlice) -> Key:
        service = service_key(new.namespace, new.service)
        self._slices_of.setdefault(service, {})[new.key] = new
        for node in {endpoint.node for endpoint in new.endpoints}:
            there = self._services_on.setdefault(node, {})
            there[service] = there.get(service, 0) + 1
        return service

    def _unlink(self, old: EndpointSlice) -> Key:
        service = service_key(old.namespace, old.service)
        siblings = self._slices_of[service]
        del siblings[old.key]
        if not siblings:
            del self._slices_of[service]
        for node in {endpoint.node for endpoint in old.endpoints}:
            self._unlink_node(node, service)
        return service

    def _unlink_node(self, node: str, service: Key) -> None:
        there = self._services_on[node]
        there[service] -= 1
        if not there[service]:
            del there[service]
        if not there:
            del self._services_on[node]

    def _existing(self, *keys: Key) -> frozenset[Key]:
        return frozenset(key for key in keys if key in self._services)

    def _touched_by(self, node: str) -> frozenset[Key]:
        return frozenset(self._services) if node == self._me else self.services_on(node)
