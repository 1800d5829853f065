"""Labels and annotations that Isthmus reads: their names, the values they may have, and what an absent one means.

The one list: manifests are checked against it, plan/ reads through it, docs/manifests.md is held to it by a test.
"""

from collections.abc import Mapping

SITE = "isthmus.dev/site"
ZONE = "topology.kubernetes.io/zone"
SERVICE_NAME = "kubernetes.io/service-name"

PROXY = "isthmus.dev/proxy"
NOPROXY = "noproxy"
NOPROXY_VALUE = "edgemesh"
PROXY_NAME = "service.edgemesh.kubeedge.io/service-proxy-name"

BALANCE = "isthmus.dev/balance"
PREFER = "isthmus.dev/prefer"
PRESERVE_CLIENT_ADDRESS = "isthmus.dev/preserve-client-address"

BOOLEANS = ("true", "false")
SERVICE_LABELS: Mapping[str, tuple[str, ...]] = {PROXY: BOOLEANS}
SERVICE_ANNOTATIONS: Mapping[str, tuple[str, ...]] = {
    BALANCE: ("round-robin", "random", "least-connections", "client-hash"),
    PREFER: ("same-node", "same-site", "anywhere"),
    PRESERVE_CLIENT_ADDRESS: BOOLEANS,
}
"""Values that may stand there. An absent or wrong one means that nothing was asked; plan/ has the defaults."""


def known_value(values: Mapping[str, str], name: str, allowed: Mapping[str, tuple[str, ...]]) -> str:
    """The value of ``name``, or '' where it is absent or not one of the allowed (which parsing has reported)."""
    value = values.get(name, "")
    return value if value in allowed[name] else ""


def site_of(labels: Mapping[str, str]) -> str:
    """The site a node's labels give: ``isthmus.dev/site``, else the zone, else ''."""
    return labels.get(SITE, "") or labels.get(ZONE, "")
