"""The agents' store: the user's manifests, copied or linked, and Node and Pod objects where asked for."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from isthmus.lab.labfile import Generate, LabFile, StoreMode
from isthmus.lab.topology import Place, Role, Topology

GENERATED = "lab-generated.yaml"


def write(lab: LabFile, topology: Topology, directory: Path) -> None:
    """Make ``directory`` the store. Raises OSError."""
    if lab.store is StoreMode.LINK:
        directory.symlink_to(lab.manifests, target_is_directory=True)
        return
    if lab.manifests:
        shutil.copytree(lab.manifests, directory)
    else:
        directory.mkdir()
    documents: list[dict[str, Any]] = []
    if Generate.NODES in lab.generate:
        documents += [node_manifest(place) for place in topology.of(Role.NODE)]
    if Generate.PODS in lab.generate:
        documents += [pod_manifest(place) for place in topology.of(Role.POD)]
    if documents:
        (directory / GENERATED).write_text(yaml.safe_dump_all(documents, sort_keys=False))


def node_manifest(place: Place) -> dict[str, Any]:
    """Return the Node object of a node, as kubelet would register it."""
    labels = {"kubernetes.io/hostname": place.label, "isthmus.dev/site": place.site}
    addresses = [{"type": "InternalIP", "address": address} for address in place.addresses]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": place.label, "labels": labels},
        "spec": {"podCIDR": place.pod_cidrs[0], "podCIDRs": list(place.pod_cidrs)},
        "status": {"addresses": [*addresses, {"type": "Hostname", "address": place.label}]},
    }


def pod_manifest(place: Place) -> dict[str, Any]:
    """Return the Pod object of a pod, as far as the network is concerned."""
    namespace, name = place.label.split("/")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"nodeName": place.node},
        "status": {
            "phase": "Running",
            "podIP": place.addresses[0],
            "podIPs": [{"ip": address} for address in place.addresses],
        },
    }
