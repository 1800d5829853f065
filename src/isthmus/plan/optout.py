"""Which services are left to others: not intercepted, though DNS still answers for them.

First rule that matches wins; the order and the wording follow docs/manifests.md. An opted-out service becomes a RETURN
with the comment ``ignore NAMESPACE/NAME service``.
"""

from collections.abc import Callable
from enum import StrEnum

from isthmus.model import labels
from isthmus.model.cluster import Service
from isthmus.plan.verdict import Because, Verdict

LEFT_TO_THE_CLUSTER = frozenset({("default", "kubernetes"), ("kube-system", "kube-dns")})
"""Services that agents of this kind have always left alone: the API server and the cluster's DNS."""


class OptOut(StrEnum):
    """Whether a service is intercepted."""

    SERVE = "serve"
    IGNORE = "ignore"


def opt_out(service: Service) -> Verdict[OptOut]:
    """Decide whether ``service`` is intercepted. The text of an IGNORE is the label in full, or the rule by name."""
    for rule in RULES:
        verdict = rule(service)
        if verdict:
            return verdict
    return Verdict(OptOut.SERVE, "default", Because("no opt-out label", object=str(service.key)))


def _asked_for(service: Service) -> Verdict[OptOut] | None:
    if service.labels.get(labels.PROXY) != "true":
        return None
    return _verdict(OptOut.SERVE, "proxy-true", f"{labels.PROXY}=true", service, labels.PROXY)


def _proxy_false(service: Service) -> Verdict[OptOut] | None:
    if service.labels.get(labels.PROXY) != "false":
        return None
    return _verdict(OptOut.IGNORE, "proxy-false", f"{labels.PROXY}=false", service, labels.PROXY)


def _noproxy(service: Service) -> Verdict[OptOut] | None:
    if service.labels.get(labels.NOPROXY) != labels.NOPROXY_VALUE:
        return None
    text = f"{labels.NOPROXY}={labels.NOPROXY_VALUE}"
    return _verdict(OptOut.IGNORE, "noproxy-edgemesh", text, service, labels.NOPROXY)


def _proxy_name(service: Service) -> Verdict[OptOut] | None:
    if labels.PROXY_NAME not in service.labels:
        return None
    text = f"{labels.PROXY_NAME}={service.labels[labels.PROXY_NAME]}"
    return _verdict(OptOut.IGNORE, "service-proxy-name", text, service, labels.PROXY_NAME)


def _left_to_the_cluster(service: Service) -> Verdict[OptOut] | None:
    if (service.namespace, service.name) not in LEFT_TO_THE_CLUSTER:
        return None
    text = f"{service.namespace}/{service.name} is left to the cluster unless labelled {labels.PROXY}=true"
    return _verdict(OptOut.IGNORE, "left-to-the-cluster", text, service, "")


def _verdict(action: OptOut, rule: str, text: str, service: Service, label: str) -> Verdict[OptOut]:
    setting = f"metadata.labels[{label}]" if label else ""
    return Verdict(action, rule, Because(text, object=str(service.key), setting=setting))


RULES: tuple[Callable[[Service], Verdict[OptOut] | None], ...] = (
    _asked_for,
    _proxy_false,
    _noproxy,
    _proxy_name,
    _left_to_the_cluster,
)
