"""``metadata`` of every object."""

from collections.abc import Callable

import msgspec

from isthmus.model import checks
from isthmus.model.reading import Reading
from isthmus.model.yamltext import Value


class Meta(msgspec.Struct):
    """What objects are known by. ``namespace`` is '' for cluster-scoped objects, else ``default`` unless given."""

    name: str
    namespace: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class RawObject(msgspec.Struct):
    metadata: Meta


def read_meta(value: Value, reading: Reading, name: Callable[[str], str], *, namespaced: bool) -> Meta:
    """Decode and check; ``name`` is what names of the kind must be. Raises Unusable."""
    meta = reading.decode(value, RawObject).metadata
    reading.check(("metadata", "name"), meta.name, name)
    if not namespaced:
        meta.namespace = ""
    elif meta.namespace:
        reading.check(("metadata", "namespace"), meta.namespace, checks.label)
    else:
        meta.namespace = "default"
    return meta
